"""Kangaroo: drafts against the adapter computed from scratch, exact output, nothing left behind."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hasten import LLM
from hasten.decoding.params import SamplingParams
from hasten.engine.batch import Batch, Segment
from hasten.engine.engine import Engine, EngineConfig
from hasten.methods import MethodError
from hasten.models.base import Decoder
from hasten.models.paged import PagedKV
from hasten.speculation.drafters.kangaroo import Kangaroo, KangarooDrafting
from hasten.speculation.heads import write_head
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack
from hasten.training.features import Teacher, TeacherHead
from hasten.training.kangaroo import AdapterModule, write_adapter
from tests.engine.world import World
from tests.speculation.self_drafts import SHAPES, random_adapter, run_load


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # models are tiny


class Checked:
    """Compares every draft with the adapter's, computed anew over the whole text."""

    def __init__(self, world: World, module: AdapterModule, layer: int) -> None:
        drafting = world.engine.drafting
        assert isinstance(drafting, KangarooDrafting)
        self.drafting, self.layer, self.module = drafting, layer, module
        self.head = TeacherHead(world.model)
        self.teacher = Teacher(world.model, 256)
        self.drafts = self.cut = 0
        self.lengths: Counter[int] = Counter()
        propose = drafting.propose

        def checked(sequences: Sequence[Any], budgets: Sequence[int]) -> list[TokenTree]:
            trees = propose(sequences, budgets)
            for sequence, budget, tree in zip(sequences, budgets, trees, strict=True):
                assert len(tree) - 1 <= min(budget, drafting.k)
                if len(tree) > 1:
                    self.check(sequence, tree, min(budget, drafting.k))
            return trees

        drafting.propose = checked  # type: ignore[method-assign]

    @torch.no_grad()
    def check(self, sequence: Any, tree: TokenTree, limit: int) -> None:
        tokens = [*sequence.tokens, *tree.token[1:]]
        start = len(sequence.tokens) - 1
        states = self.captured(tokens)
        assert tree.layers == self.layer and torch.equal(tree.hidden, states[start:])
        offset = sequence.draft_state.offset
        self.cut += offset > 0
        logits = self.head(self.module(states[None, offset:-1]))[0][start - offset :]
        sure = logits.softmax(-1).amax(-1).tolist()
        for row, token in zip(logits, tree.token[1:], strict=True):
            assert row[token] > row.max() - 1e-3
        drafted, eta = len(tree) - 1, self.drafting.eta
        assert all(p > eta - 1e-4 for p in sure[: drafted - 1]), "went on without confidence"
        assert drafted == limit or sure[-1] < eta + 1e-4, "stopped without a reason"
        self.drafts += 1
        self.lengths[drafted] += 1

    def captured(self, tokens: list[int]) -> torch.Tensor:
        batch = Batch.build([Segment(0, 0, tokens)], self.teacher.tables)
        kv = PagedKV(self.teacher.storage, batch)
        return self.teacher.model.forward(batch, kv, layers=range(self.layer)).rows


@pytest.mark.parametrize("kind", SHAPES)
def test_drafts_are_the_adapters_whatever_happens(
    tiny: Callable[..., Decoder], tmp_path: Path, kind: str
) -> None:
    """Forks, preemption, prefix hits, chunks, aborts: no state is stale, no output changes."""
    model = tiny(kind, **SHAPES[kind])
    module = random_adapter(model, tmp_path / "head.safetensors")
    stack = f"draft=kangaroo(head={tmp_path / 'head.safetensors'},eta=0.12)"
    world = World(model, drafts=None, choices=stack, blocks=8)
    checked = Checked(world, module, 2)
    run_load(world, random.Random(kind), requests=50)
    stats = world.engine.stats
    assert checked.drafts > 50 and len(checked.lengths) > 2
    windowed = any(g.window for g in world.engine.cache.layout.groups)
    assert stats.preemptions > 0 and (windowed or world.engine.cache.stats.prefix_hits > 0)
    assert stats.speculation.drafted > stats.speculation.accepted > 0
    assert world.checked > 20
    assert (checked.drafting.repeated == 0) == windowed
    assert checked.cut < checked.drafts / 2 if not windowed else checked.cut > 0
    for pool in checked.drafting.cache.pools:
        assert pool.num_held == 0
    assert not any(checked.drafting.cache.audit())


