"""Adapters learn to agree with their model, and the engine computes what training computed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from hasten.cache.layout import PAGE_SIZE, KVStorage
from hasten.engine.batch import Batch, Segment
from hasten.models.base import Decoder
from hasten.models.paged import PagedKV
from hasten.training.features import FeatureStore, TeacherHead
from hasten.training.kangaroo import AdapterModule, AdapterRun, fit, train_adapter
from tests.speculation.self_drafts import SHAPES

RUN = AdapterRun(
    layer=2, tokens=3000, epochs=8, length=32, batch_rows=8, warmup_steps=5, precision="float32"
)


def texts(count: int = 80) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(2, 61) for _ in range(48)] for _ in range(count)]


def test_an_adapter_learns(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    model = tiny("llama", **SHAPES["llama"])
    losses = train_adapter(model, texts(), tmp_path / "a", tmp_path / "work", RUN)
    assert sum(losses[-5:]) < 0.985 * sum(losses[:5])  # most of it is the labels' own entropy
    store = FeatureStore(tmp_path / "work" / "features-2")
    module, again = fit(model, store, RUN, tmp_path / "log.jsonl")
    assert again == losses, "a function of store and run"
    rows = store.batch(10**6, 16, 32)
    with torch.no_grad():
        head = TeacherHead(model)
        right = [
            float((head(m(rows.hidden[2])).argmax(-1) == rows.top_ids[..., 0]).float().mean())
            for m in (AdapterModule(model), module)
        ]
    assert right[1] > right[0], right
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.get_tensor("q_proj.weight").dtype == model.config.dtype
    assert not list(tmp_path.glob("*.new"))


def test_it_starts_as_the_last_layers_attention(tiny: Callable[..., Decoder]) -> None:
    model = tiny("llama", **SHAPES["llama"])
    adapter, length = AdapterModule(model), 9
    stream = torch.randn(1, length, model.config.hidden_size)
    blocks = -(-length // PAGE_SIZE)
    layout = model.config.kv_layout()
    tables = [
        np.arange(group.head_groups * blocks, dtype=np.int32).reshape(1, -1, blocks)
        for group in layout.groups
    ]
    storage = KVStorage(layout, [table.size for table in tables])
    batch = Batch.build([Segment(0, 0, [0] * length)], tables)
    attended = model.layers[-1].attend(stream[0], PagedKV(storage, batch))  # type: ignore[attr-defined]
    with torch.no_grad():
        torch.testing.assert_close(
            adapter(stream)[0], adapter.output_norm(stream[0] + attended), rtol=2e-2, atol=2e-2
        )


def test_without_such_attention_it_starts_as_a_plain_exit(tiny: Callable[..., Decoder]) -> None:
    """Two norms of ones around an attention that writes nothing: the head reads the same."""
    model = tiny("deepseek_v2", **SHAPES["deepseek_v2"])
    stream = torch.randn(2, 9, model.config.hidden_size)
    head = TeacherHead(model)
    with torch.no_grad():
        torch.testing.assert_close(
            head(AdapterModule(model)(stream)), head(stream), rtol=1e-3, atol=1e-3
        )


def test_an_exit_needs_layers_behind_it(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    model = tiny("llama", **SHAPES["llama"])
    with pytest.raises(ValueError, match=r"1\.\.3"):
        train_adapter(model, texts(), tmp_path / "a", tmp_path, AdapterRun(layer=4))


@pytest.mark.parametrize(("layers", "exit"), [(2, 1), (6, 1), (24, 2), (32, 2), (80, 5)])
def test_one_layer_in_16_is_the_exit_of_a_run_that_names_none(layers: int, exit: int) -> None:
    assert AdapterRun().exit(layers) == exit
