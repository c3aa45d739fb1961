"""Forward passes kept as lists of native calls, so that a step of few rows is one call.

A model's forward is Python that calls kernels, some ten a layer. With few rows the interpreter, the
allocation of results and the checks of arguments would cost as much as a small model's arithmetic.
So the first pass of a shape is recorded: its inputs lie in arrays that stay where they are, and the
calls that it makes are kept with their arguments. Later passes of the shape fill in the inputs and
replay the calls, without the interpreter and its lock. What rows, tables and masks say is checked
and planned inside the calls, so nothing of it is fixed by the recording.

While a pass is recorded, torch may allocate and make views, nothing else: a result that torch or
Python computed from the rows would silently be that of the recorded step. A model that needs more
runs unrecorded, and `Recorder.refused` says why. (The idea is that of CUDA graphs.)
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hasten import _native
from hasten.cache.layout import LINE, KVStorage
from hasten.engine.batch import Batch
from hasten.kernels.logits import row_max_lse
from hasten.models.base import Decoder
from hasten.models.paged import PagedKV

MAX_ROWS = 16
"""Steps of more rows run unrecorded: their arithmetic outweighs the calls."""

MAX_RECORDINGS = 64
"""Shapes that are kept; the one longest unused goes."""

INPUTS = ("tokens", "positions", "slots", "table_row", "base", "mask", "wanted")
"""The arrays of a batch that a pass reads, beside the page tables."""


class Refused(Exception):
    """A forward pass computed something outside of the kernels."""


@dataclass(slots=True)
class Choices:
    """Logits of the wanted rows and what greedy decoding needs of them.

    They are valid until the next pass: recorded passes share their memory.

    Attributes:
        logits: float32 [n, V].
        best: int64 [n], the largest logit's lowest id.
        lse: float32 [n], log of the sum of exponentials.
    """

    logits: Tensor
    best: Tensor
    lse: Tensor


def choices(model: Decoder, batch: Batch, kv: PagedKV) -> Choices:
    """One pass over a batch, up to its logits."""
    logits = model.logits(model.forward(batch, kv), batch.wanted)
    best, _, lse = row_max_lse(logits)
    return Choices(logits, best, lse)


@dataclass(slots=True)
class _Recording:
    batch: Batch  # its arrays are the inputs
    kv: PagedKV  # holds the angles that the calls refer to
    tape: _native.Tape
    choices: Choices


class Recorder:
    """Runs batches of one model and one storage, from recordings where it can."""

    def __init__(self, model: Decoder, storage: KVStorage) -> None:
        self.model = model
        self.storage = storage
        self.refused: str | None = None
        """Why nothing is recorded, if so."""
        if os.environ.get("HASTEN_RECORD") == "0":
            self.refused = "HASTEN_RECORD=0"
        self._recordings: OrderedDict[tuple[int, ...], _Recording] = OrderedDict()
        self._memory = _Memory()

    def run(self, batch: Batch) -> Choices | None:
        """Logits of the wanted rows, or None where the batch must run unrecorded."""
        rows = len(batch.tokens)
        if self.refused is not None or rows > MAX_ROWS or len(batch.embedded):
            return None
        key = (rows, len(batch.wanted), batch.mask.shape[1])
        found = self._recordings.get(key)
        if found is None or not _fits(found, batch):
            return self._record(key, batch)
        self._recordings.move_to_end(key)
        for name in INPUTS:
            getattr(found.batch, name)[:] = getattr(batch, name)
        found.tape.replay()
        return found.choices

    def _record(self, key: tuple[int, ...], batch: Batch) -> Choices | None:
        own = Batch(*(getattr(batch, f.name) for f in fields(Batch)))
        for name in INPUTS:
            setattr(own, name, getattr(batch, name).copy())
        kv, tape = PagedKV(self.storage, own), _native.Tape()
        for rope in self.model.ropes:
            rope.tables(kv.length)  # grow now: torch computes them
        self._memory.reuse()
        try:
            with _KernelsOnly(self._memory):
                tape.record()
                try:
                    result = choices(self.model, own, kv)
                finally:
                    tape.stop()
        except Refused as error:
            self.refused = str(error)
            self._recordings.clear()
            return None
        self._recordings[key] = _Recording(own, kv, tape, result)
        self._recordings.move_to_end(key)
        if len(self._recordings) > MAX_RECORDINGS:
            self._recordings.popitem(last=False)
        return result


def _fits(recording: _Recording, batch: Batch) -> bool:
    """Whether the page tables and the angles are those that the recorded calls refer to."""
    same = all(a is b for a, b in zip(recording.batch.tables, batch.tables, strict=True))
    return same and batch.positions.max() < recording.kv.angles


class _KernelsOnly(TorchDispatchMode):
    """Lets torch make views and allocate, from memory that stays; all else is refused."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self.memory = memory

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler with the first operation, for a second

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        if func is torch.ops.aten.empty.memory_format:
            return self.memory.empty(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        raise Refused(f"the model computes with {func} outside of the kernels")


class _Memory:
    """Tensors for recorded passes, of which only one runs at a time.

    All passes share the memory, and within a pass what is no longer referred to is used again, so
    that it takes about twice what the largest pass needs at once. Sizes are rounded to powers of
    two; pages of memory that are never written stay unused.
    """

    def __init__(self) -> None:
        self._all: list[NDArray[np.uint8]] = []
        self._free: defaultdict[int, list[NDArray[np.uint8]]] = defaultdict(list)

    def reuse(self) -> None:
        """A new pass begins; it may overwrite what the ones before it left."""
        self._free = defaultdict(list)
        for buffer in self._all:
            self._free[len(buffer)].append(buffer)

    def empty(self, shape: Any, dtype: torch.dtype) -> Tensor:
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        size = 1 << max(12, (count - 1).bit_length())
        free = self._free[size]
        if not free:
            memory = np.empty(size + LINE, np.uint8)
            start = -memory.ctypes.data % LINE
            free.append(memory[start : start + size])
            self._all.append(free[-1])
        buffer = free.pop()
        # torch holds this view as long as any tensor refers to its memory
        view = buffer[:count]
        weakref.finalize(view, free.append, buffer).atexit = False
        return torch.from_numpy(view).view(dtype).view(tuple(shape))
