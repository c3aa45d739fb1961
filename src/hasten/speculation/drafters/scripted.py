"""Candidates without a meaning, to measure what drafts of a given quality would bring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.methods import method
from hasten.speculation.base import Draftable, DraftContext, StatelessDrafting
from hasten.speculation.tree import TokenTree


@method(
    "scripted",
    slot="draft",
    exact="bitwise",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens", "only-measures"),
)
@dataclass(frozen=True)
class ScriptedDraft(StatelessDrafting):
    """``width`` chains of ``k`` candidates each, for ``verify=scripted`` on models of any weights.

    Costs next to nothing and says nothing about the text; with the verifier of the same name it
    gives the speed of kernels, batches and schedules at a chosen acceptance, apart from any
    drafter's quality.
    """

    k: int = 4
    width: int = 1

    def __post_init__(self) -> None:
        if self.k < 1 or self.width < 1:
            raise ValueError(f"k={self.k}, width={self.width}: need at least 1 of both")

    def start(self, context: DraftContext) -> ScriptedDraft:
        context.check_fits(self.k * self.width)
        return self

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        return [self._tree(s.tokens[-1], b) for s, b in zip(sequences, budgets, strict=True)]

    def _tree(self, root: int, budget: int) -> TokenTree:
        """As much of the tree as the budget allows, level by level. Tokens are small ids, which
        every vocabulary has; siblings differ."""
        count = min(self.k * self.width, budget)
        token = [root, *(place % self.width for place in range(count))]
        parent = [-1, *(max(0, place - self.width + 1) for place in range(count))]
        return TokenTree(token, parent)
