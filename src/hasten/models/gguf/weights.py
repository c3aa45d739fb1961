"""The tensors of a GGUF file under the names of the Hugging Face layout."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterator
from itertools import chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from hasten.kernels.linear import (
    BLOCK_KINDS,
    StackedWeight,
    Weight,
    pack_blocks,
    pack_rows,
)
from hasten.models.facts import CheckpointError, Facts
from hasten.models.gguf.architectures import Source, architecture_of, source_of
from hasten.models.gguf.blocks import CHUNK_VALUES, READABLE, expand
from hasten.models.gguf.file import GGUF, Kind, Part, Stored
from hasten.weights.base import Matrix, WeightFormat
from hasten.weights.checkpoint import Checkpoint

RELEASE_BYTES = 512 << 20  # read so much of a file, then let its pages go

LATENT_UP = ".kv_b_proj.weight"
UNNEEDED = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Read with the metadata, for the rotary embedding."""


class Blocks(NamedTuple):
    """A tensor as stored: rows uint8 [..., bytes of a row], made of blocks of ``kind``."""

    kind: Kind
    rows: Tensor


class GGUFWeights:
    """The tensors of a file, read through its memory map, one at a time.

    ``get`` gives numbers, ``blocks`` what is stored, both in the order of rows of the layout.
    ``dtype`` is that of the matrices: where it is left open float32 if all are stored as float32
    or float16, else bfloat16.
    """

    def __init__(
        self,
        gguf: GGUF,
        facts: Facts,
        dtype: torch.dtype | None,
        format: WeightFormat | None = None,
    ) -> None:
        self.gguf = gguf
        self.unread = set(gguf.tensors) - UNNEEDED
        self._architecture = architecture_of(gguf)
        self._heads = facts.count("num_attention_heads")
        self._kv_heads = facts.count("num_key_value_heads", self._heads)
        self._bytes = {part: _bytes_of(part) for part in gguf.parts()}
        self._since_release = 0
        matrices = {t.kind.name for t in gguf.tensors.values() if len(t.shape) > 1}
        exact = matrices <= {"F32", "F16"}
        self.dtype = dtype or (torch.float32 if exact else torch.bfloat16)
        self.format = format or Checkpoint()

    def total_bytes(self) -> int:
        """Bytes of all tensors, for the progress bar."""
        return sum(tensor.nbytes for tensor in self.gguf.tensors.values())

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that name: plain types as stored, blocks expanded to ``dtype``.

        Vectors are float32 in either case.
        """
        if name.endswith(LATENT_UP) and self._is_split(name):
            return self._latent_up(name, shape)
        source, (kind, rows) = self._read(name, shape)
        dtype = self.dtype if len(shape) > 1 else torch.float32
        values = expand(kind, rows, dtype)
        if source.shift:
            values = values.float() - source.shift
        return values

    def rows(self, name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
        """A matrix as ``get`` gives it, some rows at a time: expanded blocks are far larger than
        the file, and need not be held beside what is made of them."""
        kind, rows = self._read(name, shape)[1]
        step = max(16, CHUNK_VALUES // shape[1] // 16 * 16)  # whole panels
        return (
            expand(kind, rows[start : start + step], self.dtype)
            for start in range(0, shape[0], step)
        )

    def stored(self, wanted: Matrix) -> Weight | None:
        """The matrix as the blocks of the file, where kernels compute on blocks of its types.

        Projections of different types are stacked as they are, those of other types expanded;
        not so a gate and what it multiplies, of which files have one type. A router is expanded.
        """
        names = {f"{name}.weight": rows for name, rows in wanted.outputs.items()}
        split = any(name.endswith(LATENT_UP) and self._is_split(name) for name in names)
        if split or wanted.role == "router":
            return None
        # all shapes are checked before memory of the sizes that the config states is asked for
        found = [(name, self.blocks(name, (n, wanted.inputs))) for name, n in names.items()]
        runs = [list(run) for _, run in groupby(found, key=lambda part: part[1].kind.name)]
        known = [run[0][1].kind.name in BLOCK_KINDS for run in runs]
        if not any(known) or (wanted.gated and len(runs) > 1):
            return None
        parts: list[Weight] = []
        for run, is_known in zip(runs, known, strict=True):
            n, k = sum(len(blocks.rows) for _, blocks in run), wanted.inputs
            if is_known:
                rows = (blocks.rows for _, blocks in run)
                parts.append(pack_blocks(rows, n, k, run[0][1].kind.name, gated=wanted.gated))
            else:
                values = (self.rows(name, (len(blocks.rows), k)) for name, blocks in run)
                parts.append(pack_rows(chain.from_iterable(values), n, k, self.dtype))
        return parts[0] if len(parts) == 1 else StackedWeight(tuple(parts))

    def blocks(self, name: str, shape: tuple[int, ...]) -> Blocks:
        """The tensor of that name as stored, for kernels that compute on blocks.

        ``shape`` counts values, as for ``get``. A view of the file where its rows need no
        reordering; rows themselves are never changed.
        """
        return self._read(name, shape)[1]

    def _is_split(self, name: str) -> bool:
        source = source_of(self._architecture, name, self._heads, self._kv_heads)
        return source is not None and source.name not in self.gguf.tensors

    def _latent_up(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """DeepSeek's up-projection of keys and values, which newer files hold as two stacked
        tensors: keys [heads, rank, size], values [heads, size, rank]."""
        halves = []
        for stored, across in (("attn_k_b", True), ("attn_v_b", False)):
            full = f"blk.{name.split('.')[2]}.{stored}.weight"
            tensor = self.gguf.tensors.get(full)
            if tensor is None or len(tensor.shape) != 3 or tensor.shape[0] != self._heads:
                raise self.gguf.wrong(f"tensor {full!r} is missing or not stacked by heads")
            values = expand(tensor.kind, self._readable(tensor), self.dtype)
            halves.append(values.transpose(1, 2) if across else values)
        if halves[0].shape[2] != halves[1].shape[2]:
            raise self.gguf.wrong(f"the halves of {name!r} differ in rank")
        whole = torch.cat(halves, 1)
        if (whole.shape[0] * whole.shape[1], whole.shape[2]) != shape:
            raise self.gguf.wrong(f"the halves of {name!r} do not make {list(shape)}")
        return whole.reshape(shape)

    def _read(self, name: str, shape: tuple[int, ...]) -> tuple[Source, Blocks]:
        source = source_of(self._architecture, name, self._heads, self._kv_heads)
        tensor = self.gguf.tensors.get(source.name) if source else None
        if source is None or tensor is None:
            known = f" (in the file: {source.name!r})" if source else ""
            raise CheckpointError(
                f"tensor {name!r}{known} is missing",
                self.gguf.path,
                "The file is incomplete or of another architecture; download it again.",
            )
        found = tensor.shape if source.expert is None else tensor.shape[1:]
        if found != shape or (source.expert or 0) >= tensor.shape[0]:
            raise self.gguf.wrong(
                f"tensor {source.name!r} has shape {list(tensor.shape)}, expected {list(shape)}"
                + ("" if source.expert is None else f" for expert {source.expert}")
            )
        rows = self._readable(tensor)
        if source.expert is not None:
            rows = rows[source.expert]
        if source.heads is not None:
            if shape[0] % (2 * source.heads):
                raise self.gguf.wrong(f"tensor {source.name!r} does not split into its heads")
            rows = _halves(rows, source.heads, tensor.kind)
        return source, Blocks(tensor.kind, rows)

    def _readable(self, tensor: Stored) -> Tensor:
        """uint8 [..., bytes of a row], a view of the map."""
        if tensor.kind.name not in READABLE:
            raise CheckpointError(
                f"tensor {tensor.name!r} has type {tensor.kind.name}; {', '.join(READABLE)} can "
                "be loaded",
                self.gguf.path,
                "Use another quantization of this model, such as Q4_K_M or Q8_0.",
            )
        self.unread.discard(tensor.name)
        self._since_release += tensor.nbytes
        if self._since_release > RELEASE_BYTES:
            for part in self._bytes:
                _release(part)
            self._since_release = 0
        span = self._bytes[tensor.part][tensor.offset : tensor.offset + tensor.nbytes]
        width = tensor.shape[-1] // tensor.kind.values * tensor.kind.bytes
        return span.view(*tensor.shape[:-1], width)


def _halves(rows: Tensor, heads: int, kind: Kind) -> Tensor:
    """Undo what the converter does to query and key rows of Llama: it interleaves the two halves
    of each head, so that the pairs that rotate are neighbours. Biases are one row of values."""
    if rows.dim() == 1:
        return rows.view(heads, -1, 2, kind.bytes).transpose(1, 2).flatten()
    return rows.view(heads, -1, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def _bytes_of(part: Part) -> Tensor:
    """The mapped file as uint8 [size], without a copy. It must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(part.map, dtype=torch.uint8)


def _release(part: Part) -> None:
    """Let the pages that were read go; a tensor that still views them reads them again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        part.map.madvise(mmap.MADV_DONTNEED)
