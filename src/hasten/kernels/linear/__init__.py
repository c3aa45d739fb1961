"""Linear layers on packed weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.dispatch import choose, module
from hasten.kernels.linear import (
    blocks_cpu,
    blocks_ref,
    cpu,
    quantized_cpu,
    quantized_ref,
    ref,
)
from hasten.kernels.linear.blocks import BLOCK_KINDS, BlockWeight, check_block_rows, empty_blocks
from hasten.kernels.linear.device import DeviceWeight
from hasten.kernels.linear.packed import (
    GROUP,
    PANEL,
    ExpertWeights,
    PackedWeight,
    packed_dtype,
    packed_size,
    stack_experts,
)
from hasten.kernels.linear.quantized import (
    GROUPS,
    Int4Weight,
    Int8Weight,
    Rows,
    check_rows,
    empty_int4,
    empty_int8,
)
from hasten.kernels.linear.stacked import StackedOperations, StackedWeight
from hasten.kernels.memory import weight_memory

__all__ = [
    "BLOCK_KINDS",
    "GROUP",
    "GROUPS",
    "PANEL",
    "BlockWeight",
    "DeviceWeight",
    "ExpertWeights",
    "Int4Weight",
    "Int8Weight",
    "PackedWeight",
    "Rows",
    "StackedWeight",
    "Weight",
    "linear",
    "linear_experts",
    "linear_gated",
    "linear_grouped",
    "pack",
    "pack_blocks",
    "pack_grouped",
    "pack_int4",
    "pack_int4_rows",
    "pack_int8",
    "pack_int8_rows",
    "pack_rows",
    "stack_experts",
    "unpack",
]

Weight = PackedWeight | Int8Weight | Int4Weight | BlockWeight | StackedWeight | DeviceWeight
"""What a linear layer multiplies by."""

# For each kind of weight the modules that have `linear`, `linear_gated`, `linear_experts`, `unpack`
# and `embed` for it.
_FAMILIES: dict[type, dict[str, Any]] = {
    PackedWeight: {"ref": ref, "cpu": cpu},
    Int8Weight: {"ref": quantized_ref, "cpu": quantized_cpu},
    Int4Weight: {"ref": quantized_ref, "cpu": quantized_cpu},
    BlockWeight: {"ref": blocks_ref, "cpu": blocks_cpu},
}


def implementation(w: Weight, impl: str | None, tensor: Tensor) -> Any:
    """The module that computes with this kind of weight, for tensors like this one."""
    chosen = choose(impl, tensor)
    if isinstance(w, DeviceWeight) != (chosen == "triton"):
        raise TypeError(
            f"a {type(w).__name__} is not what '{chosen}' kernels read; hasten.models.device.place "
            "brings a model's weights to a device"
        )
    if isinstance(w, StackedWeight):
        return StackedOperations(lambda part: _FAMILIES[type(part)][chosen])
    return module(__name__, "triton") if chosen == "triton" else _FAMILIES[type(w)][chosen]


def pack(weight: Tensor, *, gated: bool = False, impl: str | None = None) -> PackedWeight:
    """Bring a weight [N, K] into the order of `PackedWeight`.

    ``weight`` is float32, bfloat16 or float16 (kept as float32) with contiguous rows; it may be
    a view or memory-mapped, and is read once. ``gated`` says that its rows are a gate half and an
    up half for `linear_gated`. Raises TypeError for other types and ValueError for other shapes.
    """
    if weight.dim() != 2:
        raise ValueError(f"a weight has two dimensions, not {tuple(weight.shape)}")
    (n, k), dtype = weight.shape, packed_dtype(weight.dtype)
    data = weight_memory((packed_size(n, k, dtype, gated),), dtype)
    run = cpu.pack if choose(impl, weight) == "cpu" else ref.pack
    run(weight, 0, n, gated, data)
    return PackedWeight(data, n, k, gated)


def pack_rows(
    parts: Iterable[Tensor],
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    gated: bool = False,
    impl: str | None = None,
) -> PackedWeight:
    """Pack a weight [N, K] whose rows come in parts [any, K], as ``dtype``; see `pack`.

    Only the part at hand is held beside the result. Raises ValueError if the parts do not make
    N rows of K.
    """
    dtype = packed_dtype(dtype)
    data = weight_memory((packed_size(n, k, dtype, gated),), dtype)
    run = cpu.pack if choose(impl, data) == "cpu" else ref.pack
    found = 0
    for part in parts:
        if part.dim() != 2 or part.shape[1] != k:
            raise ValueError(f"a part has shape {tuple(part.shape)}, not rows of {k}")
        if found + len(part) <= n:
            run(part.to(dtype), found, n, gated, data)
        found += len(part)
    if found != n:
        raise ValueError(f"the parts of a weight have {found} rows, not {n}")
    return PackedWeight(data, n, k, gated)


def pack_grouped(weights: Tensor, *, impl: str | None = None) -> PackedWeight:
    """Pack a weight for each of G groups, [G, N, K] as in `pack`."""
    run = cpu.pack if choose(impl, weights) == "cpu" else ref.pack
    (groups, n, k), dtype = weights.shape, packed_dtype(weights.dtype)
    data = weight_memory((groups, packed_size(n, k, dtype)), dtype)
    for weight, part in zip(weights, data, strict=True):
        run(weight, 0, n, False, part)
    return PackedWeight(data, n, k)


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
    parts: Iterable[Tensor],
    n: int,
    k: int,
    kind: str,
    *,
    gated: bool = False,
    impl: str | None = None,
) -> BlockWeight:
    """A weight [N, K] of the blocks of a GGUF file, whose rows come in parts uint8 [any, bytes].

    Rows are as in the file and may be views of it; only the part at hand is read. ``kind`` is one
    of `BLOCK_KINDS`, ``gated`` as in `pack`. Raises TypeError or ValueError for other types and
    shapes, also if the parts do not make N rows.
    """
    w = empty_blocks(kind, n, k, gated=gated)
    run, found = implementation(w, impl, w.data), 0
    for rows in parts:
        check_block_rows(rows, w)
        if found + len(rows) <= n:
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
    add: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """``x @ weight.T + bias + add``.

    ``x`` is float32 [R, K], ``bias`` float32 [N], ``add`` (a residual) float32 [R, N], the result
    float32 [R, N], written to ``out`` if given, which may be ``add`` but must not overlap ``x``;
    rows of all of them may be strided. Weights in bfloat16 are widened to float32; activations are
    then never narrowed. Each output is one chain of fused multiply-adds over K in ascending order
    from 0, then the bias, then ``add``, whatever the number of rows.

    Against 8-bit and 4-bit weights a row of activations becomes 8-bit codes, with a scale for the
    row or for each group of inputs; sums of products are exact integers, and those of groups are
    added in ascending order, then the bias, then ``add`` (`quantized_ref` has each operation).
    Against blocks of GGUF files it is the same with a scale for each 32 inputs (`blocks_ref`).

    Raises TypeError or ValueError for other types or shapes, and for a gated weight.
    """
    if w.gated:
        raise ValueError("the weight has a gate and an up half; linear_gated reads it")
    return implementation(w, impl, x).linear(x, w, bias, out, add)


def linear_gated(
    x: Tensor,
    w: Weight,
    kind: str,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """``act(gate) * up`` of ``x @ weight.T + bias`` = [gate | up]; the result is [R, N / 2].

    The weight is packed with ``gated=True``; ``kind`` and the activation's arithmetic are those of
    `hasten.kernels.activation.gated`, and the sums are those of `linear`, so the bits are the same
    as with both one after the other. Raises as `linear`, and ValueError for another ``kind`` or a
    weight that is not gated.
    """
    if not w.gated:
        raise ValueError("the weight has no gate and up halves; pack it with gated=True")
    return implementation(w, impl, x).linear_gated(x, w, kind, bias, out)


def linear_grouped(
    x: Tensor,
    w: PackedWeight | DeviceWeight,
    out: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """``y[r, g] = x[r, g] @ weight[g].T`` for the groups (heads) of a row.

    ``x`` is float32 [R, G, K], ``w`` comes from `pack_grouped`, the result is float32 [R, G, N],
    written to ``out`` if given; rows and groups of both may be strided. Each output is computed as
    in `linear`. Raises TypeError or ValueError for other types or shapes.
    """
    return implementation(w, impl, x).linear_grouped(x, w, out)


def linear_experts(
    x: Tensor,
    w: ExpertWeights,
    offsets: Tensor,
    kind: str | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Rows ``offsets[e]`` to ``offsets[e + 1]`` of ``x`` through the weight of expert e.

    ``x`` is float32 [R, K] grouped by expert (see `hasten.kernels.moe.group_rows`), ``w`` comes
    from `stack_experts`, ``offsets`` is int64 [E + 1] from 0 to R. The result is float32 [R, N],
    each row as in `linear`, or with the activation ``kind``, for gated weights, [R, N / 2] as in
    `linear_gated`. Raises TypeError or ValueError for other types, shapes or offsets.
    """
    if w.gated != (kind is not None):
        raise ValueError("an activation goes with gated weights, and only with them")
    chosen = implementation(w.weights[0], impl, x)
    if not hasattr(chosen, "linear_experts"):
        raise RuntimeError("linear_experts has no 'triton' implementation")
    return chosen.linear_experts(x, w, offsets, kind)
