"""DEL: its objective by hand, its counters against a recount from scratch, exact output."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from hasten import LLM
from hasten.decoding.params import SamplingParams
from hasten.engine.batch import Batch, Segment
from hasten.engine.engine import Engine, EngineConfig
from hasten.methods import MethodError
from hasten.models.base import Decoder
from hasten.models.paged import PagedKV
from hasten.speculation.base import Outcome
from hasten.speculation.drafters.dynamic_exit import (
    LOOK_EVERY,
    DynamicExit,
    DynamicExitDrafting,
    ExitState,
    tokens_per_layer,
)
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack
from hasten.training.features import Teacher
from tests.engine.world import World
from tests.speculation.self_drafts import SHAPES, run_load


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # models are tiny


def engine_of(model: Decoder, draft: str) -> Engine:
    return Engine(model, Stack.parse(draft), EngineConfig(max_sequences=4, max_batch_tokens=64))


def generate(
    engine: Engine, prompts: list[list[int]], count: int, **params: Any
) -> list[list[int]]:
    settings = SamplingParams(max_tokens=count, ignore_eos=True, **params)
    requests = [engine.add(prompt, settings) for prompt in prompts]
    while engine.has_work:
        engine.step()
    return [r.sequences[0].tokens for r in requests]


def pin(drafting: DynamicExitDrafting, choose: Callable[[], tuple[int, int]]) -> None:
    """Have exits and lengths chosen by the test."""

    def decide(state: ExitState) -> None:
        state.exit, state.length = choose()

    drafting._decide = decide  # type: ignore[method-assign]


def test_the_objective() -> None:
    alpha = np.array([0.5, 1.0, 0.0])
    exits = np.array([2.0, 3.0, 4.0])
    value = tokens_per_layer(alpha, exits, 8, 3)
    for row, (a, layer) in enumerate(zip(alpha, exits, strict=True)):
        for d in range(4):
            tokens = d + 1 if a == 1 else (1 - a ** (d + 1)) / (1 - a)
            assert value[row, d] == pytest.approx(tokens / (d * layer + 8), rel=1e-12)
    assert (value[:, 0] == 1 / 8).all(), "no draft is plain decoding"
    with_head = tokens_per_layer(alpha, exits, 8, 3, head=1.5)
    assert with_head[0, 2] == pytest.approx(1.75 / (2 * 3.5 + 9.5))


@pytest.mark.parametrize("kind", SHAPES)
def test_exits_of_any_depth_change_nothing(tiny: Callable[..., Decoder], kind: str) -> None:
    """Forks, preemption, prefix hits; sequences of a batch leave at different layers."""
    model = tiny(kind, **SHAPES[kind])
    world = World(model, drafts=None, choices="draft=del", blocks=8)
    drafting = world.engine.drafting
    assert isinstance(drafting, DynamicExitDrafting)
    rng = random.Random(kind)
    pin(drafting, lambda: (rng.randrange(len(drafting.exits)), rng.choice([0, 1, 2, 5])))
    seen: Counter[int] = Counter()
    propose = drafting.propose

    def checked(sequences: Sequence[Any], budgets: Sequence[int]) -> list[TokenTree]:
        trees = propose(sequences, budgets)
        assert all(len(t) - 1 <= b for t, b in zip(trees, budgets, strict=True))
        if drawn := {tree.layers for tree in trees if len(tree) > 1}:
            seen[len(drawn)] += 1
        return trees

    drafting.propose = checked  # type: ignore[method-assign]
    run_load(world, random.Random(kind))
    windowed = any(g.window for g in world.engine.cache.layout.groups)
    assert world.checked > 20 and (windowed or world.engine.stats.preemptions > 0)
    assert world.engine.stats.speculation.accepted > 0
    assert seen[1] and sum(count for depths, count in seen.items() if depths > 1)


def test_counters_are_those_of_the_valid_prefix(tiny: Callable[..., Decoder]) -> None:
    """Each round's shadow tokens, from a pass over the finished text: all exits, the accepted
    path and the first mismatch, nothing behind it."""
    model = tiny("llama", **SHAPES["llama"])
    engine = engine_of(model, "draft=del(decay=0.9)")
    drafting = engine.drafting
    assert isinstance(drafting, DynamicExitDrafting)
    rng = random.Random(1)
    pin(drafting, lambda: (rng.randrange(3), rng.choice([1, 3, 6])))
    rounds: dict[int, list[tuple[int, int]]] = defaultdict(list)
    finals: dict[int, ExitState] = {}
    sequences: dict[int, Any] = {}
    observe = drafting.observe

    def recorded(outcomes: Sequence[Outcome]) -> None:
        observe(outcomes)
        for outcome in outcomes:
            key = id(outcome.sequence)
            sequences[key], finals[key] = outcome.sequence, outcome.sequence.draft_state
            if outcome.hidden:
                rounds[key].append((outcome.start, len(outcome.tokens)))

    drafting.observe = recorded  # type: ignore[method-assign]
    prompts = [[rng.randrange(2, 61) for _ in range(n)] for n in (3, 21)]
    generate(engine, prompts, 40)
    assert engine.stats.speculation.accepted > 3
    teacher = Teacher(model, 128)
    for key, sequence in sequences.items():
        tokens = sequence.tokens
        batch = Batch.build([Segment(0, 0, tokens)], teacher.tables)
        passed = model.forward(batch, PagedKV(teacher.storage, batch), capture=range(3)).captured
        logits = torch.stack([model.head(passed[count - 1]) for count in drafting.exits])
        best, sure = logits.argmax(-1).numpy(), logits.softmax(-1).amax(-1).double().numpy()
        right, positions = np.zeros(3), 0.0
        sums = {True: np.zeros(3), False: np.zeros(3)}
        for start, count in rounds[key]:
            at = slice(start, start + count)
            hits = best[:, at] == np.array(tokens[start + 1 : start + 1 + count])
            right, positions = 0.9 * right + hits.sum(1), 0.9 * positions + count
            for kind in (True, False):
                sums[kind] = 0.9 * sums[kind] + (sure[:, at] * (hits == kind)).sum(1)
        state = finals[key]
        assert state.positions == pytest.approx(positions)
        np.testing.assert_allclose(state.right, right)
        np.testing.assert_allclose(state.sure_right, sums[True], rtol=1e-5)
        np.testing.assert_allclose(state.sure_wrong, sums[False], rtol=1e-5)


def test_bad_exits_end_in_plain_decoding(tiny: Callable[..., Decoder]) -> None:
    """A random model's exits say nothing: it soon decodes plainly and rarely looks."""
    model = tiny("llama", **SHAPES["llama"])
    engine = engine_of(model, "draft=del")
    generate(engine, [[5, 6, 7]], 200, temperature=2.0, seed=1)
    found = engine.stats
    assert found.speculation.drafts < 0.1 * found.steps
    assert found.recorded_steps > 0.7 * (1 - 1 / LOOK_EVERY) * found.steps


