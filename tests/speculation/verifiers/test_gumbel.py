"""Gumbel: the same bits with drafts and without. Its law: test_losslessness.py."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from hasten.decoding.params import SamplingParams
from hasten.decoding.sampling import Sampler
from hasten.models.base import Decoder
from hasten.speculation.tree import TokenTree
from hasten.speculation.verifiers.gumbel import race
from tests.engine.world import World, params_of, prompt_of


@pytest.mark.parametrize("kind", ["right", "branching", "mixed"])
def test_drafts_change_no_bit(tiny: Callable[..., Decoder], kind: str) -> None:
    """Each text is held against the one that its request gives alone, without drafts."""
    world = World(tiny("llama"), drafts=kind, choices="verify=gumbel", blocks=24)
    rng = random.Random(kind)
    for _ in range(24):
        world.add(prompt_of(rng, 61, rng.randint(1, 20)), params_of(rng, 61))
    world.drain()
    assert world.checked >= 24 and world.engine.stats.speculation.accepted > 10


def test_another_text_than_sample_match_gives(tiny: Callable[..., Decoder]) -> None:
    params = SamplingParams(max_tokens=30, temperature=1, seed=1, ignore_eos=True)
    worlds = [World(tiny("llama"), choices=c, blocks=24) for c in ("", "verify=gumbel")]
    ids = [world.add([3, 4], params) for world in worlds]
    texts = [world.drafter.truth[i][0][0] for world, i in zip(worlds, ids, strict=True)]
    assert texts[0] != texts[1]


def test_shared_noise_agrees_as_often_as_it_should() -> None:
    """P(same winner) = sum over x of 1 / sum over y of max(p_y / p_x, q_y / q_x)."""
    p, q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.1, 0.3, 0.2, 0.4])
    exact = (1 / np.maximum(p[:, None] / p, q[:, None] / q).sum(0)).sum()
    assert exact == pytest.approx(0.484, abs=5e-4)
    sampler = Sampler(SamplingParams(temperature=1).resolved({}), [0], frozenset(), 5, 0)
    winners, agreed, count = np.zeros(4), 0, 4000
    for position in range(count):
        noise = sampler.gumbel(position, 4)
        drafted = int((np.log(q) + noise).argmax())
        walk = SimpleNamespace(law=lambda _: p, noise=lambda noise=noise: noise)
        token, child = race(TokenTree([0, drafted], [-1, 0]), walk, 0, [1])  # type: ignore[arg-type]
        assert (child == 1) == (token == drafted)
        winners[token] += 1
        agreed += child is not None
    assert abs(agreed / count - exact) < 0.03
    assert np.abs(winners / count - p).max() < 0.03


def test_what_cannot_be_chosen_never_wins() -> None:
    walk = SimpleNamespace(law=lambda _: np.array([0.0, 1.0]), noise=lambda: np.array([700.0, 0.0]))
    assert race(TokenTree.root(0), walk, 0, []) == (1, None)  # type: ignore[arg-type]
