"""No drafts: every tree is the pending token."""

from __future__ import annotations

from types import SimpleNamespace

from hasten.speculation.drafters.none import NoDraft
from hasten.speculation.tree import TokenTree


def test_trees_are_roots() -> None:
    drafter = NoDraft()
    state = drafter.open()
    sequences = [SimpleNamespace(tokens=list(range(n)), draft_state=state) for n in (1, 5)]
    assert drafter.propose(sequences, [9, 0]) == [TokenTree.root(0), TokenTree.root(4)]
    drafter.observe(sequences[0], TokenTree.root(0), [0], 3)
    drafter.rollback(sequences[0], 1)
    assert drafter.propose([], []) == []
