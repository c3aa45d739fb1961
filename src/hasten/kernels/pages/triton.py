"""Page moves in Triton: one program a layer and head does its moves in the given order.

Nothing on the device can raise: a move that names a page or slot out of range is left out. The
cache manager makes the lists on the host.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PAGE = 16


@triton.jit(do_not_specialize=["count"])
def _copy(x, pages, heads, size, src, dst, count, block: tl.constexpr):
    layer = tl.program_id(0) // heads
    lead = layer.to(tl.int64) * pages
    head = tl.program_id(0) % heads
    at = tl.program_id(1) * block + tl.arange(0, block)
    for i in range(count):
        a, b = tl.load(src + i), tl.load(dst + i)
        known = (a >= 0) & (a < pages) & (b >= 0) & (b < pages)
        keep = at < tl.where(known, size, 0)
        part = tl.load(x + ((lead + a) * heads + head) * size + at, keep)
        tl.debug_barrier()
        tl.store(x + ((lead + b) * heads + head) * size + at, part, keep)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["blocks", "count"])
def _move(
    x, pages, heads, size, along, across, table, groups, blocks, table_row, src, dst, count,
    page: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    layer, head = tl.program_id(0), tl.program_id(1) % heads
    group = tl.program_id(1) // heads
    lead = layer.to(tl.int64) * pages
    at = tl.arange(0, block)
    for i in range(count):
        line = table + (tl.load(table_row + i) * groups + group).to(tl.int64) * blocks
        a, b = tl.load(src + i), tl.load(dst + i)
        known = (a >= 0) & (a < blocks * page) & (b >= 0) & (b < blocks * page)
        from_page = tl.load(line + a // page, known, -1).to(tl.int64)
        to_page = tl.load(line + b // page, known, -1).to(tl.int64)
        known = known & (from_page >= 0) & (from_page < pages) & (to_page >= 0) & (to_page < pages)
        keep = at < tl.where(known, size, 0)
        from_place = ((lead + from_page) * heads + head) * size * page + a % page * across
        to_place = ((lead + to_page) * heads + head) * size * page + b % page * across
        part = tl.load(x + from_place + at * along, keep)
        tl.debug_barrier()
        tl.store(x + to_place + at * along, part, keep)
        tl.debug_barrier()


def copy_pages(k: Tensor, v: Tensor, src: Tensor, dst: Tensor) -> None:
    for x in (k, v):
        layers, pages, heads = x.shape[:3]
        size = x.shape[3] * x.shape[4]
        if size and len(src):
            grid = layers * heads, triton.cdiv(size, 1024)
            _copy[grid](x, pages, heads, size, src, dst, len(src), 1024, enable_fp_fusion=False)


def move_slots(
    k: Tensor, v: Tensor, table: Tensor, table_row: Tensor, src_slot: Tensor, dst_slot: Tensor
) -> None:
    groups, blocks = table.shape[1:]
    # a key's numbers lie a page's width apart, a value's side by side
    for x, size, along, across in ((k, k.shape[3], PAGE, 1), (v, v.shape[4], 1, v.shape[4])):
        if size and len(table_row):
            layers, pages, heads = x.shape[:3]
            _move[layers, groups * heads](
                x, pages, heads, size, along, across, table, groups, blocks, table_row, src_slot,
                dst_slot, len(table_row), PAGE, triton.next_power_of_2(size),
                enable_fp_fusion=False,
            )  # fmt: skip
