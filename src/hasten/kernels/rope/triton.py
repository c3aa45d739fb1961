"""Rotation and append in Triton: one program a row and head.

Nothing on the device can raise: a row whose position, slot or page is out of range is not written.
The caller checks its batch on the host.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PAGE = 16


@triton.jit(do_not_specialize=["angles", "blocks", "pages"])
def _append(
    q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, cos, sin, angles, positions, slots,
    table_row, table, blocks, k_pages, v_pages, pages, q_heads, heads, dim, half, value_dim, padded,
    groups: tl.constexpr, page: tl.constexpr, half_block: tl.constexpr, rest_block: tl.constexpr,
    value_block: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position, slot = tl.load(positions + row), tl.load(slots + row)
    turnable = (position >= 0) & (position < angles)
    at = tl.arange(0, half_block)
    keep = at < tl.where(turnable, half, 0)
    c = tl.load(cos + position.to(tl.int64) * half + at, keep, 0.0)
    s = tl.load(sin + position.to(tl.int64) * half + at, keep, 0.0)
    if head < q_heads:
        x = q + row * q_row + head * q_head
        a, b = tl.load(x + at, keep), tl.load(x + half + at, keep)
        tl.store(x + at, a * c - b * s, keep)
        tl.store(x + half + at, b * c + a * s, keep)
    else:
        head -= q_heads
        known = turnable & (slot >= 0) & (slot < blocks * page)
        line = (tl.load(table_row + row) * groups + head // heads).to(tl.int64) * blocks
        to = tl.load(table + line + slot // page, known, -1).to(tl.int64)
        known = known & (to >= 0) & (to < pages)
        place = to * heads + head % heads
        x = k + row * k_row + head * k_head
        y = k_pages + place * dim * page + slot % page
        keep = at < tl.where(known, half, 0)
        a, b = tl.load(x + at, keep), tl.load(x + half + at, keep)
        tl.store(y + at * page, (a * c - b * s).to(k_pages.dtype.element_ty), keep)
        tl.store(y + (half + at) * page, (b * c + a * s).to(k_pages.dtype.element_ty), keep)
        rest = 2 * half + tl.arange(0, rest_block)
        keep_rest = rest < tl.where(known, dim, 0)
        kept = tl.load(x + rest, keep_rest)
        tl.store(y + rest * page, kept.to(k_pages.dtype.element_ty), keep_rest)
        of = tl.arange(0, value_block)
        value = tl.load(
            v + row * v_row + head * v_head + of, of < tl.where(known, value_dim, 0), 0.0
        )
        y = v_pages + (place * page + slot % page) * padded + of
        tl.store(y, value.to(v_pages.dtype.element_ty), of < tl.where(known, padded, 0))


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
    if not rotate_keys:
        raise RuntimeError("keys before the rotation have no 'triton' implementation")
    rows, q_heads, dim = q.shape
    half, padded = cos.shape[1], v_pages.shape[3]
    if k_pages.shape[1] * table.shape[1] != k.shape[1] or k_pages.shape[2] != dim:
        raise ValueError(
            f"pages {tuple(k_pages.shape)} with {table.shape[1]} head groups do not hold keys "
            f"{tuple(k.shape)}"
        )
    if not rows:
        return
    _append[(rows, q_heads + k.shape[1])](
        q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), v, v.stride(0), v.stride(1),
        cos, sin, cos.shape[0], positions, slots, table_row, table, table.shape[2], k_pages,
        v_pages, k_pages.shape[0], q_heads, k_pages.shape[1], dim, half, v.shape[2], padded,
        table.shape[1], PAGE, triton.next_power_of_2(half),
        triton.next_power_of_2(max(1, dim - 2 * half)), triton.next_power_of_2(max(1, padded)),
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
