"""The projection as one native call: ``csrc/bindings/pages.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten import _native
from hasten.kernels.linear import StackedWeight, Weight, implementation
from hasten.kernels.qkv import HeadNorms


def qkv(
    x: Tensor,
    w: Weight,
    bias: Tensor | None,
    head_dim: int,
    norms: HeadNorms | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    table_row: Tensor,
    table: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rotate_keys: bool,
) -> Tensor:
    parts = w.parts if isinstance(w, StackedWeight) else (w,)
    matrices = [implementation(part, "cpu", x).matrix(part) for part in parts]
    q_norm, k_norm, eps = norms or (None, None, 0.0)
    heads = torch.empty((x.shape[0], w.n // head_dim, head_dim))
    _native.qkv(
        x,
        matrices,
        bias,
        q_norm,
        k_norm,
        eps,
        cos,
        sin,
        positions,
        slots,
        table_row,
        table,
        k_pages,
        v_pages,
        rotate_keys,
        heads,
    )
    return heads[:, : heads.shape[1] - 2 * table.shape[1] * k_pages.shape[1]]
