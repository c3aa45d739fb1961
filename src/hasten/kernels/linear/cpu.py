"""Linear layers through ``csrc/ops/linear.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten import _native
from hasten.kernels.linear.packed import PANEL, PackedWeight, packed_dtype


def pack(weight: Tensor, data: Tensor | None = None) -> PackedWeight:
    if weight.dim() != 2:
        raise ValueError(f"a weight has two dimensions, not {tuple(weight.shape)}")
    n, k = weight.shape
    if data is None:
        data = torch.empty((-(-n // PANEL), k, PANEL), dtype=packed_dtype(weight.dtype))
    _native.pack(weight.detach(), data)
    return PackedWeight(data, n, k)


def unpack(w: PackedWeight) -> Tensor:
    weight = torch.empty((w.n, w.k), dtype=w.data.dtype)
    _native.unpack(w.data, w.n, weight)
    return weight


def linear(
    x: Tensor, w: PackedWeight, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    if out is None:
        out = torch.empty((x.shape[0], w.n))
    _native.linear(x, w.data, w.n, bias, out)
    return out


def linear_grouped(x: Tensor, w: PackedWeight, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty((*x.shape[:2], w.n))
    _native.linear_grouped(x, w.data, w.n, out)
    return out
