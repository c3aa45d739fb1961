"""Drafts copied from where the last few tokens stood before, by a rolling hash."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hasten.methods import method
from hasten.speculation.base import Draftable, DraftContext, Outcome, StatelessDrafting
from hasten.speculation.drafters.prompt_lookup import copied, match_grade
from hasten.speculation.tree import TokenTree, TreeBuilder

PRIME = (1 << 61) - 1
BASE = 0x1F0A4C8B3D9E6571
LOOKS = 64
"""Occurrences that are looked at in a step, so that a text of one repeated token stays cheap."""


@dataclass(slots=True)
class CopyIndex:
    """Where each gram of ``gamma`` tokens ended before, kept up to date token by token.

    Takes about 150 bytes a token of the sequence and goes with it.

    Attributes:
        last: hash of a gram -> the index after its last occurrence that has a successor.
        before: for the index after a gram (less ``gamma``), the same of the occurrence of that
            hash before it; 0 if it is the first.
        hash: of the last ``gamma`` tokens.
        read: tokens that went into ``hash``.
        length: how many tokens the next copy may have.
    """

    gamma: int
    length: int
    last: dict[int, int] = field(default_factory=dict)
    before: list[int] = field(default_factory=list)
    hash: int = 0
    read: int = 0

    def extend(self, tokens: list[int]) -> None:
        """Read the tokens that are new. The gram at the end has no successor and stays out, or
        it would be found as its own occurrence."""
        gamma, drop = self.gamma, pow(BASE, self.gamma, PRIME)
        value = self.hash
        for i in range(self.read, len(tokens)):
            if i >= gamma:
                self.before.append(self.last.get(value, 0))
                self.last[value] = i
                value = (value * BASE + tokens[i] + 1 - (tokens[i - gamma] + 1) * drop) % PRIME
            else:
                value = (value * BASE + tokens[i] + 1) % PRIME
        self.hash, self.read = value, len(tokens)

    def occurrences(self, tokens: list[int]) -> Iterator[int]:
        """The indices after earlier occurrences of the last gram, latest first. The tokens are
        compared, since grams may share a hash."""
        gram = tokens[len(tokens) - self.gamma :]
        end = self.last.get(self.hash, 0) if len(tokens) >= self.gamma else 0
        for _ in range(LOOKS):
            if not end:
                return
            if tokens[end - self.gamma : end] == gram:
                yield end
            end = self.before[end - self.gamma]


@method(
    "copyspec",
    slot="draft",
    paper="CopySpec: Accelerating LLMs with Speculative Copy-and-Paste (arXiv:2502.08923)",
    exact="bitwise",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens", "drafts-from-text", "grades-proposals"),
)
@dataclass(frozen=True)
class CopySpec(StatelessDrafting):
    """Copies what followed the last ``gamma`` tokens where they stood before.

    Pays in conversations that come back to their own text: "the same with small changes",
    quotations, code under repair. Elsewhere it proposes nothing and costs a look-up. The latest
    occurrence is copied; with ``branches`` > 1, those of them that went on differently become
    branches of one tree. ``adapt`` makes the next copy twice as long as what was accepted of the
    last one (plus one token, at most ten times ``k``) instead of always ``k``.
    """

    gamma: int = 3
    k: int = 10
    branches: int = 1
    adapt: bool = False

    def __post_init__(self) -> None:
        for name in ("gamma", "k", "branches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def start(self, context: DraftContext) -> CopySpec:
        context.check_fits(self.k)
        return self

    def open(self, sequence: Draftable) -> CopyIndex:
        return CopyIndex(self.gamma, self.k)

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        return [self._tree(s, budget) for s, budget in zip(sequences, budgets, strict=True)]

    def grade(self, sequence: Draftable) -> int:
        tokens, index = sequence.tokens, sequence.draft_state
        index.extend(tokens)
        end = next(index.occurrences(tokens), 0)
        return match_grade(tokens, end, self.gamma) if end else 0

    def _tree(self, sequence: Draftable, budget: int) -> TokenTree:
        tokens, index = sequence.tokens, sequence.draft_state
        index.extend(tokens)
        length = min(index.length, budget)
        if not length:
            return TokenTree.root(tokens[-1])
        found = index.occurrences(tokens)
        if self.branches == 1:
            end = next(found, None)
            copy = [] if end is None else copied(tokens, end, length)
            return TokenTree.chain([tokens[-1], *copy])
        copies: list[list[int]] = []
        for end in found:
            copy = copied(tokens, end, length)
            if copy not in copies:
                copies.append(copy)
            if len(copies) == self.branches:
                break
        builder = TreeBuilder(tokens[-1])
        for i, copy in enumerate(copies):
            # those that are left share evenly what is left, the odd one to the latest
            until = len(builder) - (len(builder) - budget - 1) // (len(copies) - i)
            node = 0
            for token in copy:
                if len(builder) == until and (node, token) not in builder:
                    break
                node = builder.add(node, token)
        return builder.build()[0]

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        if self.adapt:
            for outcome in outcomes:
                if len(outcome.tree) > 1:
                    length = 2 * (len(outcome.path) - 1) + 1
                    outcome.sequence.draft_state.length = min(length, 10 * self.k)
