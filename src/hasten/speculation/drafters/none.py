"""No drafts: plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.methods import method
from hasten.speculation.base import Draftable
from hasten.speculation.tree import TokenTree


@method("none", slot="draft", exact="bitwise")
@dataclass(frozen=True)
class NoDraft:
    """Every tree is its root."""

    def open(self) -> None:
        return None

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        return [TokenTree.root(s.tokens[-1]) for s in sequences]

    def observe(self, sequence: Draftable, tree: TokenTree, path: list[int], y: int) -> None:
        pass

    def rollback(self, sequence: Draftable, length: int) -> None:
        pass
