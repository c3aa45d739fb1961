"""Running batches on a device: uploads, the forward pass, and CUDA graphs of decode steps.

A decode step launches some ten kernels a layer, each of a few microseconds, so for few rows the
host would take longer than the device. A CUDA graph launches them all at once. It replays the same
kernels on the same buffers, so its results are those of the pass that was captured, bit for bit;
a step is written into the buffers first.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.cache.layout import PAGE_SIZE, KVStorage
from hasten.engine.batch import Batch
from hasten.engine.executor import Begun, Moves, Output, Runner
from hasten.kernels.logits import row_max_lse
from hasten.kernels.pages import copy_pages, move_slots
from hasten.kernels.rows import take_rows
from hasten.models.base import Decoder
from hasten.models.paged import PagedKV

LEAST_BLOCKS = 32
"""Blocks of the shortest page table that a step is given (512 positions)."""
MOST_ROWS = 64
"""Rows of the largest step that becomes a graph: with more the device is busy long enough."""
MOST_GRAPHS = 64
"""Graphs that are kept, the least recently used goes first. They share their scratch memory."""


@dataclass(slots=True)
class Inputs:
    """The row arrays of a batch on a device, with the page tables of its sequences only.

    Tables have a power of two of blocks: kernels are launched for that many, so that steps of
    similar lengths are one graph. Blocks beyond a sequence hold no page and are never read.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    table_row: Tensor
    base: Tensor
    mask: Tensor
    tables: list[Tensor]

    @classmethod
    def upload(cls, batch: Batch, device: torch.device) -> Inputs:
        return cls(*(_to(part, device) for part in host_arrays(batch)))

    def copy_from(self, batch: Batch) -> None:
        """Overwrite with another batch of the same shapes."""
        mine = (self.tokens, self.positions, self.slots, self.table_row, self.base, self.mask)
        *arrays, tables = host_arrays(batch)
        for to, array in zip([*mine, *self.tables], [*arrays, *tables], strict=True):
            to.copy_(torch.from_numpy(array))

    @property
    def blocks(self) -> int:
        return self.tables[0].shape[2]


def _to(part: Any, device: torch.device) -> Any:
    if isinstance(part, list):
        return [_to(inner, device) for inner in part]
    return torch.from_numpy(part).to(device)


