"""Definition of paged attention in plain torch: one row, one head, one chunk at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hasten.kernels.rope.ref import rotate, scales_of

PAGE = 16
CHUNK = 64


def visible_keys(
    position: int, base: int, mask: Tensor, window: int | None, sinks: int
) -> tuple[Tensor, Tensor]:
    """(positions, slots) of the keys that a row sees, positions ascending. ``mask`` is [W]."""
    words = mask.view(torch.int64)
    bits = (words[:, None] >> torch.arange(64)) & 1  # the sign bit is shifted in, then cut off
    nodes = bits.flatten().nonzero().flatten()
    path = torch.arange(position - len(nodes) + 1, position + 1)
    if len(nodes) and path[0] < base:
        raise ValueError(f"a path of {len(nodes)} nodes to {position} begins before {base}")
    committed = torch.arange(base)
    at = torch.cat([committed, path])
    slots = torch.cat([committed, base + nodes])
    if window is not None:
        keep = (at > position - window) | (at < sinks)
        at, slots = at[keep], slots[keep]
    return at, slots


def attend(
    q: Tensor, k: Tensor, v: Tensor, at: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """One query [D] over keys [n, D] and values [n, Dv] at ascending positions: the chunk rule."""
    m, total = q.new_tensor(-math.inf), q.new_tensor(0.0)
    o = q.new_zeros(v.shape[1])
    for chunk in (at // CHUNK).unique_consecutive():
        inside = at // CHUNK == chunk
        score = scale * (k[inside] @ q)
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        m_c = score.max()
        p = torch.exp(score - m_c)
        new = torch.maximum(m, m_c)
        keep, add = torch.exp(m - new), torch.exp(m_c - new)
        total = total * keep + p.sum() * add
        o = o * keep + (p @ v[inside]) * add
        m = new
    if not len(at):
        return o, m
    return o / total, m + torch.log(total)


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
    rows, q_heads, dim = q.shape
    groups, heads = table.shape[1], k_pages.shape[1]
    shared = q_heads // (groups * heads)
    out = q.new_empty(rows, q_heads, value_dim)
    lse = q.new_empty(rows, q_heads)
    for row in range(rows):
        at, slots = visible_keys(int(positions[row]), int(base[row]), mask[row], window, sinks)
        for head in range(groups * heads):
            page = table[int(table_row[row]), head // heads, slots // PAGE].long()
            if ((page < 0) | (page >= len(k_pages))).any():
                raise ValueError(f"row {row} reads a block that holds no valid page")
            where = page, head % heads, slots % PAGE
            k = k_pages[where[0], where[1], :dim, where[2]].to(q.dtype)
            v = v_pages[where][:, :value_dim].to(q.dtype)
            if k_pages.dtype == torch.int8:
                scales = [s[where][:, None].to(q.dtype) for s in scales_of(k_pages, dim)]
                k = k * scales[0]
                v = v * scales[-1]
            if rope is not None:
                cos, sin = (angles[at // PAGE, :, at % PAGE].to(q.dtype) for angles in rope)
                k = rotate(k[:, None], cos, sin)[:, 0]
            if v_pages.shape[3] == 0:
                v = k[:, dim - value_dim :]
            for i in range(head * shared, (head + 1) * shared):
                out[row, i], lse[row, i] = attend(q[row, i], k, v, at, scale, softcap)
    return out, lse if return_lse else None
