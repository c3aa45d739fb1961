"""Definition of rotation and append in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.linear import quantized_ref

PAGE = 16


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` [R, H, D] by the angles ``cos``, ``sin`` [R, rot / 2]."""
    half = cos.shape[1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos[:, None], sin[:, None]
    return torch.cat([a * c - b * s, b * c + a * s, rest], -1)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 [..., D], scales [...]) of ``x`` [..., D], each row a block of its own."""
    codes, scales = quantized_ref.quantize(x.reshape(-1, x.shape[-1]), x.shape[-1])
    return codes.view(x.shape), scales.view(x.shape[:-1])


def scales_of(k_pages: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Views, float32 [N, H, 16], of the scales in int8 key pages: of the keys, and of the values
    where values have pages of their own."""
    rows = k_pages[:, :, dim:].unflatten(2, (-1, 4))
    return tuple(rows[:, :, i].flatten(2).view(torch.float32) for i in range(rows.shape[2]))


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
    rotate_keys: bool = True,
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
    if rotate_keys:
        k = rotate(k, cos[at], sin[at])
    q.copy_(rotate(q, cos[at], sin[at]))
    scales: list[tuple[Tensor, Tensor]] = []  # (where they are stored, of the rows)
    if k_pages.dtype == torch.int8:
        k, k_scale = quantize(k)
        new = [k_scale]
        if dim:
            v, v_scale = quantize(v)
            new.append(v_scale)
        scales = list(zip(scales_of(k_pages, k.shape[2]), new, strict=True))
    for row, slot in enumerate(slots.tolist()):
        for head in range(k.shape[1]):
            to = int(page[row, head // heads]), head % heads
            k_pages[to][: k.shape[2], slot % PAGE] = k[row, head].to(k_pages.dtype)
            for stored, scale in scales:
                stored[to][slot % PAGE] = scale[row, head]
            v_pages[to][slot % PAGE, :dim] = v[row, head].to(v_pages.dtype)
            v_pages[to][slot % PAGE, dim:] = 0
