"""Weights of a linear layer as 8-bit and 4-bit integers, in the order in which kernels read them.

A weight is one stream of bytes, cut into *strips* of up to 4 panels of 16 outputs (the last strip
has the panels that are left). Inside a strip everything that belongs to an input stands together
for all its outputs, so that a kernel reads memory from front to back:

- int8: codes + 128 as bytes [4 * ceil(K / 16)][panels][16 outputs][4 inputs], then scales float32
  [panels][16]. Inputs beyond K are met by zero activations.
- int4, for each group of inputs: codes [group / 8][panels][16 outputs][4], where byte j holds the
  code of input j in its low half and that of input j + 4 in its high half; then scales float16
  [panels][16]; then, in the asymmetric form, zeros as bytes [panels][16].

Codes are stored unsigned since the instructions that multiply bytes take one unsigned operand, and
the activations, of which four are broadcast to all outputs, are the signed one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hasten.kernels.memory import weight_memory

PANEL = 16
"""Outputs in a panel: the width of the kernels' vectors."""
STRIP = 4
"""Panels in a strip."""
GROUPS = (32, 64, 128)
"""Inputs that may share a scale of a 4-bit weight."""
MAX_INPUTS = 1 << 17
"""Inputs of a weight: so many products of two codes, each at most 127 * 127, fit 32 bits."""


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A weight [n, k] of codes in [-127, 127] with one scale an output: ``code * scale``.

    ``data`` is uint8, the stream that the module describes. With ``gated`` the outputs are two
    halves, gate and up, whose panels alternate (gate 0, up 0, gate 1, ...), so that a strip has
    both sides of its results.
    """

    data: Tensor
    n: int
    k: int
    gated: bool = False

    @property
    def name(self) -> str:
        """How the weight is kept, for tables and messages."""
        return "int8"

    @property
    def size(self) -> int:
        """Numbers in the weight, without padding."""
        return self.n * self.k

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A weight [n, k] of codes in [0, 15]: ``(code - zero) * scale`` with one scale (float16, of
    either sign) for each output and ``group`` of inputs.

    ``zero`` is 8, or, if ``asymmetric``, a byte beside each scale. ``data`` and ``gated`` are as
    in `Int8Weight`.
    """

    data: Tensor
    n: int
    k: int
    group: int
    asymmetric: bool = False
    gated: bool = False

    @property
    def name(self) -> str:
        """How the weight is kept, for tables and messages."""
        return "int4"

    @property
    def size(self) -> int:
        """Numbers in the weight, without padding."""
        return self.n * self.k

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


Quantized = Int8Weight | Int4Weight


def panels_of(n: int, gated: bool) -> int:
    """Panels of n outputs."""
    return 2 * -(-(n // 2) // PANEL) if gated else -(-n // PANEL)


def stream_bytes(w: Quantized) -> int:
    """Bytes of the stream of a weight."""
    if isinstance(w, Int8Weight):
        panel = PANEL * (-(-w.k // 16) * 16 + 4)
    else:
        panel = PANEL * (w.k // w.group) * (w.group // 2 + 2 + w.asymmetric)
    return panels_of(w.n, w.gated) * panel


def empty_int8(n: int, k: int, *, gated: bool = False) -> Int8Weight:
    """A weight whose codes and scales are still to be put in."""
    if not 1 <= k <= MAX_INPUTS:
        raise ValueError(
            f"an int8 weight has 1 to {MAX_INPUTS} inputs, so that sums fit 32 bits, not {k}"
        )
    _check_outputs(n, gated)
    w = Int8Weight(torch.empty(0), n, k, gated)
    return replace(w, data=weight_memory((stream_bytes(w),), torch.uint8))


def empty_int4(
    n: int, k: int, *, group: int, asymmetric: bool = False, gated: bool = False
) -> Int4Weight:
    """A weight whose codes, scales and zeros are still to be put in."""
    if group not in GROUPS:
        raise ValueError(f"groups of an int4 weight have 32, 64 or 128 inputs, not {group}")
    if k < 1 or k % group:
        raise ValueError(f"{k} inputs are no whole number of groups of {group}")
    _check_outputs(n, gated)
    w = Int4Weight(torch.empty(0), n, k, group, asymmetric, gated)
    return replace(w, data=weight_memory((stream_bytes(w),), torch.uint8))


def _check_outputs(n: int, gated: bool) -> None:
    if gated and n % 2:
        raise ValueError(f"a weight of {n} outputs has no gate and up halves")


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a quantized weight before packing, as they are stored in files.

    Attributes:
        codes: int8 [rows, K] in [-127, 127], or uint8 [rows, K] in [0, 15] for 4 bits.
        scale: float32 [rows], or float16 [rows, K / group] for 4 bits.
        zero: uint8 [rows, K / group] in the asymmetric form of 4 bits, else None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None


def check_rows(rows: Rows, w: Quantized) -> None:
    """Raise TypeError or ValueError unless these are rows of such a weight."""
    count = len(rows.codes)
    if isinstance(w, Int8Weight):
        _check("codes", rows.codes, torch.int8, (count, w.k))
        _check("scale", rows.scale, torch.float32, (count,))
        if rows.zero is not None:
            raise ValueError("an int8 weight has no zeros")
        if count and int(rows.codes.min()) == -128:
            raise ValueError("codes of an int8 weight are in [-127, 127], and one is -128")
        return
    _check("codes", rows.codes, torch.uint8, (count, w.k))
    _check("scale", rows.scale, torch.float16, (count, w.k // w.group))
    if w.asymmetric != (rows.zero is not None):
        raise ValueError(
            "an asymmetric int4 weight has zeros"
            if w.asymmetric
            else "zeros are given, but the weight is not asymmetric"
        )
    if rows.zero is not None:
        _check("zero", rows.zero, torch.uint8, (count, w.k // w.group))
    if count and int(rows.codes.max()) > 15:
        raise ValueError("codes of an int4 weight are in [0, 15], and one is larger")


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, not {dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")