def test_a_new_sequence_begins_with_what_others_saw(tiny: Callable[..., Decoder]) -> None:
    model = tiny("llama", **SHAPES["llama"])
    engine = engine_of(model, "draft=del")
    hot = {"temperature": 2.0, "seed": 1}
    first = engine.add([5], SamplingParams(max_tokens=1)).sequences[0].draft_state
    assert first.length > 0, "it must try to learn"
    generate(engine, [[5, 6, 7]], 200, **hot)
    drafted = engine.stats.speculation.drafted
    later = engine.add([8, 9], SamplingParams(max_tokens=4, ignore_eos=True, **hot)).sequences[0]
    assert later.draft_state.length == 0 and later.draft_state.looks_in > 0
    while engine.has_work:
        engine.step()
    assert engine.stats.speculation.drafted == drafted


def test_a_perfect_exit_is_found(tiny: Callable[..., Decoder]) -> None:
    """The layers behind the first two do nothing: exit 2 is as good as any and the cheapest."""
    model = tiny("llama", seed=9, **SHAPES["llama"])
    layers = list(model.layers)  # type: ignore[attr-defined]
    try:
        for index in (2, 3):
            model.layers[index] = lambda hidden, kv: hidden  # type: ignore[attr-defined]
        engine = engine_of(model, "draft=del(k=6)")
        request = engine.add([5, 6, 7], SamplingParams(max_tokens=120, ignore_eos=True))
        state = request.sequences[0].draft_state
        chosen = Counter()  # type: ignore[var-annotated]
        while engine.has_work:
            engine.step()
            chosen[engine.drafting.exits[state.exit]] += 1  # type: ignore[attr-defined]
        plain = engine_of(model, "plain")
        assert generate(plain, [[5, 6, 7]], 120) == [request.sequences[0].tokens]
    finally:
        model.layers[:] = layers  # type: ignore[attr-defined]
    assert chosen.most_common(1)[0][0] == 2
    assert engine.stats.speculation.tau > 3  # type: ignore[operator]


def test_confidence_ends_a_draft(tiny: Callable[..., Decoder]) -> None:
    model = tiny("llama", **SHAPES["llama"])
    engine = engine_of(model, "draft=del")
    drafting = engine.drafting
    assert isinstance(drafting, DynamicExitDrafting)
    pin(drafting, lambda: (1, 6))
    request = engine.add([5, 6, 7], SamplingParams(max_tokens=100, ignore_eos=True))
    state: ExitState = request.sequences[0].draft_state
    assert state.threshold() == 0.0, "nothing was seen"
    state.right, state.positions = np.array([0.0, 2.0, 0.0]), 5.0
    state.sure_right, state.sure_wrong = np.array([0.0, 1.8, 0.0]), np.array([0.0, 0.9, 0.0])
    assert state.threshold() == pytest.approx((0.9 + 0.3) / 2)
    state.sure_right = state.sure_wrong = np.array([0.0, 1e9, 0.0])  # nothing is confident enough
    engine.step()
    lengths = []
    propose = drafting.propose

    def counted(sequences: Sequence[Any], budgets: Sequence[int]) -> list[TokenTree]:
        trees = propose(sequences, budgets)
        lengths.extend(len(tree) - 1 for tree in trees)
        return trees

    drafting.propose = counted  # type: ignore[method-assign]
    engine.step()
    assert lengths == [1], "the unconfident token is submitted, none after it"


@pytest.mark.parametrize(
    "bad", [{"decay": 0.0}, {"k": 0}, {"stride": 0}, {"head": -1.0}, {"head": np.inf}]
)
def test_bad_parameters(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        DynamicExit(**bad)  # type: ignore[arg-type]


def test_a_model_without_exits_is_refused(tiny: Callable[..., Decoder]) -> None:
    with pytest.raises(MethodError, match="stride"):
        engine_of(tiny("llama"), "draft=del(stride=2)")


def test_the_reference_model_in_a_batch() -> None:
    prompts = ["def add(a, b):\n", "import os\n\n\nclass Path:\n", "1, 2, 3, 4, "]
    texts = []
    for stack in ("plain", "draft=del(k=4)"):
        llm = LLM("reference", stack=stack, max_sequences=3)
        params = [SamplingParams(max_tokens=24, temperature=t, seed=7) for t in (0.0, 0.0, 0.8)]
        texts.append([output.text for output in llm.generate(prompts, params)])
    assert texts[0] == texts[1]
