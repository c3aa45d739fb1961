"""What the prompts hold: random ids, blocks shared between requests, or pieces of real text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hasten.bench.serving.trace import Row

if TYPE_CHECKING:
    from hasten.models.tokenizer import Tokenizer


class Prompts(Protocol):
    """Makes the prompt of the request with this number: token ids, or text."""

    def make(self, number: int, row: Row) -> list[int] | str: ...


class RandomIds:
    """Uniform token ids: exactly as long as asked, and nothing shared but what the trace shares.

    The same seed gives the same prompts, whatever the number of requests.
    """

    def __init__(self, vocab_size: int, seed: int, without: Sequence[int] = ()) -> None:
        allowed = np.setdiff1d(np.arange(vocab_size), np.asarray(without, dtype=np.int64))
        if not len(allowed):
            raise ValueError(f"a vocabulary of {vocab_size} leaves no token for random prompts")
        self._allowed = allowed
        self._seed = seed

    def make(self, number: int, row: Row) -> list[int]:
        pieces = []
        room = row.prompt
        for block in row.blocks:
            if room <= 0:
                break
            take = min(room, row.block_tokens)
            # the whole block is drawn, so that a cut one begins like the full one
            pieces.append(self._draw(row.block_tokens, 1, block)[:take])
            room -= take
        if room > 0:
            pieces.append(self._draw(room, 2, number))
        ids: list[int] = np.concatenate(pieces).tolist()
        return ids

    def _draw(self, count: int, kind: int, number: int) -> np.ndarray:
        sign = int(number < 0)  # seeds are not negative, ids of blocks may be
        rng = np.random.default_rng([self._seed, kind, sign, abs(number)])
        return self._allowed[rng.integers(0, len(self._allowed), count)]


class TextPieces:
    """Pieces of a text that its tokenizer turns into exactly the wanted number of tokens.

    For servers that take text only. Decoding some ids and encoding the text again may join tokens
    at the cut, so places are tried until the count comes out right; after ``TRIES`` the nearest
    one is taken, and the report counts what the server says it read.
    """

    TRIES = 40

    def __init__(self, tokenizer: Tokenizer, source: Sequence[int], seed: int) -> None:
        """``source`` is the text to cut from, as ids."""
        self._tokenizer = tokenizer
        self._ids = source
        self._added = len(tokenizer.encode("a")) - len(
            tokenizer.encode("a", add_special_tokens=False)
        )
        self._seed = seed

    def make(self, number: int, row: Row) -> str:
        if row.blocks:
            raise ValueError("a trace with shared blocks needs prompts as token ids")
        length = max(1, row.prompt - self._added)  # the server adds its special tokens itself
        if length > len(self._ids):
            raise ValueError(
                f"a prompt of {length} tokens is longer than the text it is cut from "
                f"({len(self._ids)} tokens)"
            )
        rng = np.random.default_rng([self._seed, 3, number])
        nearest: tuple[int, str] | None = None
        for _ in range(self.TRIES):
            start = int(rng.integers(0, len(self._ids) - length + 1))
            piece = self._tokenizer.decode(self._ids[start : start + length])
            off = abs(len(self._tokenizer.encode(piece, add_special_tokens=False)) - length)
            if nearest is None or off < nearest[0]:
                nearest = (off, piece)
            if off == 0:
                break
        assert nearest is not None
        return nearest[1]


def code_text(characters: int = 300_000) -> str:
    """Standard-library source that no bundled model was trained on, cut at this length."""
    from hasten.training.corpus import split, standard_library

    return "\n".join(file.text for file in split(standard_library())[1])[:characters]
