"""Arrivals have the distribution they are named after, and come from the seed alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hasten.bench.serving.arrivals import Arrivals, Spike

COUNT = 20_000


def gaps(process: Arrivals, rate: float = 4.0, seed: int = 1) -> np.ndarray:
    times = process.times(COUNT, rate, seed)
    assert times[0] == 0
    found = np.diff(times)
    assert (found >= 0).all()
    return found


def test_poisson_gaps_are_exponential() -> None:
    sample = np.sort(gaps(Arrivals()))
    exact = 1 - np.exp(-4 * sample)
    steps = np.arange(1, len(sample) + 1) / len(sample)
    distance = np.abs(steps - exact).max()
    assert distance < 1.95 / math.sqrt(COUNT)  # Kolmogorov-Smirnov at 0.1 %
    # counts in windows are Poisson: variance equals mean, which equal gaps would not give
    counts = np.bincount(
        np.cumsum(sample[np.random.default_rng(0).permutation(len(sample))]).astype(int)
    )[:-1]
    assert 0.9 < counts.var() / counts.mean() < 1.1


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0, 4.0])
def test_gamma_gaps_have_the_mean_and_variation(cv: float) -> None:
    sample = gaps(Arrivals("gamma", cv))
    assert sample.mean() == pytest.approx(1 / 4, rel=6 * cv / math.sqrt(COUNT))
    assert sample.std() / sample.mean() == pytest.approx(cv, rel=0.12)


def test_constant_gaps_are_equal() -> None:
    assert np.allclose(gaps(Arrivals("constant")), 0.25)


def test_a_seed_is_one_pattern_and_a_rate_stretches_it() -> None:
    process = Arrivals("gamma", 2.0)
    slow, fast = process.times(100, 1.0, 7), process.times(100, 8.0, 7)
    assert slow == process.times(100, 1.0, 7) != process.times(100, 1.0, 8)
    assert np.allclose(np.array(slow) / 8, fast)
    assert np.allclose(process.times(50, 1.0, 7), slow[:50])


def test_a_spike_multiplies_the_rate_for_its_time_only() -> None:
    spike = Spike.parse("5:10@30")
    assert spike == Spike(5.0, 10.0, 30.0)
    times = np.array(Arrivals("poisson", spike=spike).times(20_000, 50.0, 3))
    assert (np.diff(times) >= 0).all()

    def rate(start: float, end: float) -> float:
        return float(((times >= start) & (times < end)).sum() / (end - start))

    assert rate(0, 30) == pytest.approx(50, rel=0.1)
    assert rate(30, 40) == pytest.approx(250, rel=0.1)
    assert rate(40, 100) == pytest.approx(50, rel=0.1)


@pytest.mark.parametrize("text", ["", "5", "0:3@1", "5:0@1", "5:10", "-1:2@3", "a:b@c", "5:10@"])
def test_a_bad_spike_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a spike"):
        Spike.parse(text)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="no arrival process"):
        Arrivals("nope")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cv"):
        Arrivals("gamma", 0.0)
    with pytest.raises(ValueError, match="cv"):
        Arrivals("poisson", 2.0)
    for rate in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="rate"):
            Arrivals().times(3, rate, 0)
