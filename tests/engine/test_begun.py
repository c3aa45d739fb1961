"""Rows that ran through the first layers before the step: the bits of the plain pass, and no layer
twice."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hasten.cache.layout import PAGE_SIZE, KVStorage
from hasten.engine.batch import Batch, Segment
from hasten.engine.executor import Begun, Runner
from hasten.models.base import Decoder
from hasten.speculation.tree import TokenTree

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "qwen3_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
}
LAYERS, PROMPT, BLOCKS = 4, 19, 4


class World:
    """A runner with pages for some sequences, each with a prompt that has been computed."""

    def __init__(self, model: Decoder, seed: int) -> None:
        self.model = model
        rng = random.Random(seed)
        vocab = model.config.vocab_size
        self.prompts = [[rng.randrange(2, vocab) for _ in range(PROMPT + i)] for i in range(4)]
        layout = model.config.kv_layout()
        pages = [4 * BLOCKS * group.head_groups for group in layout.groups]
        self.tables = [
            np.arange(count, dtype=np.int32).reshape(4, group.head_groups, BLOCKS)
            for count, group in zip(pages, layout.groups, strict=True)
        ]
        self.runner = Runner(model, KVStorage(layout, pages))
        assert self.runner.recorder is not None
        self.runner.recorder.refused = "layers are counted"
        known = [Segment(i, 0, p[:-1], wanted="none") for i, p in enumerate(self.prompts[:3])]
        self.runner.run(Batch.build(known, self.tables))

    def segments(self, trees: list[TokenTree]) -> list[Segment]:
        """Two drafts, a plain decode and a prompt chunk."""
        found = [
            Segment(i, len(p) - 1, p[-1:], tree)
            for i, (p, tree) in enumerate(zip(self.prompts, [*trees, None, None], strict=True))
        ]
        found[3] = Segment(3, 0, self.prompts[3], wanted="last")
        return found

    def first_layers(self, row: int, tree: TokenTree, layers: int) -> torch.Tensor:
        """Run a chain token by token, as a draft does."""
        states = []
        for node, token in enumerate(tree.token):
            segment = Segment(row, len(self.prompts[row]) - 1 + node, [token])
            batch = Batch.build([segment], self.tables)
            states.append(self.runner.run_layers(batch, range(layers)))
        return torch.cat(states)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("depths", [(1, 1), (2, 3), (3, 1)])
def test_split_passes_have_the_bits_of_a_whole_one(
    tiny: Callable[..., Decoder], kind: str, depths: tuple[int, int]
) -> None:
    model = tiny(kind, num_hidden_layers=LAYERS, **MODELS[kind])
    rng = random.Random(str(depths))
    trees = [TokenTree.chain([0, *(rng.randrange(2, 61) for _ in range(n))]) for n in (3, 1)]
    plain, split = World(model, 1), World(model, 1)
    for tree, prompt in zip(trees, plain.prompts, strict=False):
        tree.token[0] = prompt[-1]
    capture = range(LAYERS)
    batch = Batch.build(plain.segments(trees), plain.tables)
    expected = plain.runner.run(batch, capture)

    begun, first = [], [0, len(trees[0])]
    for row, (tree, layers) in enumerate(zip(trees, depths, strict=True)):
        begun.append(Begun(first[row], layers, split.first_layers(row, tree, layers)))
    found = split.runner.run(Batch.build(split.segments(trees), split.tables), capture, begun)

    assert torch.equal(found.logits, expected.logits)
    for pages, whole in zip(split.runner.storage.k, plain.runner.storage.k, strict=True):
        assert torch.equal(pages, whole)
    for pages, whole in zip(split.runner.storage.v, plain.runner.storage.v, strict=True):
        assert torch.equal(pages, whole)
    started = torch.zeros(batch.num_rows, dtype=torch.long)
    for part in begun:
        started[part.first : part.first + len(part.hidden)] = part.layers
    for layer in capture:
        ran = started <= layer
        assert torch.equal(found.hidden[layer][ran], expected.hidden[layer][ran])
        assert found.hidden[layer][~ran].isnan().all()


def test_no_layer_runs_twice_over_a_row(
    tiny: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", num_hidden_layers=LAYERS)
    world = World(model, 2)
    rows: Counter[int] = Counter()
    layer = model.layer

    def counted(index: int, hidden: torch.Tensor, kv: Any) -> torch.Tensor:
        rows[index] += len(hidden)
        return layer(index, hidden, kv)

    monkeypatch.setattr(model, "layer", counted)
    trees = [TokenTree.chain([p[-1], 5, 6, 7]) for p in world.prompts[:2]]
    begun = [Begun(4 * i, 2, world.first_layers(i, tree, 2)) for i, tree in enumerate(trees)]
    batch = Batch.build(world.segments(trees), world.tables)
    world.runner.run(batch, begun=begun)
    assert set(rows.values()) == {batch.num_rows}
    assert PROMPT + 4 < BLOCKS * PAGE_SIZE
