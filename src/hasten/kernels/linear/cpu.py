"""Linear layers through ``csrc/ops/linear.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten import _native
from hasten.kernels.linear.packed import ExpertWeights, PackedWeight


def pack(rows: Tensor, first: int, n: int, gated: bool, data: Tensor) -> None:
    _native.pack(rows.detach(), first, n, gated, data)


def unpack(w: PackedWeight) -> Tensor:
    weight = torch.empty((w.n, w.k), dtype=w.data.dtype)
    _native.unpack(w.data, w.n, w.k, w.gated, weight)
    return weight


def matrix(w: PackedWeight) -> _native.Matrix:
    """What native calls take that multiply by weights of any kind."""
    return _native.matrix(w.data, w.n, w.k)


def linear(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    if out is None:
        out = torch.empty((x.shape[0], w.n))
    _native.linear(x, w.data, w.n, w.k, bias, add, out)
    return out


def linear_gated(
    x: Tensor, w: PackedWeight, kind: str, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    if out is None:
        out = torch.empty((x.shape[0], w.n // 2))
    _native.linear_gated(x, w.data, w.n, w.k, bias, kind, out)
    return out


def linear_grouped(x: Tensor, w: PackedWeight, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty((*x.shape[:2], w.n))
    _native.linear_grouped(x, w.data, w.n, w.k, out)
    return out


def linear_experts(x: Tensor, w: ExpertWeights, offsets: Tensor, kind: str | None = None) -> Tensor:
    out = torch.empty((x.shape[0], w.n if kind is None else w.n // 2))
    _native.linear_experts(x, w.table, w.n, w.k, kind, offsets, out)
    return out
