"""Forms of quantized rows: how they are made, packed, and laid out in files.

A weight format says which form a matrix gets by its role; `SavedWeights` reads the same forms back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from hasten.kernels.linear import Rows, Weight, pack_int4_rows, pack_int8_rows, pack_rows
from hasten.weights.base import Matrix
from hasten.weights.compressors import rtn

if TYPE_CHECKING:
    from hasten.models.base import Weights

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""The tensors that hold rows in a file: part of a name -> type and shape."""

BLOCK_VALUES = 1 << 18
"""Values that are quantized or unpacked at a time: they stay in a core's cache."""


class Form(Protocol):
    """One way to hold rows as integers."""

    def quantize(self, values: Tensor) -> Rows:
        """Rows [n, K], float32 or bfloat16, rounded to nearest."""

    def pack(self, parts: Iterable[Rows], wanted: Matrix) -> Weight:
        """What kernels read, from the rows of a matrix in parts."""

    def layout(self, rows: int, inputs: int) -> Layout:
        """How so many rows are stored. Raises ValueError for inputs that have no such form."""

    def to_tensors(self, rows: Rows) -> dict[str, Tensor]:
        """Rows as they are stored in a file."""

    def from_tensors(self, tensors: dict[str, Tensor]) -> Rows:
        """The inverse."""

    def values(self, rows: Rows) -> Tensor:
        """The numbers that the codes stand for, float32 [n, K]."""


@dataclass(frozen=True)
class Int8Form:
    """Codes int8 [n, K] with a scale float32 for each row; stored just so."""

    def quantize(self, values: Tensor) -> Rows:
        return rtn.to_int8(values)

    def pack(self, parts: Iterable[Rows], wanted: Matrix) -> Weight:
        return pack_int8_rows(parts, wanted.rows, wanted.inputs, gated=wanted.gated)

    def layout(self, rows: int, inputs: int) -> Layout:
        return {"codes": (torch.int8, (rows, inputs)), "scale": (torch.float32, (rows,))}

    def to_tensors(self, rows: Rows) -> dict[str, Tensor]:
        return {"codes": rows.codes, "scale": rows.scale}

    def from_tensors(self, tensors: dict[str, Tensor]) -> Rows:
        return Rows(tensors["codes"], tensors["scale"])

    def values(self, rows: Rows) -> Tensor:
        return rows.codes.float() * rows.scale[:, None]


@dataclass(frozen=True)
class Int4Form:
    """Codes of 4 bits with a scale float16, and in the asymmetric form a zero, for each group.

    In files two codes share a byte, the one of the lower input in the lower half: uint8 [n, K / 2];
    scales are [n, K / group].
    """

    group: int
    asymmetric: bool

    def quantize(self, values: Tensor) -> Rows:
        return rtn.to_int4(values, self.group, self.asymmetric)

    def pack(self, parts: Iterable[Rows], wanted: Matrix) -> Weight:
        return pack_int4_rows(
            parts,
            wanted.rows,
            wanted.inputs,
            group=self.group,
            asymmetric=self.asymmetric,
            gated=wanted.gated,
        )

    def layout(self, rows: int, inputs: int) -> Layout:
        if inputs % self.group:
            raise ValueError(
                f"{inputs} inputs are no whole number of groups of {self.group}; use int8, or "
                "int4 with smaller groups (group=32)"
            )
        groups = (rows, inputs // self.group)
        found: Layout = {
            "codes": (torch.uint8, (rows, inputs // 2)),
            "scale": (torch.float16, groups),
        }
        return found | ({"zero": (torch.uint8, groups)} if self.asymmetric else {})

    def to_tensors(self, rows: Rows) -> dict[str, Tensor]:
        stored = {"codes": rows.codes[:, ::2] | rows.codes[:, 1::2] << 4, "scale": rows.scale}
        return stored if rows.zero is None else stored | {"zero": rows.zero}

    def from_tensors(self, tensors: dict[str, Tensor]) -> Rows:
        stored = tensors["codes"]
        codes = torch.empty((*stored.shape, 2), dtype=torch.uint8)
        torch.bitwise_and(stored, 15, out=codes[..., 0])
        torch.bitwise_right_shift(stored, 4, out=codes[..., 1])
        return Rows(codes.flatten(1), tensors["scale"], tensors.get("zero"))

    def values(self, rows: Rows) -> Tensor:
        parts = rows.codes.view(*rows.scale.shape, self.group).float()
        zero = 8.0 if rows.zero is None else rows.zero[..., None].float()
        return ((parts - zero) * rows.scale[..., None].float()).flatten(1)


def quantized(form: Form | None, source: Weights, wanted: Matrix) -> Weight:
    """A matrix rounded from a checkpoint's numbers; without a form in the type of the source."""
    if form is None:
        return pack_rows(
            wanted.read(source), wanted.rows, wanted.inputs, source.dtype, gated=wanted.gated
        )
    return form.pack(quantized_rows(form, source, wanted), wanted)


def quantized_rows(form: Form, source: Weights, wanted: Matrix) -> Iterator[Rows]:
    """The rows of a matrix in parts. Raises ValueError, naming the tensor, if they have no such
    form; shapes are checked by the call."""
    where = f"tensor {next(iter(wanted.outputs))}.weight"
    try:
        form.layout(wanted.rows, wanted.inputs)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error

    def parts(values: Iterator[Tensor]) -> Iterator[Rows]:
        try:
            for part in values:
                for block in row_blocks(part):
                    half = block.dtype is torch.float16
                    yield form.quantize(block.float() if half else block)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    return parts(wanted.read(source))


def row_blocks(part: Tensor) -> Iterator[Tensor]:
    """Some rows at a time, few enough to stay in a core's cache."""
    step = max(1, BLOCK_VALUES // part.shape[1])
    return iter(part.split(step))
