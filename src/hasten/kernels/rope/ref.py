"""Definition of rotation and append in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

PAGE = 16


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` [R, H, D] by the angles ``cos``, ``sin`` [R, rot / 2]."""
    half = cos.shape[1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos[:, None], sin[:, None]
    return torch.cat([a * c - b * s, b * c + a * s, rest], -1)


def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    table_row: Tensor,
    table: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
) -> None:
    heads, dim = k_pages.shape[1], v.shape[2]
    at = positions.long()
    if ((at < 0) | (at >= len(cos))).any():
        raise ValueError(f"a position of {at.tolist()} is outside of cos with {len(cos)} rows")
    if ((slots < 0) | (slots >= table.shape[2] * PAGE)).any():
        raise ValueError(f"a slot of {slots.tolist()} is outside of the table")
    page = table[table_row.long(), :, slots.long() // PAGE].long()  # [R, G]
    if ((page < 0) | (page >= len(k_pages))).any():
        raise ValueError("a slot lies in a block that holds no valid page")
    rotated_k = rotate(k, cos[at], sin[at])
    q.copy_(rotate(q, cos[at], sin[at]))
    for row, slot in enumerate(slots.tolist()):
        for head in range(k.shape[1]):
            to = int(page[row, head // heads]), head % heads
            k_pages[to][:, slot % PAGE] = rotated_k[row, head].to(k_pages.dtype)
            v_pages[to][slot % PAGE, :dim] = v[row, head].to(v_pages.dtype)
            v_pages[to][slot % PAGE, dim:] = 0
