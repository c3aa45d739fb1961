"""Linear layers on blocks through ``csrc/ops/linear_blocks.cpp`` and ``csrc/blocks.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten import _native
from hasten.kernels.linear.blocks import BlockWeight


def put(rows: Tensor, w: BlockWeight, first: int) -> None:
    _native.pack_blocks(rows, w.kind, first, w.n, w.k, w.data)


def unpack(w: BlockWeight) -> Tensor:
    return embed(torch.arange(w.n), w)


def embed(ids: Tensor, w: BlockWeight) -> Tensor:
    out = torch.empty((ids.shape[0], w.k))
    _native.unpack_blocks(w.data, w.kind, w.n, ids, out)
    return out


def linear(
    x: Tensor,
    w: BlockWeight,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    if out is None:
        out = torch.empty((x.shape[0], w.n))
    _native.linear_blocks(x, w.data, w.kind, w.n, bias, None, out)
    return out
