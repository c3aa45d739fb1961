"""Linear layers on blocks through ``csrc/ops/linear_blocks.cpp`` and ``csrc/blocks.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten import _native
from hasten.kernels.linear.blocks import BlockWeight
from hasten.kernels.linear.packed import ExpertWeights


def matrix(w: BlockWeight) -> _native.Matrix:
    """What native calls take that multiply by weights of any kind."""
    return _native.matrix_blocks(w.data, w.kind, w.n, w.k)


def linear(
    x: Tensor,
    w: BlockWeight,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    if out is None:
        out = torch.empty((x.shape[0], w.n))
    _native.linear_blocks(x, w.data, w.kind, w.n, w.k, bias, add, out)
    return out


def linear_gated(
    x: Tensor, w: BlockWeight, kind: str, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    if out is None:
        out = torch.empty((x.shape[0], w.n // 2))
    _native.linear_blocks_gated(x, w.data, w.kind, w.n, w.k, bias, kind, out)
    return out


def linear_experts(x: Tensor, w: ExpertWeights, offsets: Tensor, kind: str | None = None) -> Tensor:
    out = torch.empty((x.shape[0], w.n if kind is None else w.n // 2))
    blocks = w.weights[0].kind
    _native.linear_blocks_experts(x, w.table, blocks, w.n, w.k, kind, offsets, out)
    return out


def embed(ids: Tensor, w: BlockWeight) -> Tensor:
    out = torch.empty((ids.shape[0], w.k))
    _native.embed_blocks(ids, w.data, w.kind, w.n, w.k, w.gated, out)
    return out


def unpack(w: BlockWeight) -> Tensor:
    return embed(torch.arange(w.n), w)


def put(rows: Tensor, w: BlockWeight, first: int) -> None:
    _native.put_blocks(rows, w.kind, w.n, w.k, w.gated, first, w.data)
