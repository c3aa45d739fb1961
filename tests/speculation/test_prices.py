"""What candidates and rounds of drafting cost, against formulas."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from hasten.speculation.base import ControlContext, Load, StepReport
from hasten.speculation.prices import FADING, Prices

LOAD = Load(decoding=4, rows_taken=4, rows_left=100, context=400)


def prices() -> Prices:
    context = ControlContext(
        draft=SimpleNamespace(),
        drafting=lambda: None,  # type: ignore[arg-type,return-value]
        max_batch_tokens=256,
        time_step=lambda rows, context: 1e-2 + 1e-3 * rows,
    )
    return Prices(context, 2)


def report(rows: int, seconds: float) -> StepReport:
    return StepReport(LOAD, rows, rows - LOAD.decoding, 0.0, seconds, 0.0, seconds, [])


def learn(found: Prices, drafter: int, rounds: int) -> None:
    """Rounds that take 2 ms, 1 ms a depth, 0.1 ms a sequence and 50 us an unread token."""
    rng = random.Random(drafter)
    for step in range(1, rounds + 1):
        deepest, sequences, unread = rng.randrange(1, 9), rng.randrange(1, 5), rng.randrange(300)
        seconds = 2e-3 + 1e-3 * deepest + 1e-4 * sequences + 5e-5 * unread
        found.observe_round(drafter, deepest, sequences, unread, seconds, step)
    found.refresh()


def test_candidates_cost_what_their_rows_do() -> None:
    found = prices()
    found.refresh()
    assert found.plain(LOAD) == pytest.approx(1.4e-2)
    assert found.extra(LOAD, 0) == 0
    assert found.extra(LOAD, 8) == pytest.approx(8e-3)
    assert found.extra(LOAD, 2.5) == pytest.approx(2.5e-3)


def test_all_prices_follow_the_machine() -> None:
    found = prices()
    learn(found, 1, 400)
    rounds, drafts = found.rounds[1].depth, found.extra(LOAD, 8)
    for _ in range(200):
        found.observe(report(rows=4, seconds=2.8e-2))  # twice the time of the look
    found.refresh()
    assert found.plain(LOAD) == pytest.approx(2.8e-2, rel=0.02)
    assert found.extra(LOAD, 8) == pytest.approx(2 * drafts, rel=0.15)
    assert found.rounds[1].depth == pytest.approx(2 * rounds, rel=0.15)


def test_no_row_makes_a_pass_faster() -> None:
    found = prices()
    for _ in range(400):
        found.observe(report(rows=4, seconds=1.4e-2))
        found.observe(report(rows=6, seconds=1.2e-2))
    found.refresh()
    assert found.extra(LOAD, 2) == 0


def test_terms_of_a_round_are_told_apart() -> None:
    found = prices()
    learn(found, 1, 400)
    price = found.rounds[1]
    assert price.depth == pytest.approx(1e-3, rel=0.05)
    assert price.reading == pytest.approx(5e-5, rel=0.05)
    assert price.round + 2 * price.sequence == pytest.approx(2.2e-3, rel=0.15)
    assert found.rounds[0] == (0, 0, 0, 0)  # nobody asked it


def test_what_a_round_takes_is_known_at_once() -> None:
    """Until a refresh, a batch would go on to draft for nothing, as it seems."""
    found = prices()
    for step in (1, 2):
        found.observe_round(0, 1, 1, 3000, 0.2, step)
    assert found.lone(0, 1, 3000, step=2) == pytest.approx(0.2, rel=0.05)


def test_what_was_learned_long_ago_counts_for_little() -> None:
    found = prices()
    for step in range(1, 7):
        found.observe_round(0, 4, 1, 0, 0.15, step)  # a bad moment
    step = 7 + int(FADING)
    found.observe_round(0, 4, 1, 0, 1.5e-3, step)
    assert found.lone(0, 4, 0, step) == pytest.approx(1.5e-3, rel=0.1)


def test_the_first_round_counts_for_nothing() -> None:
    found = prices()
    found.observe_round(0, 4, 1, 100, 10.0, 1)
    found.refresh()
    assert found.rounds[0] == (0, 0, 0, 0)
    assert found.rounds_seen(0) == 0


def test_an_old_price_is_believed_less() -> None:
    found = prices()
    learn(found, 0, 400)
    now = found.lone(0, 4, 100, step=400)
    assert now == pytest.approx(2e-3 + 4e-3 + 1e-4 + 5e-3, rel=0.1)
    assert found.lone(0, 4, 100, step=400 + int(FADING)) == pytest.approx(now / 2)
