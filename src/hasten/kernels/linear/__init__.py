"""Linear layers on packed weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hasten.kernels.dispatch import choose
from hasten.kernels.linear import cpu, ref
from hasten.kernels.linear.packed import PANEL, PackedWeight, packed_dtype

__all__ = [
    "PANEL",
    "PackedWeight",
    "linear",
    "linear_grouped",
    "pack",
    "pack_grouped",
    "pack_rows",
    "unpack",
]


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


def unpack(w: PackedWeight, *, impl: str | None = None) -> Tensor:
    """The weight [N, K] in the type in which it is kept."""
    return cpu.unpack(w) if choose(impl, w.data) == "cpu" else ref.unpack(w)


def linear(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """``x @ weight.T + bias``.

    ``x`` is float32 [R, K] (rows may be strided), ``bias`` float32 [N], the result float32 [R, N],
    written to ``out`` if given (rows may be strided). Weights in bfloat16 are widened to float32;
    activations are never narrowed. Each output is one chain of fused multiply-adds over K in
    ascending order, then the bias, whatever the number of rows. Raises TypeError or ValueError for
    other types or shapes.
    """
    if choose(impl, x) == "cpu":
        return cpu.linear(x, w, bias, out)
    return ref.linear(x, w, bias, out)


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
