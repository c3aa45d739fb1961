"""Step times: the look at an idle engine, and learning from steps."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from hasten.engine.engine import Engine, EngineConfig
from hasten.models.base import Decoder
from hasten.speculation.latency import CONTEXT, LOOK_SECONDS, LinearTimes, PassTimes
from hasten.stack import Stack


def jumpy(rows: float, reads: float = 0.0) -> float:
    """Flat up to 16 rows, a jump, then a price for each row; and one for each position."""
    return (1e-4 if rows <= 16 else 2e-4 + 1e-5 * (rows - 17)) + 1e-9 * reads


def test_the_look_finds_jumps_and_the_price_of_reads() -> None:
    times = PassTimes(512)
    times.look(lambda rows, context: jumpy(rows, rows * context))
    for rows in (1, 5, 16, 17, 32, 40, 100, 256):
        assert times.seconds(rows, rows * 100) == pytest.approx(jumpy(rows, rows * 100), rel=0.05)


def test_the_look_is_bounded() -> None:
    spent = [0.0, 0.0]

    def slow(rows: int, context: int) -> float:
        spent[context > CONTEXT] += 0.03 * rows
        return 0.03 * rows

    PassTimes(64).look(slow)
    first, per_read = 0.03, 6 * 0.03
    assert spent[0] <= LOOK_SECONDS + first + per_read
    assert spent[1] == pytest.approx(per_read)


def test_the_look_stops_at_the_engine_s_size() -> None:
    def small(rows: int, context: int) -> float:
        if rows > 8:
            raise ValueError("does not fit")
        return 1e-3 + 1e-6 * context

    times = PassTimes(64)
    times.look(small)
    assert times.per_read == pytest.approx(1e-6)
    assert times.seconds(64) == pytest.approx(1e-3 + 1e-6 * CONTEXT)


def test_the_price_of_reads_in_a_short_engine() -> None:
    def short(rows: int, context: int) -> float:
        if rows + context > 600:
            raise ValueError("does not fit")
        return 1e-3 + 1e-6 * context

    times = PassTimes(64)
    times.look(short)
    assert times.per_read == pytest.approx(1e-6)


@pytest.mark.parametrize("looked", [True, False])
def test_steps_teach(looked: bool) -> None:
    rng = random.Random(0)
    times = PassTimes(128)
    if looked:
        times.look(lambda rows, context: 1e-3)  # all wrong
    for _ in range(6000):
        rows = rng.randint(1, 64)
        seconds = jumpy(rows) * rng.uniform(0.97, 1.03)
        times.observe(rows, 0, seconds * (20 if rng.random() < 0.01 else 1))
    for rows in (1, 8, 17, 32, 64):
        assert times.seconds(rows) == pytest.approx(jumpy(rows), rel=0.2)


def test_an_interruption_hardly_counts() -> None:
    times = PassTimes(64)
    for _ in range(100):
        times.observe(4, 0, 1e-3)
    times.observe(4, 0, 1.0)
    assert times.seconds(4) < 1.1e-3


def test_a_lasting_change_is_followed() -> None:
    times = PassTimes(64)
    for seconds in (1e-3, 5e-3):
        for _ in range(300):
            times.observe(4, 0, seconds)
    assert times.seconds(4) == pytest.approx(5e-3, rel=0.1)


def test_a_slower_machine_is_slower_for_all_sizes() -> None:
    """Also for those that were not seen since: else candidates would seem cheap beside it."""
    rng = random.Random(1)
    times = PassTimes(64)
    times.look(lambda rows, context: jumpy(rows))
    for slow in (1.0, 1.6, 0.7):
        for _ in range(100):
            times.observe(16, 0, slow * jumpy(16) * rng.uniform(0.95, 1.05))
        for rows in (1, 17, 24, 32):
            assert times.seconds(rows) == pytest.approx(slow * jumpy(rows), rel=0.1)


def test_one_size_alone_may_change() -> None:
    """Among others that did not, it is not taken for the machine."""
    rng = random.Random(2)
    times = PassTimes(64)
    times.look(lambda rows, context: jumpy(rows))
    for _ in range(300):
        for rows in (16, 16, 16, 32):
            seconds = jumpy(rows) * (1.5 if rows == 32 else 1.0)
            times.observe(rows, 0, seconds * rng.uniform(0.97, 1.03))
    assert times.seconds(16) == pytest.approx(jumpy(16), rel=0.04)
    assert times.seconds(32) == pytest.approx(1.5 * jumpy(32), rel=0.04)
    assert times.seconds(8) == pytest.approx(jumpy(8), rel=0.3)  # never seen since


def test_nothing_is_known_before_the_first_step() -> None:
    times = PassTimes(64)
    assert not times.known and times.seconds(8) == 0
    times.observe(24, 0, 1e-3)
    assert times.known and times.seconds(1) == times.seconds(64) == 1e-3


def test_prices_of_sums() -> None:
    rng = random.Random(1)
    times = LinearTimes((1, 1, 1))
    for _ in range(500):
        terms = (1.0, rng.randint(1, 8), rng.randint(0, 40))
        true = 1e-4 * terms[0] + 5e-5 * terms[1] + 1e-6 * terms[2]
        times.observe(terms, true * rng.uniform(0.98, 1.02) * (9 if rng.random() < 0.01 else 1))
    assert times.seconds((1, 4, 10)) == pytest.approx(3.1e-4, rel=0.1)
    assert times.seconds((1, 8, 40)) == pytest.approx(5.4e-4, rel=0.1)


def test_terms_that_never_vary_do_no_harm() -> None:
    times = LinearTimes((1, 1, 1))
    for _ in range(20000):
        times.observe((1, 4, 0), 1e-4)
    assert times.seconds((1, 4, 0)) == pytest.approx(1e-4, rel=0.01)
    times.observe((1, 5, 3), 1.2e-4)
    assert 0 <= times.seconds((1, 5, 3)) < 1e-3


def test_no_price_is_negative_and_none_hides_another() -> None:
    """Deep rounds were slow once; shallow ones that are fast again say so of the depth's price."""
    times = LinearTimes((1, 8, 8, 64))
    for _ in range(5):
        times.observe((1, 16, 1, 0), 0.16)
    for _ in range(20):
        times.observe((1, 2, 1, 0), 2e-4)
        assert min(times.price) >= 0
    assert times.seconds((1, 2, 1, 0)) < 2e-3  # it was 2e-2 by the depth's price alone


def test_what_is_doubted_is_soon_corrected() -> None:
    sure, doubtful = LinearTimes((1, 1)), LinearTimes((1, 1))
    for times in (sure, doubtful):
        for _ in range(20):
            times.observe((1, 1), 1.0)
    doubtful.doubt()
    for times in (sure, doubtful):
        times.observe((1, 1), 0.1)
    assert doubtful.seconds((1, 1)) == pytest.approx(0.1, rel=0.05)
    assert sure.seconds((1, 1)) > 0.5


def test_an_engine_times_its_passes_and_leaves_no_trace(tiny: Callable[..., Decoder]) -> None:
    engine = Engine(tiny(), Stack.parse(), EngineConfig(max_sequences=2, max_batch_tokens=8))
    assert engine._time_step(1, 16) > 0
    with pytest.raises(ValueError, match="does not fit"):
        engine._time_step(8, 10**6)
    with pytest.raises(ValueError, match="9 rows"):
        engine._time_step(9, 0)
    engine.check_ledger()
    assert engine.cache.usage == 0
