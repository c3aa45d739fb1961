"""Running batches: the runner that owns a model and its pages, and the handle of a batch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.cache.layout import KVStorage
from hasten.engine.batch import Batch
from hasten.engine.recording import Recorder
from hasten.kernels.logits import row_max_lse
from hasten.kernels.pages import copy_pages, move_slots
from hasten.models.base import Decoder, Hidden
from hasten.models.paged import PagedKV


@dataclass(slots=True)
class Output:
    """What a batch gives back.

    Attributes:
        logits: float32 [len(batch.wanted), vocabulary]; valid until the next batch runs.
        best: int64 [len(batch.wanted)], id of each row's largest logit, the lowest of equals.
        lse: float32 [len(batch.wanted)], log of the sum of exponentials of each row.
        embeddings: float32 [len(batch.embedded), hidden], normed.
        hidden: layer index -> float32 [rows, hidden], for the layers that were asked for.
        seconds: time in the model's forward.
        recorded: whether it ran as one native call.
    """

    logits: torch.Tensor
    best: torch.Tensor
    lse: torch.Tensor
    embeddings: torch.Tensor
    hidden: dict[int, torch.Tensor]
    seconds: float
    recorded: bool = False


@dataclass(slots=True)
class Moves:
    """Rows to move after verification, per table row ascending: slots ``src`` -> ``dst``."""

    table_row: list[int]
    src: list[int]
    dst: list[int]


@dataclass(frozen=True, slots=True)
class Begun:
    """Rows that ran through the first layers already (their keys and values are stored).

    Attributes:
        first: the first of consecutive rows of a batch.
        layers: how many layers ran.
        hidden: float32 [n, H], the residual stream after them.
    """

    first: int
    layers: int
    hidden: torch.Tensor


class Handle(Protocol):
    """A submitted batch. Several may be in flight on an executor that overlaps."""

    def result(self) -> Output:
        """Wait for the batch."""
        ...


class Executor(Protocol):
    """Runs batches in the order of submission.

    A batch refers to the live page tables. Between its submission and its result nothing may
    change the tables of its rows: an engine that plans ahead commits, releases and reserves only
    for sequences of no batch in flight, or gives the batch a copy of their tables.
    """

    def submit(
        self,
        batch: Batch,
        copies: Sequence[tuple[int, int, int]] = (),
        capture: Collection[int] = (),
        begun: Sequence[Begun] = (),
    ) -> Handle: ...

    def run_layers(
        self, batch: Batch, layers: range, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run some layers over the rows of a batch, which store their keys and values, and return
        the residual stream float32 [R, H] after them. ``hidden`` is the stream before them, by
        default the embedded tokens. Ordered like a submitted batch."""
        ...

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy pages, (layer group, from, to); ordered like a submitted batch."""
        ...

    def move(self, batch: Batch, moves: Moves) -> None:
        """Compact accepted tree rows; ordered after every submitted batch."""
        ...


class Runner:
    """A model with its page tensors."""

    recorder: Recorder | None = None

    def __init__(self, model: Decoder, storage: KVStorage) -> None:
        self.model = model
        self.storage = storage
        self.recorder = Recorder(model, storage)

    def run(
        self, batch: Batch, capture: Collection[int] = (), begun: Sequence[Begun] = ()
    ) -> Output:
        start = time.perf_counter()
        recorder = self.recorder
        if recorder and not capture and not begun and (found := recorder.run(batch)) is not None:
            logits, best, lse = found.logits, found.best, found.lse
            seconds = time.perf_counter() - start
            return Output(logits, best, lse, logits[:0], {}, seconds, recorded=True)
        if begun:
            out = self._finish(batch, capture, begun)
        else:
            out = self.model.forward(batch, PagedKV(self.storage, batch), capture=capture)
        logits = self.model.logits(out, batch.wanted)
        best, _, lse = row_max_lse(logits)
        embeddings = self.model.embeddings(out, batch.embedded)
        seconds = time.perf_counter() - start
        return Output(logits, best, lse, embeddings, out.captured, seconds)

    def run_layers(
        self, batch: Batch, layers: range, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Executor.run_layers`."""
        kv = PagedKV(self.storage, batch)
        return self.model.forward(batch, kv, layers=layers, hidden=hidden).rows

    def _finish(self, batch: Batch, capture: Collection[int], begun: Sequence[Begun]) -> Hidden:
        """A forward pass that some rows join where they stopped.

        A row computes the same whoever runs with it, so these are the bits of the plain pass.
        """
        depth = np.zeros(batch.num_rows, np.int64)
        joining: dict[int, list[Begun]] = defaultdict(list)
        for part in begun:
            depth[part.first : part.first + len(part.hidden)] = part.layers
            joining[part.layers].append(part)
        stream = torch.empty(batch.num_rows, self.model.config.hidden_size)
        # layers that no row runs any more are captured, too: as numbers that are none
        captured = {layer: torch.full_like(stream, torch.nan) for layer in capture}
        stops = sorted({0, *joining, self.model.config.num_layers})
        for first, last in pairwise(stops):
            for part in joining[first]:
                stream[part.first : part.first + len(part.hidden)] = part.hidden
            rows = np.flatnonzero(depth <= first)
            if not len(rows):
                continue
            some = batch.take(rows)
            index = torch.from_numpy(rows)
            out = self.model.forward(
                some,
                PagedKV(self.storage, some),
                layers=range(first, last),
                hidden=stream[index] if first else None,
                capture=[layer for layer in capture if first <= layer < last],
            )
            stream[index] = out.rows
            for layer, hidden in out.captured.items():
                captured[layer][index] = hidden
        return Hidden(stream, captured)

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy whole pages, (layer group, from, to), over all layers of the group."""
        for group in {g for g, _, _ in copies}:
            src = torch.tensor([s for g, s, _ in copies if g == group])
            dst = torch.tensor([d for g, _, d in copies if g == group])
            copy_pages(self.storage.k[group], self.storage.v[group], src, dst)

    def move(self, tables: Sequence[NDArray[np.int32]], moves: Moves) -> None:
        """Move rows within their sequences, over all layers."""
        rows, src, dst = (
            torch.tensor(x, dtype=torch.int32) for x in (moves.table_row, moves.src, moves.dst)
        )
        for group, table in enumerate(tables):
            move_slots(
                self.storage.k[group],
                self.storage.v[group],
                torch.from_numpy(table),
                rows,
                src,
                dst,
            )


class InlineExecutor:
    """Runs each batch at once, in the calling thread."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def submit(
        self,
        batch: Batch,
        copies: Sequence[tuple[int, int, int]] = (),
        capture: Collection[int] = (),
        begun: Sequence[Begun] = (),
    ) -> Handle:
        self.runner.copy(copies)
        return _Done(self.runner.run(batch, capture, begun))

    def run_layers(
        self, batch: Batch, layers: range, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.runner.run_layers(batch, layers, hidden)

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        self.runner.copy(copies)

    def move(self, batch: Batch, moves: Moves) -> None:
        self.runner.move(batch.tables, moves)


@dataclass(slots=True)
class _Done:
    output: Output

    def result(self) -> Output:
        return self.output