def host_arrays(batch: Batch) -> tuple[Any, ...]:
    """What `Inputs` holds, as numpy arrays, the page tables cut to what the rows need."""
    used, table_row = np.unique(batch.table_row, return_inverse=True)
    longest = max(int(batch.base.max()), int(batch.slots.max()) + 1) if batch.num_rows else 0
    blocks = max(LEAST_BLOCKS, 1 << (-(-longest // PAGE_SIZE) - 1).bit_length())
    tables = []
    for table in batch.tables:
        cut = np.full((len(used), table.shape[1], blocks), -1, np.int32)
        width = min(blocks, table.shape[2])
        cut[:, :, :width] = table[used, :, :width]
        tables.append(cut)
    rows = table_row.astype(np.int32).reshape(-1)
    return batch.tokens, batch.positions, batch.slots, rows, batch.base, batch.mask, tables


class DeviceKV(PagedKV):
    """`PagedKV` over row arrays that are on the device."""

    def __init__(self, storage: KVStorage, inputs: Inputs, length: int) -> None:
        self.storage = storage
        self.length = length
        self.positions = inputs.positions
        self.slots = inputs.slots
        self.table_row = inputs.table_row
        self.base = inputs.base
        self.mask = inputs.mask
        self.tables = inputs.tables
        self._angles = {}


@dataclass(slots=True)
class _Step:
    """A captured step: what it reads, what it writes, and the graph between them."""

    inputs: Inputs
    logits: Tensor
    best: Tensor
    lse: Tensor
    graph: torch.cuda.CUDAGraph


class DeviceRunner(Runner):
    """A model whose weights and pages are on a device; results come back to the host.

    Decode steps of up to `MOST_ROWS` rows run as CUDA graphs, one for each number of rows and
    power of two of blocks, captured when such a step comes the second time. Everything else
    (prompts, trees, hidden states) runs kernel by kernel.
    """

    def __init__(
        self, model: Decoder, storage: KVStorage, length: int, graphs: bool | None = None
    ) -> None:
        """``length`` is the longest sequence: tables of angles never grow under a graph.

        ``graphs``: None = where the device is a GPU.
        """
        # no `Recorder`: what it does for the CPU, graphs do here
        self.model = model
        self.storage = storage
        self.device = model.device
        self.length = length
        self.graphs = self.device.type == "cuda" if graphs is None else graphs
        if self.graphs and self.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, not {self.device}")
        self._steps: OrderedDict[tuple[int, int], _Step | None] = OrderedDict()
        self._pool: Any = None

    def run(
        self, batch: Batch, capture: Collection[int] = (), begun: Sequence[Begun] = ()
    ) -> Output:
        if begun:
            raise NotImplementedError("self-speculation runs on the CPU only")
        start = time.perf_counter()
        self._check(batch)
        plain = not (capture or len(batch.embedded) or batch.mask.shape[1])
        decode = plain and 0 < len(batch.wanted) == batch.num_rows <= MOST_ROWS
        # one row a sequence, so that a graph's page tables have as many rows as the step
        decode = decode and len(batch.segment_rows) == batch.num_rows + 1
        if self.graphs and decode:
            output = self._run_graph(batch)
        else:
            output = self._run(Inputs.upload(batch, self.device), batch, capture)
        output.seconds = time.perf_counter() - start  # results are on the host, so all is done
        return output

    def _run(self, inputs: Inputs, batch: Batch, capture: Collection[int] = ()) -> Output:
        kv = DeviceKV(self.storage, inputs, self.length)
        hidden = self.model.forward(batch, kv, hidden=self._embedded(inputs), capture=capture)
        rows = hidden.rows
        if len(batch.wanted) < len(rows):
            rows = take_rows(rows, self._index(batch.wanted))
        logits = self.model.head(rows)
        best, _, lse = row_max_lse(logits)
        embedded = hidden.rows[:0]
        if len(batch.embedded):
            embedded = self.model.final_norm(take_rows(hidden.rows, self._index(batch.embedded)))
        captured = {layer: stream.cpu() for layer, stream in hidden.captured.items()}
        return Output(logits.cpu(), best.cpu(), lse.cpu(), embedded.cpu(), captured, 0.0)

    def _embedded(self, inputs: Inputs) -> Tensor:
        return self.model.embed(inputs.tokens)

    def _index(self, rows: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(rows).to(self.device)

    def _run_graph(self, batch: Batch) -> Output:
        inputs = Inputs.upload(batch, self.device)
        key = batch.num_rows, inputs.blocks
        step = self._steps.get(key)
        if step is None:
            # the first such step runs kernel by kernel, which also compiles what is not yet
            output = self._run(inputs, batch)
            if key in self._steps:
                self._steps[key] = self._capture(inputs, batch)
            else:
                self._steps[key] = None
        else:
            step.inputs.copy_from(batch)
            step.graph.replay()
            none = torch.empty((0, self.model.config.hidden_size))
            output = Output(step.logits.cpu(), step.best.cpu(), step.lse.cpu(), none, {}, 0.0)
        self._steps.move_to_end(key)
        if len(self._steps) > MOST_GRAPHS:
            self._steps.popitem(last=False)
        return output

    def _capture(self, inputs: Inputs, batch: Batch) -> _Step:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        kv = DeviceKV(self.storage, inputs, self.length)
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self.model.forward(batch, kv, hidden=self._embedded(inputs))
            logits = self.model.head(hidden.rows)
            best, _, lse = row_max_lse(logits)
        return _Step(inputs, logits, best, lse, graph)

    def _check(self, batch: Batch) -> None:
        """What kernels on the CPU check themselves; on a device nothing can raise."""
        vocabulary = self.model.config.vocab_size
        wrong = (batch.tokens < 0) | (batch.tokens >= vocabulary)
        if wrong.any():
            row = int(wrong.argmax())
            raise IndexError(
                f"row {row} is token {int(batch.tokens[row])}, but there are {vocabulary}"
            )
        if batch.num_rows and not 0 <= int(batch.positions.max()) < self.length:
            raise ValueError(
                f"position {int(batch.positions.max())} is beyond the length {self.length}"
            )
        block = batch.slots // PAGE_SIZE
        for table in batch.tables:
            if ((block < 0) | (block >= table.shape[2])).any() or (
                table[batch.table_row, :, block] < 0
            ).any():
                raise ValueError("a slot lies in a block that holds no page")

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        for group in {g for g, _, _ in copies}:
            pairs = torch.tensor([(s, d) for g, s, d in copies if g == group]).to(self.device)
            src, dst = pairs.T.contiguous()
            copy_pages(self.storage.k[group], self.storage.v[group], src, dst)

    def move(self, tables: Sequence[NDArray[np.int32]], moves: Moves) -> None:
        lists = torch.tensor([moves.table_row, moves.src, moves.dst], dtype=torch.int32)
        rows, src, dst = lists.to(self.device)
        for group, table in enumerate(tables):
            pages = torch.from_numpy(table).to(self.device)
            move_slots(self.storage.k[group], self.storage.v[group], pages, rows, src, dst)


def runner_for(model: Decoder, storage: KVStorage, length: int) -> Runner:
    """The runner for where the model is; ``length`` is the longest sequence."""
    if model.device.type == "cpu":
        return Runner(model, storage)
    return DeviceRunner(model, storage, length)
