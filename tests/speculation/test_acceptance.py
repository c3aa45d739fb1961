"""What candidates are thought to be worth: priors of bounded weight, and forgetting."""

from __future__ import annotations

from hasten.speculation.acceptance import RUNGS, Curve, presence, worth


def curve(keep: float, proposals: int, budget: int, hits: int) -> Curve:
    found = Curve(keep)
    for _ in range(proposals):
        found.observe(budget, budget, list(range(1, hits + 1)))
    return found


def tokens(own: Curve, shared: Curve, most: int = 4) -> float:
    return sum(gain for _, gain, _ in worth(own, shared, most))


def test_the_first_candidate_is_worth_a_try() -> None:
    assert tokens(Curve(0.96), Curve(0.98), 1) > 0.5


def test_own_proposals_soon_outweigh_any_number_of_others() -> None:
    useless, perfect = curve(1.0, 10_000, 4, 0), curve(1.0, 10_000, 4, 4)
    assert tokens(Curve(0.96), useless) < 0.1 and tokens(Curve(0.96), perfect) > 3.5
    assert tokens(curve(0.96, 3, 4, 4), useless) > 1.5
    assert tokens(curve(0.96, 3, 4, 0), perfect) < 2.5


def test_whether_there_is_a_proposal_counts_apart() -> None:
    rare = curve(1.0, 50, 4, 4)
    for _ in range(50):
        rare.observe(4, 0, [])
    assert 0.45 < presence(rare, Curve(0.98)) < 0.55
    assert tokens(rare, Curve(0.98)) > 3.5
    assert presence(Curve(0.96), Curve(0.98)) == 1


def test_bad_luck_is_not_remembered_for_good() -> None:
    """A rung that failed is worth trying again once everything before it is accepted."""
    shared = Curve(0.98)
    own = curve(0.96, 30, 4, 2)
    before = {budget: gain for _, gain, budget in worth(own, shared, 4)}
    assert before[4] < 0.3
    for _ in range(20):
        own.observe(2, 2, [1, 2])
    after = {budget: gain for _, gain, budget in worth(own, shared, 4)}
    assert after[4] > 2 * before[4]


def test_steps_grow_and_never_gain_more_a_row() -> None:
    own = Curve(0.96)
    own.observe(8, 8, [2, 3, 5, 6, 7])  # a tree: the first candidate was wrong
    found = worth(own, Curve(0.98), RUNGS[-1])
    densities = [gain / rows for rows, gain, _ in found]
    assert densities == sorted(densities, reverse=True)
    assert [budget for _, _, budget in found] == sorted(budget for _, _, budget in found)
    assert sum(rows for rows, _, _ in found) <= RUNGS[-1]
