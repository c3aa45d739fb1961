"""Every filter, penalty and ban against slow code that says the same in the obvious way."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hasten.decoding.params import SamplingParams
from hasten.decoding.sampling import (
    Distribution,
    NoTokenLeft,
    Sampler,
    descending,
    distribution,
    draw,
    top_logprobs,
    uniform,
)
from tests.decoding.chi_square import chi2

CHI2_ALPHA = 1e-4 / 8  # eight tests of this kind below, Bonferroni; the draws are seeded anyway

values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.0, -2.5, -math.inf]),
    st.floats(-30, 30, width=32),
)
rows = st.lists(values, min_size=1, max_size=23).map(lambda x: np.array(x, np.float32))
finite_rows = rows.filter(lambda row: np.isfinite(row).any())


def resolved(**changes: Any) -> SamplingParams:
    return SamplingParams(**changes).resolved({})


# ---- order ----------------------------------------------------------------------------------


@given(st.lists(st.one_of(values, st.sampled_from([math.inf, math.nan])), max_size=23))
def test_total_order(row: list[float]) -> None:
    row32 = np.array(row, np.float32)

    def key(i: int) -> tuple[float, int]:
        value = float(row32[i])
        return (math.inf if math.isnan(value) else -value, i)

    before = row32.tobytes()
    assert descending(row32).tolist() == sorted(range(len(row)), key=key)
    assert row32.tobytes() == before


def test_total_order_of_a_large_row() -> None:
    row = np.random.default_rng(0).normal(size=5003).astype(np.float32).round(1)
    expected = sorted(range(len(row)), key=lambda i: (-float(row[i]), i))
    assert descending(row).tolist() == expected


# ---- filters --------------------------------------------------------------------------------


def slow_distribution(row: Sequence[float], p: SamplingParams) -> tuple[dict[int, float], float]:
    """Probabilities by id in the total order, and how near a decision was to the other side."""
    assert p.temperature
    left = [i for i in range(len(row)) if row[i] > -math.inf]
    left.sort(key=lambda i: (-row[i], i))
    if p.top_k:
        left = left[: p.top_k]
    weights = [math.exp((row[i] - row[left[0]]) / p.temperature) for i in left]
    margin = math.inf

    def shares() -> list[float]:
        return [w / math.fsum(weights) for w in weights]

    if p.top_p is not None and p.top_p < 1:
        total, keep = 0.0, 0
        for share in shares():
            if keep and total >= p.top_p:
                break
            total, keep = total + share, keep + 1
            margin = min(margin, abs(total - p.top_p))
        left, weights = left[:keep], weights[:keep]
    if p.min_p:
        floor = p.min_p * weights[0]
        margin = min(margin, *(abs(w - floor) for w in weights))
        left = [i for i, w in zip(left, weights, strict=True) if w >= floor]
        weights = [w for w in weights if w >= floor]
    if p.typical_p is not None and p.typical_p < 1:
        probs = shares()
        surprise = [-math.log(max(q, 1e-300)) for q in probs]
        entropy = math.fsum(q * s for q, s in zip(probs, surprise, strict=True))
        away = [abs(s - entropy) for s in surprise]
        order = sorted(range(len(left)), key=lambda j: (away[j], j))
        for a, b in itertools.pairwise(order):
            if probs[a] != probs[b]:
                margin = min(margin, abs(away[a] - away[b]))
        total, chosen = 0.0, []
        for j in order:
            if chosen and total >= p.typical_p:
                break
            chosen.append(j)
            total += probs[j]
            margin = min(margin, abs(total - p.typical_p))
        chosen.sort()
        left, weights = [left[j] for j in chosen], [weights[j] for j in chosen]
    return dict(zip(left, shares(), strict=True)), margin


shares_ = st.floats(0.01, 1)
settings_ = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.05, 0.7, 1.0, 3.0])},
    optional={
        "top_k": st.integers(0, 25),
        "top_p": shares_,
        "min_p": st.floats(0, 1),
        "typical_p": shares_,
    },
)


@given(finite_rows, settings_)
def test_filters(row: NDArray[np.float32], changes: dict[str, Any]) -> None:
    params = resolved(**changes)
    expected, margin = slow_distribution([float(x) for x in row], params)
    if margin < 1e-9:
        return  # rounding may fall to either side
    got = distribution(row, params)
    assert got.ids.tolist() == list(expected)
    assert np.allclose(got.probs, list(expected.values()), rtol=1e-9, atol=1e-15)
    assert abs(got.probs.sum() - 1) < 1e-12
    dense = got.dense(len(row))
    assert dense[got.ids].tolist() == got.probs.tolist() and np.count_nonzero(dense) <= len(got.ids)


def test_filters_at_their_edges() -> None:
    row = np.log(np.array([0.125, 0.5, 0.125, 0.25], np.float32))
    for changes, ids in [
        ({}, [1, 3, 0, 2]),
        ({"top_k": 3}, [1, 3, 0]),  # the tie goes to the lower id
        ({"top_p": 0.5001}, [1, 3]),
        ({"top_p": 0.01}, [1]),
        ({"min_p": 0.49}, [1, 3]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 2, "top_p": 0.66}, [1]),  # 0.5 of 0.75 left: the share is of what is left
        ({"top_k": 2, "top_p": 0.67}, [1, 3]),
        ({"typical_p": 0.2}, [3]),  # entropy 1.75 bit; the token of 2 bit is the most typical
        ({"typical_p": 0.3}, [1, 3]),
    ]:
        assert distribution(row, resolved(**changes)).ids.tolist() == ids, changes


@pytest.mark.parametrize("temperature", [1e-320, 1e-12])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    row = np.array([0.5, 3.0, -1.0, 3.0, -math.inf], np.float32)
    got = distribution(row, resolved(temperature=temperature))
    assert got.dense(5).tolist() == [0, 0.5, 0, 0.5, 0]


# ---- draws ----------------------------------------------------------------------------------


def test_quantiles() -> None:
    law = Distribution(np.array([7, 2, 5]), np.array([0.5, 0.25, 0.25]))
    for u, token in [(0, 7), (0.4999, 7), (0.5, 2), (0.7499, 2), (0.75, 5), (1 - 2**-53, 5)]:
        assert law.draw(u) == token


def sorted_draw(row: NDArray[np.float32], p: SamplingParams, u: float) -> int:
    """The token at quantile u by a sort of everything, in float64."""
    assert p.temperature
    ids = np.lexsort((np.arange(len(row)), -row.astype(np.float64)))
    ids = ids[: p.top_k or len(row)]
    ids = ids[row[ids] > -np.inf]
    z = row[ids].astype(np.float64)
    weights = np.exp((z - z[0]) / p.temperature)
    if p.top_p is not None and p.top_p < 1:
        shares = np.cumsum(weights) / weights.sum()
        keep = int(np.sum(shares < p.top_p)) + 1
        ids, weights = ids[:keep], weights[:keep]
    if p.min_p:
        kept = weights >= p.min_p
        ids, weights = ids[kept], weights[kept]
    shares = np.cumsum(weights) / weights.sum()
    return int(ids[min(int(np.sum(shares <= u)), len(ids) - 1)])


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.0},
        {"temperature": 3.0},  # far beyond the few that are looked at first
        {"temperature": 0.2},
        {"top_k": 40},
        {"top_k": 3000, "top_p": 0.9},
        {"top_p": 0.6},
        {"top_p": 0.97, "temperature": 2.0},
        {"top_p": 0.9, "min_p": 0.01},
        {"min_p": 1e-4},
        {"min_p": 1e-9, "temperature": 1.5},
    ],
)
@pytest.mark.parametrize("ties", [False, True])
def test_a_draw_without_a_sort_gives_the_token_of_the_sort(
    changes: dict[str, Any], ties: bool
) -> None:
    rng = np.random.default_rng()
    params = resolved(**{"temperature": 1.0, **changes})
    for _ in range(3):
        row = (rng.normal(size=20_011) * 2).astype(np.float32)
        row[rng.integers(0, len(row), 50)] = -np.inf
        if ties:
            row = row.round()
        law = distribution(row, params)
        for u in [0.0, *rng.random(20)]:
            token = draw(row, params, u)
            assert token == law.draw(u) == sorted_draw(row, params, u), u
        last = 1 - 2**-53  # the rounding of sums decides here
        assert draw(row, params, last) == law.draw(last)


def test_a_tail_of_banned_tokens_is_never_drawn() -> None:
    row = np.full(5000, -np.inf, np.float32)
    row[[7, 4000]] = [1.0, 0.0]
    for u in (0.0, 0.5, 0.999, 1 - 2**-53):
        assert draw(row, resolved(temperature=1.0), u) in (7, 4000)
    row[5:2000] = -650.0  # possible, and too small to add anything
    assert draw(row, resolved(temperature=1.0), 1 - 2**-53) == 4000


def test_uniform_belongs_to_its_place() -> None:
    places = [(s, t, p) for s in (0, 1, 2**63) for t in range(4) for p in range(50)]
    draws = [uniform(*place) for place in places]
    assert len(set(draws)) == len(draws) and all(0 <= u < 1 for u in draws)
    assert draws == [uniform(*place) for place in places]
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)
    assert uniform(0, 0, 0) == 0.156742553465558, "a seed must give the same text for ever"


@pytest.mark.parametrize(
    ("seeds", "streams", "positions"), [(300, 1, 40), (3, 80, 50), (12000, 1, 1)]
)
def test_uniform_is_uniform_along_every_axis(seeds: int, streams: int, positions: int) -> None:
    draws = np.array(
        [uniform(a, b, c) for a in range(seeds) for b in range(streams) for c in range(positions)]
    )
    counts = np.histogram(draws, 64, (0, 1))[0]
    assert chi2(counts, np.full(64, 1 / 64)) > CHI2_ALPHA
    following = np.corrcoef(draws[:-1], draws[1:])[0, 1]
    assert abs(following) < 5 / math.sqrt(len(draws))


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.6},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.0, "typical_p": 0.7},
    ],
)
def test_draws_follow_the_exact_law(changes: dict[str, Any]) -> None:
    row = np.random.default_rng(8).normal(0, 1.5, 17).astype(np.float32)
    expected, margin = slow_distribution([float(x) for x in row], resolved(**changes))
    assert margin > 1e-6
    probs = np.array([expected.get(i, 0.0) for i in range(17)])
    sampler = Sampler(resolved(**changes), [1], frozenset(), seed=11, stream=2)
    counts = np.bincount([sampler.choose(row, t) for t in range(12_000)], minlength=17)
    assert chi2(counts, probs) > CHI2_ALPHA
    biased = np.where(probs > 0, 0.85 * probs, 0)
    biased[int(np.argmax(probs))] += 0.15
    assert chi2(counts, biased) < CHI2_ALPHA, "the test would not notice a bias"


# ---- processors -----------------------------------------------------------------------------


def slow_process(
    row: Sequence[float], p: SamplingParams, prompt: list[int], output: list[int], eos: set[int],
    bad_words: Sequence[Sequence[int]],
) -> list[float]:  # fmt: skip
    """Bias, penalties and bans, token by token."""
    out = []
    text = prompt + output
    for token, logit in enumerate(row):
        logit += p.logit_bias.get(token, 0.0)
        if token in text:
            factor = p.repetition_penalty or 1.0
            logit = logit / factor if logit > 0 else logit * factor
        logit -= p.frequency_penalty * output.count(token)
        logit -= p.presence_penalty * (token in output)
        banned = p.allowed_token_ids is not None and token not in p.allowed_token_ids
        for word in bad_words:
            longer = [*text, token]
            banned |= len(longer) >= len(word) and longer[-len(word) :] == list(word)
        early = len(output) < p.min_tokens
        banned |= early and (token in eos or token in p.stop_token_ids)
        out.append(-math.inf if banned else logit)
    return out


tokens_ = st.lists(st.integers(0, 8), max_size=6)
processors = st.fixed_dictionaries(
    {},
    optional={
        "logit_bias": st.dictionaries(st.integers(0, 8), st.floats(-50, 50), max_size=4),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3, 7.0]),
        "presence_penalty": st.floats(-3, 3),
        "frequency_penalty": st.floats(-3, 3),
        "allowed_token_ids": st.lists(st.integers(0, 8), min_size=1, max_size=7),
        "min_tokens": st.integers(0, 4),
        "stop_token_ids": st.lists(st.integers(0, 8), max_size=2),
    },
)


@given(
    st.lists(st.floats(-9, 9, width=32), min_size=9, max_size=9),
    processors,
    tokens_.filter(bool),
    tokens_,
    st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=3), max_size=3),
    st.sets(st.integers(0, 8), max_size=2),
)
def test_processors(
    row: list[float], changes: dict[str, Any], prompt: list[int], output: list[int],
    bad_words: list[list[int]], eos: set[int],
) -> None:  # fmt: skip
    params = resolved(temperature=0, **changes)
    sampler = Sampler(params, prompt, frozenset(eos), 0, 0, bad_words)
    for token in output:
        sampler.push(token)
    logits = np.array(row, np.float32)
    before = logits.tobytes()
    expected = slow_process(row, params, prompt, output, eos, bad_words)
    if max(expected) == -math.inf:
        with pytest.raises(NoTokenLeft, match="ban the whole vocabulary"):
            sampler.choose(logits, 5)
        return
    got = sampler.process(logits)
    assert logits.tobytes() == before
    assert np.allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert (np.isneginf(got) == np.isneginf(expected)).all()
    assert sampler.choose(logits, 5) == int(np.argmax(got))
    if sampler.plain:
        assert got.tobytes() == before
    sampled = Sampler(resolved(temperature=1.0, **changes), prompt, frozenset(eos), 0, 0, bad_words)
    for token in output:
        sampled.push(token)
    assert expected[sampled.choose(logits, 5)] > -math.inf


def test_bad_words_cross_from_the_prompt_into_the_output() -> None:
    logits = np.zeros(9, np.float32)
    sampler = Sampler(resolved(), [1, 2], frozenset(), 0, 0, [[1, 2, 3], [2, 3, 4], [8, 1, 2, 5]])
    assert np.flatnonzero(np.isneginf(sampler.process(logits))).tolist() == [3]
    sampler.push(3)
    assert np.flatnonzero(np.isneginf(sampler.process(logits))).tolist() == [4]
    sampler.push(7)
    assert np.isfinite(sampler.process(logits)).all()


def test_penalties_see_the_output_grow() -> None:
    sampler = Sampler(resolved(frequency_penalty=1.0, temperature=0), [2], frozenset(), 0, 0)
    logits = np.array([3.0, 2.5, 2.2], np.float32)
    out = []
    for position in range(6):
        out.append(sampler.choose(logits, position))
        sampler.push(out[-1])
    assert out == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"min_tokens": 4},
        {"repetition_penalty": 1.5, "presence_penalty": 0.3, "frequency_penalty": 0.4},
        {"logit_bias": {3: 2.0}, "temperature": 0},
    ],
)
def test_looking_ahead_is_pushing_on_a_copy(changes: dict[str, Any]) -> None:
    logits = np.random.default_rng(3).normal(0, 2, 9).astype(np.float32)

    def sampler(output: list[int]) -> Sampler:
        params = resolved(**{"temperature": 0.8, **changes})
        made = Sampler(params, [7, 7, 4], frozenset({0}), 0, 0, [[4, 5], [5, 3, 6]])
        for token in output:
            made.process(logits)  # what it remembers of the prompt is made by the first look
            made.push(token)
        return made

    output, ahead = [1, 2], [5, 3, 3]
    now = sampler(output)
    before = now.law(logits)
    for count in range(4):
        expected = sampler(output + ahead[:count]).law(logits)
        with now.after(ahead[:count]) as later:
            assert np.array_equal(later.law(logits), expected)
    assert np.array_equal(now.law(logits), before), "the sampler itself stays where it is"


def test_plain_is_only_the_bare_argmax() -> None:
    def sampler(**changes: Any) -> Sampler:
        return Sampler(resolved(**{"temperature": 0, **changes}), [1], frozenset(), 0, 0)

    assert sampler().plain and sampler(top_k=3, top_p=0.5).plain
    for changes in (
        {"temperature": 0.5},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"logit_bias": {1: 1.0}},
        {"allowed_token_ids": [1, 2]},
    ):
        assert not sampler(**changes).plain, changes
    assert not Sampler(resolved(temperature=0), [1], frozenset(), 0, 0, [[3]]).plain
    early = sampler(min_tokens=2)
    seen = []
    for token in (5, 5, 5):
        seen.append(early.plain)
        early.push(token)
    assert seen == [False, False, True]


def test_ties_go_to_the_lowest_id() -> None:
    row = np.array([-0.0, 1.0, 0.5, 1.0], np.float32)
    assert Sampler(resolved(temperature=0), [1], frozenset(), 0, 0).choose(row, 0) == 1
    zeros = np.array([-1.0, -0.0, 0.0], np.float32)
    assert Sampler(resolved(temperature=0), [1], frozenset(), 0, 0).choose(zeros, 0) == 1
    assert descending(zeros).tolist() == [1, 2, 0]


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("bad", [[math.nan] * 3, [1.0, math.nan, 0.0], [-math.inf] * 3])
def test_logits_that_are_no_numbers(temperature: float, bad: list[float]) -> None:
    sampler = Sampler(resolved(temperature=temperature), [1], frozenset(), 0, 0)
    row = np.array(bad, np.float32)
    if temperature and 1.0 in bad:
        assert sampler.choose(row, 0) in (0, 2), "NaN is never drawn"
        return
    with pytest.raises(NoTokenLeft, match="the largest logit is"):
        sampler.choose(row, 0)


# ---- reports --------------------------------------------------------------------------------


@given(rows, st.integers(0, 25))
def test_top_logprobs(row: NDArray[np.float32], k: int) -> None:
    order = sorted(range(len(row)), key=lambda i: (-float(row[i]), i))[:k]
    got = top_logprobs(row, 1.5, k)
    assert [i for i, _ in got] == order
    assert [v for _, v in got] == [float(row[i] - np.float32(1.5)) for i in order]


def test_seeds_give_the_same_text_and_streams_differ() -> None:
    rng = random.Random(2)
    logits = [np.array([rng.gauss(0, 2) for _ in range(30)], np.float32) for _ in range(60)]

    def text(seed: int, stream: int) -> list[int]:
        sampler = Sampler(resolved(temperature=1.0), [1], frozenset(), seed, stream)
        return [sampler.choose(row, t) for t, row in enumerate(logits)]

    assert text(5, 0) == text(5, 0) != text(5, 1)
    assert text(5, 0) != text(6, 0)
