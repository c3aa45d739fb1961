"""No drafts: every tree is the pending token."""

from __future__ import annotations

from types import SimpleNamespace

from hasten.speculation.drafters.none import NoDraft
from hasten.speculation.tree import TokenTree


def test_trees_are_roots() -> None:
    drafter = NoDraft()
    sequences = [SimpleNamespace(tokens=list(range(n)), draft_state=None) for n in (1, 5)]
    assert drafter.propose(sequences, [9, 0]) == [TokenTree.root(0), TokenTree.root(4)]
    assert drafter.propose([], []) == []
