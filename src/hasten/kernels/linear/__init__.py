"""Linear layers on packed weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.dispatch import choose
from hasten.kernels.linear import (
    blocks_cpu,
    blocks_ref,
    cpu,
    quantized_cpu,
    quantized_ref,
    ref,
)
from hasten.kernels.linear.blocks import (
    BLOCK_KINDS,
    BlockWeight,
    check_block_rows,
    empty_blocks,
)
from hasten.kernels.linear.packed import PANEL, PackedWeight, packed_dtype
from hasten.kernels.linear.quantized import (
    GROUPS,
    Int4Weight,
    Int8Weight,
    Rows,
    check_rows,
    empty_int4,
    empty_int8,
)

__all__ = [
    "BLOCK_KINDS",
    "GROUPS",
    "PANEL",
    "BlockWeight",
    "Int4Weight",
    "Int8Weight",
    "PackedWeight",
    "Rows",
    "Weight",
    "linear",
    "linear_grouped",
    "pack",
    "pack_blocks",
    "pack_grouped",
    "pack_int4",
    "pack_int4_rows",
    "pack_int8",
    "pack_int8_rows",
    "pack_rows",
    "unpack",
]

Weight = PackedWeight | Int8Weight | Int4Weight | BlockWeight
"""What a linear layer multiplies by."""

# For each kind of weight the modules that have `linear`, `unpack` and `embed` for it.
_FAMILIES: dict[type, dict[str, Any]] = {
    PackedWeight: {"ref": ref, "cpu": cpu},
    Int8Weight: {"ref": quantized_ref, "cpu": quantized_cpu},
    Int4Weight: {"ref": quantized_ref, "cpu": quantized_cpu},
    BlockWeight: {"ref": blocks_ref, "cpu": blocks_cpu},
}


def implementation(w: Weight, impl: str | None, tensor: Tensor) -> Any:
    """The module that computes with this kind of weight, for tensors like this one."""
    return _FAMILIES[type(w)][choose(impl, tensor)]


def pack(weight: Tensor, *, impl: str | None = None) -> PackedWeight:
    """Bring a weight [N, K] into panels.

    ``weight`` is float32, bfloat16 or float16 (kept as float32) with contiguous rows; it may be
    a view or memory-mapped, and is read once. Raises TypeError for other types and ValueError for
    other shapes.
    """
    return cpu.pack(weight) if choose(impl, weight) == "cpu" else ref.pack(weight)


def pack_rows(
    parts: Iterable[Tensor], n: int, k: int, dtype: torch.dtype, *, impl: str | None = None
) -> PackedWeight:
    """Bring a weight [N, K] into panels whose rows come in parts [any, K], as ``dtype``.

    Only the part at hand is held beside the result. Raises ValueError if the parts do not make
    N rows of K.
    """
    data = torch.empty((-(-n // PANEL), k, PANEL), dtype=packed_dtype(dtype))
    run = cpu.pack if choose(impl, data) == "cpu" else ref.pack
    found, rest = 0, data.new_empty(0, k)  # rows so far; those of a panel that is not full yet
    for part in parts:
        rows = part.to(data.dtype)
        begin = found - len(rest)
        found += len(part)
        if found > n:
            break
        rows = torch.cat([rest, rows]) if len(rest) else rows
        whole = len(rows) if found == n else len(rows) // PANEL * PANEL
        if whole:
            run(rows[:whole], data[begin // PANEL : -(-(begin + whole) // PANEL)])
        rest = rows[whole:].clone()
    if found != n:
        raise ValueError(f"the parts of a weight have {found} rows, not {n}")
    return PackedWeight(data, n, k)


def pack_grouped(weights: Tensor, *, impl: str | None = None) -> PackedWeight:
    """Bring a weight for each of G groups, [G, N, K] as in `pack`, into panels."""
    run = cpu.pack if choose(impl, weights) == "cpu" else ref.pack
    return PackedWeight(torch.stack([run(weight).data for weight in weights]), *weights.shape[1:])


def pack_int8(
    codes: Tensor, scale: Tensor, *, gated: bool = False, impl: str | None = None
) -> Int8Weight:
    """A weight [N, K] from codes int8 in [-127, 127] and a scale float32 [N] for each output.

    With ``gated`` the first half of the rows are gates: see `Int8Weight`. Raises TypeError or
    ValueError for other types, shapes and codes, and for more than 2^17 inputs.
    """
    return pack_int8_rows([Rows(codes, scale)], *codes.shape, gated=gated, impl=impl)


def pack_int8_rows(
    parts: Iterable[Rows], n: int, k: int, *, gated: bool = False, impl: str | None = None
) -> Int8Weight:
    """As `pack_int8` with rows in parts, of which only the one at hand is held.

    Raises ValueError also if the parts do not make N rows.
    """
    w = empty_int8(n, k, gated=gated)
    _put_all(parts, w, impl)
    return w


def pack_int4(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    group: int,
    gated: bool = False,
    impl: str | None = None,
) -> Int4Weight:
    """A weight [N, K] from codes uint8 in [0, 15], scales float16 [N, K / group] and, for the
    asymmetric form, zeros uint8 [N, K / group]; without them the zero is 8.

    ``group`` is 32, 64 or 128 and divides K. With ``gated`` the first half of the rows are gates:
    see `Int4Weight`. Raises TypeError or ValueError for other types, shapes and codes.
    """
    return pack_int4_rows(
        [Rows(codes, scale, zero)],
        *codes.shape,
        group=group,
        asymmetric=zero is not None,
        gated=gated,
        impl=impl,
    )


def pack_int4_rows(
    parts: Iterable[Rows],
    n: int,
    k: int,
    *,
    group: int,
    asymmetric: bool = False,
    gated: bool = False,
    impl: str | None = None,
) -> Int4Weight:
    """As `pack_int4` with rows in parts, of which only the one at hand is held.

    Raises ValueError also if the parts do not make N rows.
    """
    w = empty_int4(n, k, group=group, asymmetric=asymmetric, gated=gated)
    _put_all(parts, w, impl)
    return w


def _put_all(parts: Iterable[Rows], w: Int8Weight | Int4Weight, impl: str | None) -> None:
    run = implementation(w, impl, w.data)
    found = 0
    for rows in parts:
        check_rows(rows, w)
        if found + len(rows.codes) <= w.n:
            run.put(rows, w, found)
        found += len(rows.codes)
        if found > w.n:
            break
    if found != w.n:
        raise ValueError(f"the parts of a weight have {found} rows, not {w.n}")


def pack_blocks(
    parts: Iterable[Tensor], n: int, k: int, kind: str, *, impl: str | None = None
) -> BlockWeight:
    """A weight [N, K] of the blocks of a GGUF file, whose rows come in parts uint8 [any, bytes].

    Rows are as in the file and may be views of it; only the part at hand is read. ``kind`` is one
    of `BLOCK_KINDS`. Raises TypeError or ValueError for other types and shapes, also if the parts
    do not make N rows.
    """
    w = empty_blocks(kind, n, k)
    run, found = implementation(w, impl, w.data), 0
    for rows in parts:
        check_block_rows(rows, w)
        if found + len(rows) > n:
            raise ValueError(f"the parts of a weight have more than {n} rows")
        run.put(rows, w, found)
        found += len(rows)
    if found != n:
        raise ValueError(f"the parts of a weight have {found} rows, not {n}")
    return w


def unpack(w: Weight, *, impl: str | None = None) -> Tensor:
    """The weight [N, K] in the type in which it is kept; float32 if that is integers."""
    return implementation(w, impl, w.data).unpack(w)


def linear(
    x: Tensor,
    w: Weight,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """``x @ weight.T + bias``.

    ``x`` is float32 [R, K] (rows may be strided), ``bias`` float32 [N], the result float32 [R, N],
    written to ``out`` if given (rows may be strided). Weights in bfloat16 are widened to float32;
    activations are then never narrowed, and each output is one chain of fused multiply-adds over K
    in ascending order, then the bias, whatever the number of rows. Against 8-bit and 4-bit weights
    a row of activations becomes 8-bit codes, with one scale a row or a group of inputs, sums of
    products are exact integers, and groups are added in ascending order (``quantized_ref`` has
    each operation). The same holds for blocks of GGUF files, with a scale for 32 inputs
    (``blocks_ref``). Raises TypeError or ValueError for other types or shapes.
    """
    return implementation(w, impl, x).linear(x, w, bias, out)


def linear_grouped(
    x: Tensor, w: PackedWeight, out: Tensor | None = None, *, impl: str | None = None
) -> Tensor:
    """``y[r, g] = x[r, g] @ weight[g].T`` for the groups (heads) of a row.

    ``x`` is float32 [R, G, K], ``w`` comes from `pack_grouped`, the result is float32 [R, G, N],
    written to ``out`` if given; rows and groups of both may be strided. Each output is computed as
    in `linear`. Raises TypeError or ValueError for other types or shapes.
    """
    if choose(impl, x) == "cpu":
        return cpu.linear_grouped(x, w, out)
    return ref.linear_grouped(x, w, out)
