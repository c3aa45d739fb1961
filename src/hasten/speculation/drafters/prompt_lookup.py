"""Drafts copied from the sequence's own past."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from hasten.methods import method
from hasten.speculation.base import GRADES, Draftable, DraftContext, StatelessDrafting
from hasten.speculation.tree import TokenTree

Table = dict[tuple[int, ...], int]
UNDO = 32
"""Tokens that can be taken back without reading the whole text again."""
LONGEST = 64
"""Of ``max_ngram``."""


@dataclass(slots=True)
class NgramIndex:
    """Where each n-gram of a sequence last ended, kept up to date token by token.

    Attributes:
        end: ``end[n - 1]`` maps an n-gram to the index after its last occurrence that has a
            successor.
        indexed: tokens whose n-grams are in the index.
        undo: what the latest of them replaced: (table, n-gram, its entry before or None).
    """

    end: list[Table]
    indexed: int = 0
    undo: deque[list[tuple[Table, tuple[int, ...], int | None]]] = field(
        default_factory=lambda: deque(maxlen=UNDO), compare=False
    )

    def extend(self, tokens: list[int]) -> None:
        """Index all n-grams that end before the last token."""
        stop = len(tokens) - 1
        for after in range(self.indexed + 1, stop + 1):
            replaced = []
            for n, table in enumerate(self.end[:after], 1):
                gram = tuple(tokens[after - n : after])
                if after > stop - UNDO:
                    replaced.append((table, gram, table.get(gram)))
                table[gram] = after
            self.undo.append(replaced)
        self.indexed = max(self.indexed, stop)

    def cut(self, length: int) -> bool:
        """Forget all but the first ``length`` tokens. False if it is too late for that."""
        if self.indexed - (length - 1) > len(self.undo):
            return False
        while self.indexed > length - 1:
            for table, gram, before in self.undo.pop():
                if before is None:
                    del table[gram]
                else:
                    table[gram] = before
            self.indexed -= 1
        return True


@method(
    "prompt-lookup",
    slot="draft",
    paper="Prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding)",
    exact="bitwise",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens", "drafts-from-text", "grades-proposals"),
)
@dataclass(frozen=True)
class PromptLookup(StatelessDrafting):
    """Continues the latest earlier occurrence of the longest matching n-gram at the end.

    Costs a few dictionary look-ups a step whatever the context length, and pays where the output
    repeats its context: editing, extraction, code, long answers about a document. A match that
    reaches the end goes on with its own proposal, so a repeated pattern is proposed whole.
    """

    k: int = 8
    max_ngram: int = 3
    min_ngram: int = 1

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k}: propose at least one token")
        if not 1 <= self.min_ngram <= self.max_ngram <= LONGEST:
            raise ValueError(
                f"need 1 <= min_ngram ({self.min_ngram}) <= max_ngram ({self.max_ngram}) "
                f"<= {LONGEST}: each length has a table in each sequence"
            )

    def start(self, context: DraftContext) -> PromptLookup:
        context.check_fits(self.k)
        return self

    def open(self, sequence: Draftable) -> NgramIndex:
        return NgramIndex([{} for _ in range(self.max_ngram)])

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        return [
            TokenTree.chain(s.tokens[-1:] + self._continuation(s, min(budget, self.k)))
            for s, budget in zip(sequences, budgets, strict=True)
        ]

    def rollback(self, sequence: Draftable, length: int) -> None:
        index: NgramIndex = sequence.draft_state
        if not index.cut(length):
            sequence.draft_state = self.open(sequence)

    def grade(self, sequence: Draftable) -> int:
        after, n = self._match(sequence)
        return match_grade(sequence.tokens, after, n) if n else 0

    def _match(self, sequence: Draftable) -> tuple[int, int]:
        """The index after the occurrence that is continued, and the n of its n-gram; 0 if there
        is none."""
        tokens, index = sequence.tokens, sequence.draft_state
        index.extend(tokens)
        for n in range(min(self.max_ngram, len(tokens) - 1), self.min_ngram - 1, -1):
            after = index.end[n - 1].get(tuple(tokens[-n:]))
            if after is not None:
                return after, n
        return 0, 0

    def _continuation(self, sequence: Draftable, length: int) -> list[int]:
        after, n = self._match(sequence)
        return copied(sequence.tokens, after, length) if n else []


def match_grade(tokens: list[int], after: int, length: int) -> int:
    """How good a copy from ``after`` on is, by how much before it is the same as at the end of the
    text, of which ``length`` tokens are known to be: 1, 2, 4, or 8 tokens and more give the grades
    1 to ``GRADES``."""
    longest = 1 << GRADES - 1
    while length < longest and length < after and tokens[after - length - 1] == tokens[-length - 1]:
        length += 1
    return min(length, longest).bit_length()


def copied(tokens: list[int], start: int, length: int) -> list[int]:
    """``length`` tokens from ``start`` on; past the end, what was copied is copied again."""
    copied = tokens[start : start + length]
    while len(copied) < length:
        copied += copied[: length - len(copied)]
    return copied
