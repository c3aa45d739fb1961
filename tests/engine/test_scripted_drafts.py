"""Drafts whose quality is known: what they must change (the number of passes) and must not."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from hasten.decoding.params import SamplingParams
from hasten.models.base import Decoder
from tests.engine.world import World

COUNT = 40


def passes(model: Decoder, kind: str, requests: int = 6, **params: object) -> list[float]:
    """Tokens per pass of each request, all of them checked against their solo runs."""
    world = World(model, drafts=kind, blocks=200, budget=256)
    rng = random.Random(kind)
    for seed in range(requests):
        prompt = [rng.randrange(2, 61) for _ in range(rng.randint(1, 40))]
        settings = SamplingParams(
            max_tokens=COUNT,
            ignore_eos=True,
            seed=seed,
            logprobs=2,
            **params,  # type: ignore[arg-type]
        )
        world.add(prompt, settings)
    world.drain()
    assert world.checked == requests
    figures = [s.figures for r in world.requests.values() for s in r.sequences]
    return [COUNT / f.speculation.passes for f in figures]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_that_are_always_right(tiny: Callable[..., Decoder], temperature: float) -> None:
    """Every pass yields its whole chain and one token more: 40 tokens in ceil(40 / 17) passes."""
    assert set(passes(tiny("llama"), "right", temperature=temperature)) == {COUNT / 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_that_are_always_wrong(tiny: Callable[..., Decoder], temperature: float) -> None:
    assert set(passes(tiny("llama"), "wrong", temperature=temperature)) == {1.0}


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["random", "branching"])
def test_drafts_that_are_sometimes_right(
    tiny: Callable[..., Decoder], kind: str, architecture: str
) -> None:
    changes = {"sliding_window": 20} if architecture == "mistral" else {}
    per_pass = passes(tiny(architecture, **changes), kind, temperature=0.0)
    assert all(1.0 <= tau <= 17.0 for tau in per_pass)
    if kind == "branching":
        assert max(per_pass) > 1.2, "true paths were hidden among the branches"
