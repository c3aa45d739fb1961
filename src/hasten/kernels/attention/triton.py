"""Paged attention in Triton: partials of fixed chunks, then one fold in ascending order.

A program computes one chunk (64 positions) of one row and one KV head for all query heads that
share it, and writes (m, l, o) to a workspace; a second kernel folds a row's chunks in ascending
order. Which programs run beside each other, how many rows there are and how long the others are
enters nowhere, so a row's bits depend on that row alone; numbers that describe the batch are not
specialized on, so that one compiled kernel serves all of them. Keys are found by position, so a key
that is read as a tree node takes the lane that it takes as a committed one.

The order inside a chunk is this compiled kernel's (a tree over lanes), not the CPU's: results agree
with the CPU's to rounding, not in bits.

Nothing on the device can raise: a block without a valid page reads as NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.activation.triton import tanh

PAGE = 16
CHUNK = 64
WORD = 64
NOTHING = tl.constexpr(-1.0)
"""In place of a chunk's sum of exponentials: the row sees nothing of it, the rest is unwritten."""
WORKSPACE = 64 << 20
"""Bytes of partials at a time; more rows are computed in slices, which changes no bit."""


@triton.jit(do_not_specialize=["words"])
def _list_nodes(mask, words, base, nodes, count, word: tl.constexpr):
    """The slots of the tree nodes that a row sees, ascending, and how many."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, word)
    first = tl.load(base + row)
    found = tl.full([], 0, tl.int32)
    for i in range(words):
        # the sign bit is shifted in, then cut off
        bits = ((tl.load(mask + row * words + i) >> at.to(tl.int64)) & 1).to(tl.int32)
        place = found + tl.cumsum(bits, 0) - 1
        tl.store(nodes + row * words * word + place, first + i * word + at, bits == 1)
        found += tl.sum(bits, 0)
    tl.store(count + row, found)


@triton.jit(do_not_specialize=["first", "pages", "blocks", "most_nodes", "words", "chunks"])
def _chunk(
    first, q, q_row, q_head, k_pages, v_pages, pages, table, blocks, table_row, positions, base,
    nodes, most_nodes, words, count, scale, window, sinks, cap, m_out, l_out, o_out, chunks, dim,
    value_dim, padded, groups: tl.constexpr, heads: tl.constexpr, shared: tl.constexpr,
    has_window: tl.constexpr, has_cap: tl.constexpr, in_keys: tl.constexpr,
    page: tl.constexpr, chunk: tl.constexpr, dim_block: tl.constexpr,
    value_block: tl.constexpr,
):  # fmt: skip
    part, head = tl.program_id(0), tl.program_id(1)
    local = tl.program_id(2).to(tl.int64)  # row of the workspace
    row = first + local
    position, committed = tl.load(positions + row), tl.load(base + row)
    at = part * chunk + tl.arange(0, chunk)  # positions
    # rows without a mask take the same way, so that one compiled kernel serves trees and chains
    found = tl.load(count + row, words > 0, 0)
    start = position - found + 1
    on_path = (at >= start) & (at <= position) & (at >= committed)
    slot = tl.where(on_path, tl.load(nodes + row * most_nodes + at - start, on_path, 0), at)
    visible = (at < committed) | on_path
    if has_window:
        visible = visible & ((at > position - window) | (at < sinks))
    anything = tl.max(visible.to(tl.int32), 0) > 0
    out = (local * groups * heads + head) * shared * chunks + part  # of query head 0
    if anything:
        line = (tl.load(table_row + row) * groups + head // heads).to(tl.int64) * blocks
        inside = visible & (slot < blocks * page)
        of = tl.load(table + line + slot // page, inside, -1).to(tl.int64)
        valid = inside & (of >= 0) & (of < pages)
        place = of * heads + head % heads
        d = tl.arange(0, dim_block)
        k_at = k_pages + (place * dim * page + slot % page)[None, :] + d[:, None] * page
        missing = float("nan")
        k = tl.load(k_at, valid[None, :] & (d < dim)[:, None], 0.0).to(tl.float32)  # [D, 64]
        e = tl.arange(0, value_block)
        if in_keys:
            v_at = k_pages + (place * dim * page + slot % page)[:, None]
            v_at += (dim - value_dim + e)[None, :] * page
        else:
            v_at = v_pages + ((place * page + slot % page) * padded)[:, None] + e[None, :]
        v = tl.load(v_at, valid[:, None] & (e < value_dim)[None, :], 0.0).to(tl.float32)
        for i in tl.static_range(shared):
            query = tl.load(q + row * q_row + (head * shared + i) * q_head + d, d < dim, 0.0)
            score = scale * tl.sum(query[:, None] * k, 0)
            if has_cap:
                score = cap * tanh(score / cap)
            score = tl.where(visible, tl.where(valid, score, missing), float("-inf"))
            m = tl.max(score, 0)
            p = tl.exp(score - m)
            to = out + i * chunks
            tl.store(m_out + to, m)
            tl.store(l_out + to, tl.sum(p, 0))
            tl.store(o_out + to * value_dim + e, tl.sum(p[:, None] * v, 0), e < value_dim)
    else:
        for i in tl.static_range(shared):
            tl.store(l_out + out + i * chunks, NOTHING)


@triton.jit(do_not_specialize=["begin", "chunks"])
def _fold(
    begin, m_in, l_in, o_in, chunks, positions, base, out, lse, value_dim,
    has_lse: tl.constexpr, chunk: tl.constexpr, value_block: tl.constexpr,
):  # fmt: skip
    local, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row = begin + local
    first = (local * heads + head) * chunks
    e = tl.arange(0, value_block)
    keep_value = e < value_dim
    saw = False
    m = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    o = tl.zeros([value_block], tl.float32)
    end = tl.maximum(tl.load(positions + row) + 1, tl.load(base + row))
    for part in range(tl.minimum(tl.cdiv(end, chunk), chunks)):
        l_c = tl.load(l_in + first + part)
        if l_c != NOTHING:
            m_c = tl.load(m_in + first + part)
            new = tl.maximum(m, m_c, propagate_nan=tl.PropagateNan.ALL)
            keep, add = tl.exp(m - new), tl.exp(m_c - new)
            total = total * keep + l_c * add
            o_c = tl.load(o_in + (first + part) * value_dim + e, keep_value, 0.0)
            o = o * keep + o_c * add
            m = new
            saw = True
    total = tl.where(saw, total, 1.0)
    result = tl.where(saw, o / total, 0.0)
    tl.store(out + (row * heads + head) * value_dim + e, result, keep_value)
    if has_lse:
        tl.store(lse + row * heads + head, tl.where(saw, m + tl.log(total), float("-inf")))


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
    rope: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    if rope is not None or k_pages.dtype == torch.int8:
        what = "int8 pages" if rope is None else "keys before the rotation"
        raise RuntimeError(f"{what} have no 'triton' implementation")
    if window is not None and window < 1:
        raise ValueError(f"a window holds at least the row itself, not {window} positions")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"the soft cap must be positive, not {softcap}")
    rows, q_heads, dim = q.shape
    groups, blocks = table.shape[1:]
    pages, heads = k_pages.shape[:2]
    if k_pages.shape[2] != dim or q_heads % (groups * heads) or q.stride(2) != 1:
        raise ValueError(
            f"queries {tuple(q.shape)} do not fit pages {tuple(k_pages.shape)} with {groups} head "
            "groups"
        )
    device = q.device
    out = torch.empty((rows, q_heads, value_dim), device=device)
    lse = torch.empty((rows, q_heads), device=device) if return_lse else None
    if not rows:
        return out, lse
    chunks = max(1, -(-blocks * PAGE // CHUNK))  # programs behind a row's end stop at once
    words = mask.shape[1]
    nodes = torch.empty((rows, max(1, words * WORD)), dtype=torch.int32, device=device)
    count = torch.empty(rows, dtype=torch.int32, device=device)
    if words:
        _list_nodes[(rows,)](
            mask.view(torch.int64), words, base, nodes, count, WORD, enable_fp_fusion=False
        )
    most = max(1, WORKSPACE // (q_heads * chunks * (value_dim + 2) * 4))
    value_block = triton.next_power_of_2(value_dim)
    for begin in range(0, rows, most):
        some = min(most, rows - begin)
        m, total = torch.empty((2, some, q_heads, chunks), device=device)
        o = torch.empty((some, q_heads, chunks, value_dim), device=device)
        _chunk[chunks, groups * heads, some](
            begin, q, q.stride(0), q.stride(1), k_pages, v_pages, pages, table, blocks, table_row,
            positions, base, nodes, nodes.shape[1], words, count, scale, window or 0,
            sinks, softcap or 1.0, m, total, o, chunks, dim, value_dim, v_pages.shape[3], groups,
            heads, q_heads // (groups * heads), window is not None, softcap is not None,
            not v_pages.shape[3], PAGE, CHUNK, triton.next_power_of_2(dim), value_block,
            num_warps=4 if dim <= 128 else 8, enable_fp_fusion=True,
        )  # fmt: skip
        _fold[some, q_heads](
            begin, m, total, o, chunks, positions, base, out, out if lse is None else lse,
            value_dim, lse is not None, CHUNK, value_block, enable_fp_fusion=False,
        )  # fmt: skip
    return out, lse
