"""Drafts that are the rest of the input, for output that resembles it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hasten.methods import MethodError, method
from hasten.models.tokenizer import Tokenizer
from hasten.speculation.base import Draftable, DraftContext, StatelessDrafting
from hasten.speculation.tree import TokenTree


@dataclass(slots=True)
class Source:
    """The part of a prompt that the output is expected to resemble, and where the output is in it.

    Holds a few numbers for each token of the source while the sequence lives.

    Attributes:
        tokens: the source.
        places: token -> where it stands in the source, ascending.
        read: known tokens of the sequence that were compared with the source.
        next: where the draft continues; None after a mismatch, until the output is found again.
    """

    tokens: list[int]
    places: dict[int, list[int]] = field(default_factory=dict)
    read: int = 0
    next: int | None = 0

    def follow(self, known: list[int], num_prompt: int) -> None:
        """Read what is new of the output, and find the place in the source behind it."""
        new = known[max(self.read, num_prompt) :]
        self.read = len(known)
        for token in new:
            if self.next is not None and self.tokens[self.next : self.next + 1] == [token]:
                self.next += 1
            else:
                self.next = None
        if self.next is None:
            self.next = self._align(known, num_prompt)

    def _align(self, known: list[int], num_prompt: int) -> int | None:
        """Behind the one place that the end of the output matches: its shortest end that occurs
        once in the source. None if all ends occur several times or the last token not at all."""
        if len(known) == num_prompt:
            return None
        found = self.places.get(known[-1], [])
        for size in range(1, len(known) - num_prompt + 1):
            if len(found) < 2:
                break
            if size == len(known) - num_prompt:
                return None
            earlier = known[-size - 1]
            found = [p for p in found if p >= size and self.tokens[p - size] == earlier]
        return found[0] + 1 if len(found) == 1 else None


@method(
    "aggressive",
    slot="draft",
    paper="Lossless Acceleration for Seq2seq Generation with Aggressive Decoding (2205.10350)",
    exact="bitwise",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens", "drafts-from-text"),
)
@dataclass(frozen=True)
class Aggressive(StatelessDrafting):
    """Proposes the rest of the input from where the output stands in it (input-guided, IAD).

    Pays where the output is the input with few changes: correcting, reformatting, renaming, code
    edits. The first draft is the beginning of the source; where the target departs from it, the
    drafter is silent until the last few output tokens match the source at exactly one place. The
    source is the prompt, or what stands in it between the texts ``begin`` and ``end`` (the last
    such passage; an ``end`` that is missing means up to the end of the prompt), for example
    ``begin=<text>,end=</text>``. A draft has at most ``k`` tokens; a pass of about 64 rows costs
    little more than one row.
    """

    k: int = 64
    begin: str = ""
    end: str = ""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k}: propose at least one token")
        if self.end and not self.begin:
            raise ValueError("end needs begin: name the text before the source, too")

    def start(self, context: DraftContext) -> AggressiveDrafting:
        context.check_fits(self.k)
        if self.begin and context.tokenizer is None:
            raise MethodError(
                "draft=aggressive finds begin and end in the prompt's text, and this engine runs "
                "on token ids without a tokenizer; leave them out"
            )
        return AggressiveDrafting(self, context.tokenizer)


@dataclass
class AggressiveDrafting(StatelessDrafting):
    """`Aggressive` at work."""

    method: Aggressive
    tokenizer: Tokenizer | None

    def open(self, sequence: Draftable) -> Any:
        """Reads the prompt when the first draft is asked for; most sequences wait before."""
        return None

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        return [self._chain(s, budget) for s, budget in zip(sequences, budgets, strict=True)]

    def _chain(self, sequence: Draftable, budget: int) -> TokenTree:
        tokens = sequence.tokens
        if sequence.draft_state is None:
            sequence.draft_state = self._source(tokens[: sequence.num_prompt])
        source: Source = sequence.draft_state
        source.follow(tokens, sequence.num_prompt)
        rest: list[int] = []
        if source.next is not None:
            rest = source.tokens[source.next : source.next + min(budget, self.method.k)]
        return TokenTree.chain([tokens[-1], *rest])

    def _source(self, prompt: list[int]) -> Source:
        first, last = self._span(prompt)
        source = Source(prompt[first:last])
        for place, token in enumerate(source.tokens):
            source.places.setdefault(token, []).append(place)
        return source

    def _span(self, prompt: list[int]) -> tuple[int, int]:
        """The tokens between the markers, by the text that each token stands for: markers need
        not be tokens of their own. A token that is partly a marker is not in the source."""
        if not self.method.begin:
            return 0, len(prompt)
        assert self.tokenizer is not None
        pieces = [self.tokenizer.token_bytes(token) for token in prompt]
        ends, total = [], 0
        for piece in pieces:
            total += len(piece)
            ends.append(total)
        text = b"".join(pieces)
        begin, end = self.method.begin.encode(), self.method.end.encode()
        limit = text.rfind(end) if end else -1
        start = text.rfind(begin, 0, limit if limit >= 0 else len(text))
        if start < 0:  # an end before any begin is no end
            limit, start = -1, text.rfind(begin)
        if start < 0:
            return 0, 0
        start += len(begin)
        stop = limit if limit >= 0 else len(text)
        inside = [
            i
            for i, (piece, after) in enumerate(zip(pieces, ends, strict=True))
            if after - len(piece) >= start and after <= stop
        ]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)
