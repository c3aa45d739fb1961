"""The draft model's runtime against plain passes, and chains of it in engines."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hasten.decoding.params import SamplingParams
from hasten.decoding.sampling import Sampler
from hasten.engine.engine import Engine, EngineConfig
from hasten.methods import MethodError
from hasten.models.base import Decoder
from hasten.speculation.base import Outcome
from hasten.speculation.draft_model import DraftModel
from hasten.speculation.tree import TreeBuilder
from hasten.stack import Stack
from tests.engine.world import World, params_of, prompt_of
from tests.speculation.examples import tiny_draft, tiny_target

Make = Callable[..., Decoder]


def context(model: Decoder, **changes: Any) -> Any:
    sizes = {
        "max_sequences": 4,
        "max_batch_tokens": 40,
        "max_length": 120,
        "hidden": False,
        "root_law": False,
    }
    sizes |= {"prefix_reuse": True, "cache": SimpleNamespace(num_blocks=40), "model": model}
    return SimpleNamespace(**{**sizes, **changes})


def sequence(tokens: list[int], params: SamplingParams | None = None) -> Any:
    params = params or SamplingParams(temperature=0.0)
    sampler = Sampler(params, tokens[:1], frozenset(), 0, 0)
    return SimpleNamespace(tokens=tokens, tenant="", sampler=sampler, draft_state=None)


def alone(model: Decoder, tokens: list[int]) -> np.ndarray:
    """Logits after the last token, from an engine of its own."""
    runtime = DraftModel(model, context(model), 8)
    state = runtime.open(sequence(list(tokens)))
    while True:
        ready, rows = runtime.begin([state])
        if ready:
            assert rows is not None
            return rows.logits[0].copy()


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_rows_of_a_growing_tree_are_those_of_plain_passes(tiny: Make, architecture: str) -> None:
    model = tiny(architecture)
    rng = random.Random(7)
    runtime = DraftModel(model, context(model), 24)
    sequences = [sequence([rng.randrange(61) for _ in range(n)]) for n in (1, 17, 33)]
    states = [runtime.open(s) for s in sequences]
    for _ in range(6):
        ready: list[int] = []
        while len(ready) < 3:  # the longest takes two calls to catch up at first
            ready, rows = runtime.begin(states)
        assert rows is not None
        for row, index in enumerate(ready):
            assert np.array_equal(rows.logits[row], alone(model, sequences[index].tokens))
        builders = [TreeBuilder(s.tokens[-1]) for s in sequences]
        for _ in range(rng.randint(1, 4)):
            counts = []
            for state, builder in zip(states, builders, strict=True):
                counts.append(rng.randint(1, 5))
                assert runtime.room(state, len(state.parent) - 1 + counts[-1])
                for _ in range(counts[-1]):
                    parent, token = rng.randrange(len(state.parent)), rng.randrange(61)
                    assert state.add(parent, token) == builder.add_drawn(parent, token)
            fresh = [
                range(len(state.parent) - count, len(state.parent))
                for state, count in zip(states, counts, strict=True)
            ]
            rows = runtime.extend(states, fresh)
            row = 0
            for state, s, nodes in zip(states, sequences, fresh, strict=True):
                for node in nodes:
                    path, at = [], node
                    while at:
                        path.append(state.token[at])
                        at = state.parent[at]
                    expected = alone(model, s.tokens + path[::-1])
                    assert np.array_equal(rows.logits[row], expected)
                    row += 1
        for state, builder, s in zip(states, builders, sequences, strict=True):
            tree, state.place = builder.build()
            node = rng.randrange(len(tree))
            path = [node]
            while path[-1]:
                path.append(tree.parent[path[-1]])
            path.reverse()
            tokens = [tree.token[n] for n in path[1:]] + [rng.randrange(61)]
            start = len(s.tokens) - 1
            s.tokens += tokens
            runtime.settle(state, Outcome(s, start, tree, path, tokens, np.empty((0, 61))))
            assert state.stream.computed == len(s.tokens) - 1
    for state in states:
        runtime.close(state)
    assert all(pool.num_held == 0 for pool in runtime.cache.pools)


def test_what_was_not_seen_is_caught_up(tiny: Make) -> None:
    """Tokens that came without drafts, a cut, and a state closed and used again."""
    model = tiny("llama")
    runtime = DraftModel(model, context(model), 4)
    s = sequence([3, 1, 4, 1, 5])
    state = runtime.open(s)
    for change in ("grow", "cut", "close", "grow"):
        runtime.begin([state])
        if change == "grow":
            s.tokens += [9, 2, 6]
        elif change == "cut":
            del s.tokens[4:]
            s.tokens += [7, 7]
            runtime.rollback(state, 4)
        else:
            runtime.close(state)
        _, rows = runtime.begin([state])
        assert rows is not None
        assert np.array_equal(rows.logits[0], alone(model, s.tokens))


@pytest.mark.parametrize("choices", ["", "select=sink-window(sinks=2,window=19)"])
def test_engines_with_a_draft_model_give_the_plain_output(
    tiny: Make, tmp_path: Path, choices: str
) -> None:
    draft = f"draft=model(path={tiny_draft(tmp_path)},k=3)"
    model, rng = tiny_target(tiny), random.Random(3)
    world = World(model, drafts=None, choices=f"{draft},{choices}".strip(","), blocks=8)
    for _ in range(24):
        world.add(prompt_of(rng, 61, rng.randint(1, 30)), params_of(rng, 61))
    world.drain()
    assert world.checked >= 24 and world.engine.stats.preemptions
    seen = world.engine.stats.speculation
    assert seen.drafted > 50 and seen.examined > seen.accepted > 20
    pools = world.engine.drafting.runtime.cache.pools  # type: ignore[attr-defined]
    assert all(pool.num_held == 0 for pool in pools)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_equal_to_the_target_is_always_right(tmp_path: Path, temperature: float) -> None:
    """Also where it draws: both laws are the same numbers."""
    from hasten.models.loading import load_model

    folder = tiny_draft(tmp_path)
    engine = Engine(
        load_model(folder, progress=False),
        Stack.parse(f"draft=model(path={folder},k=4),verify=chain"),
        EngineConfig(max_sequences=3),
    )
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=41, ignore_eos=True)
    for n in (3, 20, 40):
        engine.add([5] * n + [n], params)
    while engine.has_work:
        engine.step()
    found = engine.stats.speculation
    assert found.by_depth == [1.0] * 4 and found.alpha_drafted == 1.0
    # one token from the prompt, then 8 passes of 5
    assert found.passes == 3 * 9 and found.tokens == 3 * 41


def test_other_vocabularies_and_shorter_models_are_refused(tiny: Make, tmp_path: Path) -> None:
    stack = Stack.parse(f"draft=model(path={tiny_draft(tmp_path)})")
    with pytest.raises(MethodError, match="61 ids against 60"):
        Engine(tiny("llama", vocab_size=60), stack)
    with pytest.raises(MethodError, match="512 positions"):
        Engine(tiny("llama", max_position_embeddings=1024), stack)
    with pytest.raises(ValueError, match="no such folder"):
        Engine(tiny("llama"), Stack.parse("draft=model(path=/nowhere/at/all)"))
    with pytest.raises(MethodError, match="does not fit the 40 pages"):
        DraftModel(tiny("llama"), context(tiny("llama")), 641)
    with pytest.raises(MethodError, match="at least one"):
        Stack.parse("draft=model(k=0)")
