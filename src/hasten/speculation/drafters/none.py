"""No drafts: plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.methods import method
from hasten.speculation.base import Draftable, StatelessDrafting
from hasten.speculation.tree import TokenTree


@method("none", slot="draft", exact="bitwise")
@dataclass(frozen=True)
class NoDraft(StatelessDrafting):
    """Every tree is its root."""

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        return [TokenTree.root(s.tokens[-1]) for s in sequences]
