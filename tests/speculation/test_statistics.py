"""The one definition of draft figures, on walks that are counted by hand."""

from __future__ import annotations

from hasten.speculation.statistics import DraftStatistics
from hasten.speculation.tree import TokenTree

TREE = TokenTree([9, 1, 2, 3, 4], [-1, 0, 0, 1, 3], source=[0, 1, 2, 3, 2])
"""9 - 1 - 3 - 4, and 2 beside 1."""


def test_a_walk_to_the_end_and_one_that_misses() -> None:
    found = DraftStatistics()
    found.count(TREE, [0, 1, 3, 4], 4)  # all of the longest path, and a bonus token
    assert (found.tau, found.examined, found.accepted, found.drafted) == (4.0, 3, 3, 4)
    found.count(TREE, [0, 1], 2)  # 3 was judged and rejected, 4 never judged
    found.plain(1)
    assert (found.passes, found.tokens, found.drafts) == (3, 7, 2)
    assert (found.examined_at, found.accepted_at) == ([2, 2, 1], [2, 1, 1])
    assert found.by_depth == [1.0, 0.5, 1.0]
    assert found.alpha_examined == 4 / 5 and found.alpha_drafted == 4 / 8
    assert found.by_source(["a", "b"], accepted=False) == {"a": 4, "b": 6}
    assert found.by_source(["a", "b"], accepted=True) == {"a": 3, "b": 2}


def test_nothing_behind_an_end_was_judged() -> None:
    found = DraftStatistics()
    found.count(TREE, [0, 1], 1)  # the candidate's token ended the text
    assert (found.examined_at, found.accepted_at, found.tau) == ([1], [1], 1.0)


def test_sums_and_empty_counts() -> None:
    one, two = DraftStatistics(), DraftStatistics()
    one.count(TREE, [0, 1, 3, 4], 4)
    two.count(TREE, [0], 1)
    both = DraftStatistics()
    both.add(one)
    both.add(two)
    assert both.examined_at == [2, 1, 1] and both.tau == 2.5
    assert both.to_json(["a", "b"])["accepted_by"] == {"a": 2, "b": 2}
    empty = DraftStatistics().to_json()
    assert empty["tau"] is empty["alpha_examined"] is empty["alpha_drafted"] is None
    assert empty["by_depth"] == [] and "drafted_by" not in empty


def test_auxiliary_nodes_are_no_candidates() -> None:
    tree = TokenTree([9, 1, 5], [-1, 0, 1], auxiliary=frozenset({2}))
    found = DraftStatistics()
    found.count(tree, [0, 1], 2)
    assert (found.drafted, found.examined_at, found.accepted_at) == (1, [1], [1])