def test_another_drafters_tree_may_be_verified(
    tiny: Callable[..., Decoder], tmp_path: Path
) -> None:
    """Methods that combine drafters may verify other candidates than ours, or some of ours."""
    model = tiny("llama", **SHAPES["llama"])
    module = random_adapter(model, tmp_path / "h")
    world = World(
        model, drafts=None, choices=f"draft=kangaroo(head={tmp_path / 'h'},eta=0)", blocks=40
    )
    checked = Checked(world, module, 2)
    rng, propose = random.Random(1), checked.drafting.propose
    replaced = 0

    def swapped(sequences: Sequence[Any], budgets: Sequence[int]) -> list[TokenTree]:
        nonlocal replaced
        trees = propose(sequences, budgets)
        for i, tree in enumerate(trees):
            if len(tree) > 1 and rng.random() < 0.5:
                kept = rng.randrange(len(tree))
                others = [rng.randrange(2, 61) for _ in range(len(tree) - 1 - kept)]
                trees[i] = TokenTree.chain([*tree.token[: 1 + kept], *others])
                replaced += 1
        return trees

    checked.drafting.propose = swapped  # type: ignore[method-assign]
    run_load(world, random.Random(2))
    assert checked.drafts > 50 and replaced > 20 and world.checked > 20
    assert world.engine.stats.speculation.accepted > 0


@pytest.mark.parametrize(
    "combined",
    [
        "any(of={own}|del(k=3)|prompt-lookup)",
        "fallback(first={own},then=del(k=3))",
        "fuse(of={own}|prompt-lookup)",
    ],
)
def test_as_a_part_of_other_methods(
    tiny: Callable[..., Decoder], tmp_path: Path, combined: str
) -> None:
    model = tiny("llama", **SHAPES["llama"])
    random_adapter(model, tmp_path / "h")
    own = f"kangaroo(head={tmp_path / 'h'},eta=0.1)"
    world = World(model, drafts=None, choices=f"draft={combined.format(own=own)}", blocks=9)
    run_load(world, random.Random(combined))
    assert world.checked > 20 and world.engine.stats.speculation.drafted > 30


def engine_of(model: Decoder, head: Path, **settings: Any) -> Engine:
    inside = ",".join(f"{k}={v}" for k, v in {"head": head, **settings}.items())
    return Engine(
        model,
        Stack.parse(f"draft=kangaroo({inside})"),
        EngineConfig(max_sequences=4, max_batch_tokens=64),
    )


def generate(
    engine: Engine, prompts: list[list[int]], count: int, **params: Any
) -> list[list[int]]:
    settings = SamplingParams(max_tokens=count, ignore_eos=True, **params)
    requests = [engine.add(prompt, settings) for prompt in prompts]
    while engine.has_work:
        engine.step()
    return [r.sequences[0].tokens for r in requests]


@pytest.fixture
def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(2, 61) for _ in range(n)] for n in (1, 17, 40)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_text_as_plain_decoding(
    tiny: Callable[..., Decoder], tmp_path: Path, prompts: list[list[int]], temperature: float
) -> None:
    model = tiny("llama", **SHAPES["llama"])
    random_adapter(model, tmp_path / "h")
    plain = Engine(model, Stack.parse("plain"), EngineConfig(max_sequences=4, max_batch_tokens=64))
    params = {"temperature": temperature, "seed": 5}
    expected = generate(plain, prompts, 60, **params)
    for eta in (0.0, 0.4, 1.0):
        assert (
            generate(engine_of(model, tmp_path / "h", eta=eta), prompts, 60, **params) == expected
        )


def test_confidence_ends_drafts_but_drops_nothing(
    tiny: Callable[..., Decoder], tmp_path: Path, prompts: list[list[int]]
) -> None:
    """At eta = 1 each draft is its first, unconfident token; at 0 every draft is full."""
    model = tiny("llama", **SHAPES["llama"])
    random_adapter(model, tmp_path / "h")
    for eta, length in ((1.0, 1), (0.0, 4)):
        engine = engine_of(model, tmp_path / "h", eta=eta, k=4)
        generate(engine, prompts[1:2], 41)
        found = engine.stats.speculation
        full = 41 - 1 - length  # drafts shrink where the text must end
        assert found.drafted >= length * (found.drafts - length + 1) > 0
        assert found.drafted <= length * found.drafts and full > 0


