"""Paged attention through ``csrc/ops/attention.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten import _native


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    table_row: Tensor,
    positions: Tensor,
    base: Tensor,
    mask: Tensor,
    scale: float,
    window: int | None,
    sinks: int,
    softcap: float | None,
    return_lse: bool,
    value_dim: int,
    rope: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    if window is not None and window < 1:
        raise ValueError(f"a window holds at least the row itself, not {window} positions")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"the soft cap must be positive, not {softcap}")
    cos, sin = rope or (None, None)
    out = torch.empty((*q.shape[:2], value_dim))
    lse = torch.empty(q.shape[:2]) if return_lse else None
    _native.paged_attention(
        q,
        k_pages,
        v_pages,
        table,
        table_row,
        positions,
        base,
        mask,
        scale,
        window or 0,
        sinks,
        softcap or 0.0,
        cos,
        sin,
        out,
        lse,
    )
    return out, lse
