"""Checks that every drafter with a draft model has to pass."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine, EngineConfig
from hasten.models.base import Decoder
from hasten.models.loading import load_model
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack
from tests.engine.world import World, params_of, prompt_of
from tests.speculation.examples import tiny_draft

VOCAB = 61


def watch(engine: Engine) -> list[tuple[Any, TokenTree, int]]:
    """Everything that is proposed from now on: (sequence, tree, budget)."""
    seen: list[tuple[Any, TokenTree, int]] = []
    propose = engine.drafting.propose

    def watched(sequences: Sequence[Any], budgets: Sequence[int]) -> list[TokenTree]:
        trees = propose(sequences, budgets)
        seen.extend(zip(sequences, trees, budgets, strict=True))
        return trees

    engine.drafting.propose = watched  # type: ignore[method-assign]
    return seen


def same_as_alone(target: Decoder, draft: str, seed: int, least: int = 50) -> World:
    """Random requests in a small pool: forks, penalties, stops, preemption, prefix hits."""
    rng = random.Random(seed)
    choices = f"draft={draft}"
    world = World(target, drafts=None, choices=choices, blocks=8)
    for _ in range(20):
        world.add(prompt_of(rng, VOCAB, rng.randint(1, 30)), params_of(rng, VOCAB))
    world.drain()
    seen = world.engine.stats.speculation
    assert world.checked >= 20 and seen.drafted > least
    assert seen.examined > seen.accepted > least // 5, "drafts are to be right and wrong"
    runtime = world.engine.drafting.runtime  # type: ignore[attr-defined]
    assert all(pool.num_held == 0 for pool in runtime.cache.pools), "draft pages leak"
    return world


def trees_of(
    folder: Path, draft: str, verify: str, *, temperature: float, budget: int, tokens: int = 40
) -> list[tuple[Any, TokenTree, int]]:
    """The trees for some requests to the tiny draft's own model as the target."""
    model = load_model(tiny_draft(folder), progress=False)
    stack = Stack.parse(f"draft={draft},verify={verify},control=fixed(k={budget})")
    engine = Engine(model, stack, EngineConfig(max_sequences=3))
    seen = watch(engine)
    params = SamplingParams(temperature=temperature, seed=4, max_tokens=tokens, ignore_eos=True)
    for n in (3, 20, 40):
        engine.add([5] * n + [n], params)
    while engine.has_work:
        engine.step()
    return seen


def check_trees(seen: list[tuple[Any, TokenTree, int]], *, drawn: bool) -> None:
    """Within budget; siblings differ unless drawn independently; laws are laws that could have
    given the children."""
    assert any(len(tree) > 2 for _, tree, _ in seen)
    for _, tree, budget in seen:
        assert len(tree) - 1 <= budget
        for node in range(len(tree)):
            children = tree.children(node)
            tokens = [tree.token[c] for c in children]
            if not tree.independent:
                assert len(set(tokens)) == len(tokens)
            if drawn and children:
                law = tree.law[node]
                assert abs(law.sum() - 1) < 1e-12 and (law >= 0).all()
                assert all(law[token] > 0 for token in tokens)
            else:
                assert node not in tree.law


def no_row_is_uninitialised(engine: Engine) -> None:
    """Poison all pages of the draft model: a row that reads what was not written gets NaN."""
    runtime = engine.drafting.runtime  # type: ignore[attr-defined]
    for group in (*runtime.runner.storage.k, *runtime.runner.storage.v):
        group.fill_(float("nan"))


def drive(engine: Engine, prompts: list[list[int]], tokens: int = 40) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    requests = [engine.add(prompt, params) for prompt in prompts]
    while engine.has_work:
        for delta in engine.step():
            assert delta.sequence.error is None, delta.sequence.error
    return [r.sequences[0].tokens[len(r.prompt) :] for r in requests]


def finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all())