def test_the_first_layers_run_once(
    tiny: Callable[..., Decoder],
    tmp_path: Path,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("llama", **SHAPES["llama"])
    random_adapter(model, tmp_path / "h")
    engine = engine_of(model, tmp_path / "h", eta=0.2)
    rows: Counter[int] = Counter()
    layer = model.layer

    def counted(index: int, hidden: torch.Tensor, kv: Any) -> torch.Tensor:
        rows[index] += len(hidden)
        return layer(index, hidden, kv)

    monkeypatch.setattr(model, "layer", counted)
    generate(engine, prompts, 50)
    assert engine.stats.speculation.drafted > 50
    assert len(set(rows.values())) == 1, dict(rows)
    assert rows[0] == engine.stats.rows


def test_a_full_acceptance_is_caught_up(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    """The adapter is a copy of nothing, so it is made right: an exit whose later layers are void.

    With attention and feed-forward of the later layers written to zero, the early exit is the
    model, every draft is accepted, and the last drafted token has no keys in the adapter yet.
    """
    model = tiny("llama", seed=9, **SHAPES["llama"])
    layers = list(model.layers)  # type: ignore[attr-defined]
    try:
        for index in (2, 3):
            model.layers[index] = lambda hidden, kv: hidden  # type: ignore[attr-defined]
        module = AdapterModule(model)  # as it begins: a plain early exit
        write_adapter(tmp_path / "h", model, module, 2)
        engine = engine_of(model, tmp_path / "h", eta=0.0, k=5)
        (tokens,) = generate(engine, [[5, 6, 7]], 61)
        plain = Engine(model, Stack.parse("plain"), EngineConfig(max_sequences=1))
        assert generate(plain, [[5, 6, 7]], 61) == [tokens]
    finally:
        model.layers[:] = layers  # type: ignore[attr-defined]
    found = engine.stats.speculation
    assert found.alpha_drafted == 1.0
    assert found.passes == 1 + 60 / 6


def test_tenants_share_no_states(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    model = tiny("llama", **SHAPES["llama"])
    random_adapter(model, tmp_path / "h")
    engine = engine_of(model, tmp_path / "h")
    drafting = engine.drafting
    assert isinstance(drafting, KangarooDrafting)
    prompt = list(range(2, 50))
    hits = []
    for tenant in ("a", "b", "a"):
        engine.add(prompt, SamplingParams(max_tokens=3), tenant=tenant)
        before = drafting.cache.stats.prefix_hits
        while engine.has_work:
            engine.step()
        hits.append(drafting.cache.stats.prefix_hits - before)
    assert hits == [0, 0, 1]


def test_rollback_cuts_the_text(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    model = tiny("llama", **SHAPES["llama"])
    random_adapter(model, tmp_path / "h")
    engine = engine_of(model, tmp_path / "h")
    request = engine.add(list(range(2, 40)), SamplingParams(max_tokens=40, ignore_eos=True))
    sequence = request.sequences[0]
    for _ in range(5):
        engine.step()
    engine.drafting.rollback(sequence, 20)
    state = sequence.draft_state
    assert (state.offset, state.stream.computed, len(state.late)) == (0, 0, 0)
    assert len(state.stream.keys) <= 1
    while engine.has_work:  # the engine's own text was not cut: the adapter reads it again
        engine.step()
    assert len(sequence.tokens) == 78


@pytest.mark.parametrize(
    "bad", [{"eta": -0.1}, {"eta": 1.5}, {"k": 0}], ids=["eta", "large eta", "k"]
)
def test_bad_parameters(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Kangaroo(**bad)


def test_refusals(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    model = tiny("llama", **SHAPES["llama"])
    other = tiny("llama", seed=1, **SHAPES["llama"])
    random_adapter(other, tmp_path / "other")
    write_head(tmp_path / "medusa", "medusa", model, {}, {"x": torch.zeros(1)})
    save_file({"x": torch.zeros(1)}, tmp_path / "plain")
    (tmp_path / "text").write_text("no tensors")
    random_adapter(model, tmp_path / "deep", layer=4)
    write_head(tmp_path / "hollow", "kangaroo", model, {"layer": 2}, {"x": torch.zeros(1)})
    for head, words in (
        ("", "hasten train kangaroo"),
        (tmp_path / "missing", "there is no file"),
        (tmp_path / "other", "another model"),
        (tmp_path / "medusa", "draft=medusa"),
        (tmp_path / "plain", "no head"),
        (tmp_path / "text", "cannot be read"),
        (tmp_path / "deep", "exit layer 4"),
        (tmp_path / "hollow", "does not state"),
    ):
        with pytest.raises(MethodError, match=words):
            engine_of(model, head)  # type: ignore[arg-type]


def test_the_reference_model_in_a_batch(tmp_path: Path) -> None:
    prompts = ["def add(a, b):\n", "import os\n\n\nclass Path:\n", "1, 2, 3, 4, "]
    plain = LLM("reference", max_sequences=3)
    random_adapter(plain.engine.model, tmp_path / "h")
    drafted = LLM(
        "reference", stack=f"draft=kangaroo(head={tmp_path / 'h'},eta=0)", max_sequences=3
    )
    params = [SamplingParams(max_tokens=24, temperature=t, seed=7) for t in (0.0, 0.0, 0.8)]
    texts = [[o.text for o in llm.generate(prompts, params)] for llm in (plain, drafted)]
    assert texts[0] == texts[1]
    assert drafted.stats.speculation.drafted > 100
