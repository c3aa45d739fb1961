"""Fallback: the second drafter where the first is silent."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hasten.decoding.params import SamplingParams
from hasten.methods import MethodError
from hasten.models.base import Decoder
from hasten.speculation.base import Outcome
from hasten.speculation.drafters.fallback import Fallback
from hasten.stack import Stack
from tests.engine.world import World
from tests.speculation.drafters.parts import Said, context


def test_the_second_is_asked_where_the_first_is_silent() -> None:
    first, then = Said({1: [[7, 8]]}), Said({1: [[5]], 2: [[6, 9], [4]]})
    drafting = Fallback(first, then).start(context())
    seqs: list[Any] = [SimpleNamespace(tokens=[root], draft_state=None) for root in (1, 2, 3, 2)]
    for s in seqs:
        s.draft_state = drafting.open(s)
    trees = drafting.propose(seqs, [4, 4, 4, 0])
    assert [t.token for t in trees] == [[1, 7, 8], [2, 6, 4, 9], [3], [2]]
    assert [t.source[1:] for t in trees] == [[1, 1], [2, 2, 2], [], []]
    assert len(drafting.sources) == 2
    assert then.log[-1] == ("propose", [2, 3], [4, 4])

    logits = [np.arange(len(t) * 3, dtype=np.float32).reshape(-1, 3) for t in trees]
    outcomes = [
        Outcome(seqs[0], 0, trees[0], [0, 1, 2], [7, 8, 3], logits[0]),
        Outcome(seqs[1], 0, trees[1], [0, 2], [4, 3], logits[1]),
    ]
    drafting.observe(outcomes)
    (a, b), (c, d) = first.seen, then.seen
    assert (a.tree.token, a.path) == ([1, 7, 8], [0, 1, 2]) and a.logits is logits[0]
    assert (b.tree.token, b.path, b.tokens) == ([2], [0], [4, 3])
    assert (c.tree.token, c.path) == ([1], [0]) and (c.logits == logits[0][:1]).all()
    assert (d.tree.token, d.path) == ([2, 6, 4, 9], [0, 2])


def test_bad_parts() -> None:
    for text, words in (
        ("fallback(first=none)", "none proposes nothing"),
        ("fallback(first=copyspec,then=copyspec(gamma=3))", "copyspec is named twice"),
        ("fallback(then=sample-match)", "fills the slot 'verify'"),
    ):
        with pytest.raises(MethodError, match=words):
            Stack.parse(f"draft={text}")


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_under_load(tiny: Callable[..., Decoder], temperature: float) -> None:
    choices = "draft=fallback(first=copyspec(gamma=2),then=prompt-lookup(max_ngram=1))"
    world = World(tiny("llama"), drafts=None, choices=choices, blocks=9)
    rng = random.Random(3)
    for seed in range(8):
        prompt = [rng.randrange(2, 61) for _ in range(9)] * 2
        world.add(
            prompt,
            SamplingParams(max_tokens=30, seed=seed, temperature=temperature, n=1 + seed % 2),
        )
    world.drain()
    by = world.engine.stats.speculation.proposed_by
    assert world.checked >= 8 and by[1] and by[2] and by.keys() == {1, 2}
