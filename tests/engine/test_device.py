"""A model on a device: whole passes in Triton kernels, and CUDA graphs where there is a GPU."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from hasten.cache.layout import PAGE_SIZE, KVStorage
from hasten.engine import cuda_graph
from hasten.engine.batch import Batch, Segment
from hasten.engine.cuda_graph import DeviceRunner
from hasten.engine.executor import Moves, Output, Runner
from hasten.kernels import dispatch
from hasten.models.base import Decoder
from hasten.models.device import place
from hasten.speculation.tree import TokenTree
from tests.kernels.triton_device import DEVICE

LENGTH = 128
Tiny = Callable[..., Decoder]

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class World:
    """A model on the CPU and a copy of it on the device, each with pages for some sequences."""

    def __init__(self, model: Decoder, sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        layout = model.config.kv_layout()
        blocks = LENGTH // PAGE_SIZE
        rng = np.random.default_rng(random.randrange(2**31))
        self.tables = [
            rng.permutation(sequences * g.head_groups * blocks)
            .astype(np.int32)
            .reshape(sequences, g.head_groups, blocks)
            for g in layout.groups
        ]
        pages = [table.size for table in self.tables]
        self.cpu = Runner(model, KVStorage(layout, pages))
        self.model = place(copy.deepcopy(model), torch.device(DEVICE))
        storage = KVStorage(layout, pages, torch.device(DEVICE))
        self.device = DeviceRunner(self.model, storage, LENGTH, graphs=False)

    def run(self, segments: list[Segment], runner: Runner | None = None) -> Output:
        """On the device (or another runner for it), with Triton kernels wherever it is."""
        with self.monkeypatch.context() as m:
            m.setattr(dispatch, "forced", "triton")
            return (runner or self.device).run(Batch.build(segments, self.tables))

    def both(self, segments: list[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
        expected = self.cpu.run(Batch.build(segments, self.tables))
        return self.run(segments).logits, expected.logits


@pytest.fixture(autouse=True)
def short_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs for the interpreter to go through; no bit depends on it."""
    monkeypatch.setattr(cuda_graph, "LEAST_BLOCKS", 4)


def tokens(count: int) -> list[int]:
    return [random.randrange(61) for _ in range(count)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_passes_match_the_cpu(name: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, single tokens and a tree in ragged steps; then the accepted path is moved."""
    changes = {"gemma2": {"sliding_window": 7, "hidden_activation": "gelu_pytorch_tanh"}}
    world = World(tiny(name, **changes.get(name, {})), 2, monkeypatch)
    tree = TokenTree([5, 6, 7, 8], [-1, 0, 0, 2])
    steps = [
        [Segment(0, 0, tokens(9), wanted="all"), Segment(1, 0, tokens(3))],
        [Segment(0, 9, [5], tree=tree), Segment(1, 3, tokens(1))],
    ]
    for segments in steps:
        got, expected = world.both(segments)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)
    # the path 5, 7, 8 is accepted: its rows go from slots 11 and 12 to 10 and 11
    moves = Moves([0, 0], [11, 12], [10, 11])
    batch = Batch.build(steps[1], world.tables)
    world.cpu.move(batch.tables, moves)
    with monkeypatch.context() as m:
        m.setattr(dispatch, "forced", "triton")
        world.device.move(batch.tables, moves)
    got, expected = world.both([Segment(0, 12, tokens(1))])
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)


def test_a_sequence_has_the_same_bits_in_any_step(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tokens(6)
    alone = World(tiny(), 3, monkeypatch)
    expected = [alone.run([Segment(0, 0, text[:4], wanted="all")]).logits]
    expected += [alone.run([Segment(0, i, [text[i]])]).logits for i in (4, 5)]
    whole = torch.cat(expected)
    among = World(tiny(), 3, monkeypatch)
    others = [Segment(1, 0, tokens(5), wanted="none"), Segment(2, 0, tokens(2))]
    got = among.run([others[0], Segment(0, 0, text, wanted="all"), others[1]]).logits
    assert torch.equal(got[:6].view(torch.int32), whole.view(torch.int32))


def test_hidden_states_and_embeddings_come_back(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tiny(), 1, monkeypatch)
    batch = Batch.build([Segment(0, 0, tokens(3), wanted="embedding")], world.tables)
    expected = world.cpu.run(batch, capture=[0])
    with monkeypatch.context() as m:
        m.setattr(dispatch, "forced", "triton")
        got = world.device.run(batch, capture=[0])
    torch.testing.assert_close(got.embeddings, expected.embeddings, atol=2e-4, rtol=0)
    torch.testing.assert_close(got.hidden[0], expected.hidden[0], atol=2e-4, rtol=0)
    assert len(got.logits) == 0


def test_pages_are_copied(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tiny(), 2, monkeypatch)
    world.run([Segment(0, 0, tokens(3))])
    a, b = int(world.tables[0][0, 0, 0]), int(world.tables[0][1, 0, 0])
    with monkeypatch.context() as m:
        m.setattr(dispatch, "forced", "triton")
        world.device.copy([(0, a, b)])
    for pages in (world.device.storage.k[0], world.device.storage.v[0]):
        assert torch.equal(pages[:, a], pages[:, b])
        assert pages[:, a].any()


def test_a_batch_is_checked_before_it_is_sent(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tiny(), 1, monkeypatch)
    with pytest.raises(IndexError, match="row 1 is token 61, but there are 61"):
        world.run([Segment(0, 0, [3, 61])])
    with pytest.raises(ValueError, match="beyond the length"):
        world.run([Segment(0, LENGTH, [3])])
    world.tables[0][0, 0, 0] = -1
    with pytest.raises(ValueError, match="no page"):
        world.run([Segment(0, 0, [3])])


def test_tied_weights_stay_one(tiny: Tiny) -> None:
    model = place(copy.deepcopy(tiny(tie_word_embeddings=True)), torch.device(DEVICE))
    assert model.output.weight is model.embedding


def test_experts_are_refused(tiny: Tiny) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(TypeError, match="no Triton kernel reads weights of the kind Expert"):
        place(tiny("mixtral", seed=777, **experts), torch.device(DEVICE))  # no other test has it


def test_a_graph_needs_a_gpu(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device, not cpu"):
        DeviceRunner(tiny(), None, LENGTH, graphs=True)  # type: ignore[arg-type]


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_graphs_equal_the_pass_kernel_by_kernel(
    name: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 1 to 5 rows, in and out of order, over the ends of pages and of tables."""
    changes = {"gemma2": {"sliding_window": 7, "hidden_activation": "gelu_pytorch_tanh"}}
    world = World(tiny(name, **changes.get(name, {})), 5, monkeypatch)
    graphs = DeviceRunner(world.model, copy.deepcopy(world.device.storage), LENGTH)
    lengths = [0] * 5
    for step in range(120):
        rows = random.sample(range(5), random.randint(1, 5))
        rows = [row for row in rows if lengths[row] < LENGTH]
        segments = [Segment(row, lengths[row], tokens(1)) for row in rows]
        for row in rows:
            lengths[row] += 1
        if segments:
            got, expected = world.run(segments, graphs).logits, world.run(segments).logits
            assert torch.equal(got.view(torch.int32), expected.view(torch.int32)), step
    assert any(step is not None for step in graphs._steps.values()), "no graph was replayed"
