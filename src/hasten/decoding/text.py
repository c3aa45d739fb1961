"""From token ids to text that may be shown: whole code points, stop strings held back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class IncrementalDecoder(Protocol):
    """What a tokenizer's ``decode_stream()`` returns."""

    def step(self, token: int) -> str:
        """Text that became complete with this token; never half a code point."""
        ...

    def flush(self) -> str:
        """What is left at the end."""
        ...


class TextStream:
    """The growing text of one sequence.

    Text that could be the beginning of a stop string is kept back until it is decided; ``push``
    returns only what can never be taken back, so the pieces concatenate to exactly the final text.
    """

    def __init__(
        self, decoder: IncrementalDecoder, stop: Sequence[str] = (), include_stop: bool = False
    ) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, tokens: Iterable[int], search: bool = True) -> str:
        """Feed tokens; returns the text that is now certain. Ignores all after a stop string.

        ``search=False`` feeds tokens among which no stop string may end (minimum length).
        """
        out = ""
        for token in tokens:
            if self.stopped_by is None:
                out += self._advance(self._decoder.step(token), search)
        return out

    def finish(self) -> str:
        """The rest of the text, once no token will follow."""
        if self.stopped_by is not None:
            return ""
        out = self._advance(self._decoder.flush(), True)
        if self.stopped_by is None:
            out, self._held = out + self._held, ""
        return out

    def _advance(self, piece: str, search: bool) -> str:
        if not self._stop:
            return piece
        if not piece:
            return ""
        text = self._held + piece
        if search:
            # a stop string that lies wholly in what is held ended where none may end
            starts = [(text.find(s, max(0, len(self._held) - len(s) + 1)), s) for s in self._stop]
            hits = [(at, -len(s), s) for at, s in starts if at >= 0]
            if hits:
                at, _, stop = min(hits)
                self.stopped_by = stop
                self._held = ""
                return text[: at + len(stop)] if self._include_stop else text[:at]
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _undecided(self, text: str) -> int:
        """Length of the longest tail that some stop string could still continue."""
        longest = max(map(len, self._stop)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(s.startswith(tail) for s in self._stop):
                return length
        return 0
