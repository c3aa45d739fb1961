"""Linear layers on 8-bit and 4-bit weights through ``csrc/ops/linear_int8.cpp``, ``_int4.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten import _native
from hasten.kernels.linear.packed import ExpertWeights
from hasten.kernels.linear.quantized import Int4Weight, Quantized, Rows


def matrix(w: Quantized) -> _native.Matrix:
    """What native calls take that multiply by weights of any kind."""
    return _native.matrix_quantized(w.data, w.n, w.k, *_groups(w))


def linear(
    x: Tensor,
    w: Quantized,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    if out is None:
        out = torch.empty((x.shape[0], w.n))
    _native.linear_quantized(x, w.data, w.n, w.k, *_groups(w), bias, add, out)
    return out


def linear_gated(
    x: Tensor, w: Quantized, kind: str, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    if out is None:
        out = torch.empty((x.shape[0], w.n // 2))
    _native.linear_quantized_gated(x, w.data, w.n, w.k, *_groups(w), bias, kind, out)
    return out


def linear_experts(x: Tensor, w: ExpertWeights, offsets: Tensor, kind: str | None = None) -> Tensor:
    out = torch.empty((x.shape[0], w.n if kind is None else w.n // 2))
    groups = _groups(w.weights[0])
    _native.linear_quantized_experts(x, w.table, w.n, w.k, *groups, kind, offsets, out)
    return out


def embed(ids: Tensor, w: Quantized) -> Tensor:
    out = torch.empty((ids.shape[0], w.k))
    _native.embed_quantized(ids, w.data, w.n, w.k, *_groups(w), out)
    return out


def unpack(w: Quantized) -> Tensor:
    out = torch.empty((w.n, w.k))
    _native.unpack_quantized(w.data, w.n, w.k, *_groups(w), w.gated, out)
    return out


def put(rows: Rows, w: Quantized, first: int) -> None:
    if isinstance(w, Int4Weight):
        facts = w.n, w.k, w.group, w.gated
        _native.put_int4(w.data, *facts, first, rows.codes, rows.scale, rows.zero)
    else:
        _native.put_int8(w.data, w.n, w.k, w.gated, first, rows.codes, rows.scale)


def _groups(w: Quantized) -> tuple[int, bool]:
    """Inputs that share a scale (0: all of them) and whether each scale has a zero beside it."""
    return (w.group, w.asymmetric) if isinstance(w, Int4Weight) else (0, False)
