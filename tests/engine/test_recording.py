"""Recorded passes give the bits of unrecorded ones, or are refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hasten.cache.layout import PAGE_SIZE, KVStorage
from hasten.decoding.params import SamplingParams
from hasten.engine import recording
from hasten.engine.batch import Batch, Segment
from hasten.engine.engine import Engine, EngineConfig
from hasten.engine.recording import MAX_ROWS, Recorder, choices
from hasten.models.base import Decoder
from hasten.models.paged import PagedKV
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack
from tests.engine.test_randomized import MODELS

Make = Callable[..., Decoder]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    **MODELS,
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "olmo2": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "qwen3": {},
}


class Pair:
    """Sequences that grow the same way in two storages: through a recorder, and without one."""

    def __init__(self, model: Decoder, length: int = 128, seed: int = 0) -> None:
        self.model = model
        self.rng = random.Random(seed)
        layout = model.config.kv_layout()
        blocks, rows = -(-length // PAGE_SIZE), 3
        shuffled = np.random.default_rng(seed)
        self.tables = [
            shuffled.permutation(rows * g.head_groups * blocks)
            .astype(np.int32)
            .reshape(rows, g.head_groups, blocks)
            for g in layout.groups
        ]
        self.storage, self.plain = (
            KVStorage(layout, [t.size for t in self.tables]) for _ in range(2)
        )
        for storage in (self.storage, self.plain):
            for pages in (*storage.k, *storage.v):
                pages.fill_(0.125)
        self.recorder = Recorder(model, self.storage)
        self.recorder.refused = None  # whatever HASTEN_RECORD says

    def run(self, segments: list[Segment]) -> bool:
        """Compare one step; whether it ran from a recording or made one."""
        batch = Batch.build(segments, self.tables)
        for buffer in self.recorder._memory._all:
            buffer.fill(255)  # NaN: whatever a pass does not write itself shows
        found = self.recorder.run(batch)
        expected = choices(self.model, batch, PagedKV(self.plain, batch))
        if found is None:
            choices(self.model, batch, PagedKV(self.storage, batch))
            return False
        for name in ("logits", "best", "lse"):
            a, b = getattr(found, name), getattr(expected, name)
            assert a.shape == b.shape and torch.equal(a, b), name
        for ours, theirs in zip(
            self.storage.k + self.storage.v, self.plain.k + self.plain.v, strict=True
        ):
            assert torch.equal(ours, theirs), "pages differ"
        return True

    def random_segments(self, most_rows: int = MAX_ROWS) -> list[Segment]:
        """One to three sequences, each a chunk, a decode, a chain or a tree."""
        rng, left, segments = self.rng, most_rows, []
        for row in rng.sample(range(3), rng.randint(1, 3)):
            if left < 1:
                break
            start, known = rng.randrange(60), rng.choice([1, 1, 1, min(3, left)])
            tokens = [self._token() for _ in range(known)]
            candidates = rng.choice([0, 0, rng.randint(0, left - known)])
            tree = None
            if candidates:
                chain = rng.random() < 0.5
                parents = [-1] + [i if chain else rng.randint(0, i) for i in range(candidates)]
                tree = _sorted_tree([tokens[-1]] + [self._token() for _ in parents[1:]], parents)
            segments.append(Segment(row, start, tokens, tree, rng.choice(["last", "all", "none"])))
            left -= known + candidates
        return segments

    def _token(self) -> int:
        return self.rng.randrange(self.model.config.vocab_size)


def _sorted_tree(tokens: list[int], parents: list[int]) -> TokenTree:
    """Nodes by depth, as the engine wants them."""
    depth = [0] * len(tokens)
    for i, parent in enumerate(parents[1:], 1):
        depth[i] = depth[parent] + 1
    order = sorted(range(len(tokens)), key=lambda i: depth[i])
    place = {old: new for new, old in enumerate(order)}
    return TokenTree([tokens[i] for i in order], [place.get(parents[i], -1) for i in order])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recorded_steps_have_the_bits_of_unrecorded_ones(tiny: Make, architecture: str) -> None:
    pair = Pair(tiny(architecture, **ARCHITECTURES[architecture]))
    recorded = sum(pair.run(pair.random_segments()) for _ in range(120))
    assert pair.recorder.refused is None
    assert recorded == 120 and len(pair.recorder._recordings) < 100


def test_a_step_of_many_rows_runs_unrecorded(tiny: Make) -> None:
    pair = Pair(tiny("llama"))
    assert pair.run([Segment(0, 0, [1] * MAX_ROWS)])
    assert not pair.run([Segment(0, 0, [1] * (MAX_ROWS + 1))])


def test_positions_beyond_the_recorded_angles_record_anew(tiny: Make) -> None:
    pair = Pair(tiny("llama", max_position_embeddings=8192), length=4200)
    for start in (5, 2047, 2048, 7, 4095, 4096, 4100, 2050):
        assert pair.run([Segment(1, start, [start % 61])])


def test_other_page_tables_record_anew(tiny: Make) -> None:
    pair = Pair(tiny("gemma2", **MODELS["gemma2"]))
    assert pair.run([Segment(0, 20, [3])])
    pair.tables = [table[:, :, ::-1].copy() for table in pair.tables]
    assert pair.run([Segment(0, 20, [3])])
    for table in pair.tables:  # and changed ones are read as they are
        table[0] = table[0, :, ::-1].copy()
    assert pair.run([Segment(0, 20, [3])])


def test_the_longest_unused_recording_goes_and_memory_is_shared(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MAX_RECORDINGS", 4)
    pair = Pair(tiny("llama"))
    assert pair.run([Segment(0, 0, [1] * MAX_ROWS, wanted="all")])
    most = sum(len(buffer) for buffer in pair.recorder._memory._all)
    for rows in (1, 2, 3, 4, 5, 1, 2, 5):
        assert pair.run([Segment(0, 0, [1] * rows, wanted="all")])
        assert len(pair.recorder._recordings) <= 4
    assert [key[0] for key in pair.recorder._recordings] == [4, 1, 2, 5]
    assert sum(len(buffer) for buffer in pair.recorder._memory._all) <= 2 * most


class Doubling:
    """A model whose last layer doubles the rows, by whatever it is told."""

    def __init__(self, model: Decoder, double: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.model, self.double, self.config = model, double, model.config
        self.sampling_defaults = model.sampling_defaults

    def forward(self, batch: Batch, kv: Any, **options: Any) -> Any:
        hidden = self.model.forward(batch, kv, **options)
        hidden.rows = self.double(hidden.rows)
        return hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


@pytest.mark.parametrize(
    ("double", "operation"),
    [
        (lambda x: x * 2, "aten.mul"),
        (lambda x: torch.cat([x + x]), "aten.add"),
        (lambda x: x.clone().mul_(2), "aten.clone"),
        (lambda x: x * float(x[0, 0] * 0 + 2), "aten"),
    ],
)
def test_what_torch_computes_is_refused_by_name(
    tiny: Make, double: Callable[[torch.Tensor], torch.Tensor], operation: str
) -> None:
    model: Any = Doubling(tiny("llama"), double)
    pair = Pair(model)
    for start in (3, 4):
        assert not pair.run([Segment(0, start, [start])])
    assert operation in str(pair.recorder.refused)
    assert not pair.recorder._recordings


def test_a_replay_checks_its_rows(tiny: Make) -> None:
    """Slots, table rows, tokens and missing pages are errors of the step, not of the process."""
    pair = Pair(tiny("llama"))
    assert pair.run([Segment(0, 5, [3])])
    batch = Batch.build([Segment(0, 6, [3])], pair.tables)
    for name, value, error in (
        ("table_row", 3, ValueError),
        ("slots", 1000, ValueError),
        ("positions", -1, ValueError),
        ("base", 1000, ValueError),
        ("tokens", 61, IndexError),
    ):
        kept = getattr(batch, name)[0]
        getattr(batch, name)[0] = value
        with pytest.raises(error, match=name if name != "tokens" else "ids"):
            pair.recorder.run(batch)
        getattr(batch, name)[0] = kept
    page, pair.tables[0][0, 0, 0] = pair.tables[0][0, 0, 0], -1
    with pytest.raises(ValueError, match="holds"):
        pair.recorder.run(batch)
    pair.tables[0][0, 0, 0] = page
    assert pair.run([Segment(0, 6, [3])])


def test_an_engine_counts_recorded_steps_and_can_do_without(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def text() -> tuple[list[int], Engine]:
        engine = Engine(
            tiny("llama"), Stack.parse("draft=prompt-lookup(k=4)"), EngineConfig(max_sequences=2)
        )
        request = engine.add(
            list(range(2, 40)),
            SamplingParams(max_tokens=40, temperature=0.8, seed=5, ignore_eos=True),
        )
        while engine.has_work:
            engine.step()
        return request.sequences[0].tokens, engine

    recorded, engine = text()
    assert engine.stats.recorded_steps == engine.stats.steps - 1  # all but the prompt
    monkeypatch.setenv("HASTEN_RECORD", "0")
    plain, engine = text()
    assert engine.stats.recorded_steps == 0
    assert engine.executor.runner.recorder.refused == "HASTEN_RECORD=0"  # type: ignore[attr-defined]
    assert recorded == plain


def test_recording_does_not_load_the_compiler() -> None:
    """torch wraps a mode's handler in one that imports its compiler: a second at the start."""
    assert not hasattr(recording._KernelsOnly.__torch_dispatch__, "__wrapped__")
