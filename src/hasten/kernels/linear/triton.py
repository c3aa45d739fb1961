"""Linear layers in Triton, on weights in the order of `hasten.kernels.linear.device`.

The definitions, each for any number of rows:

- float32 and bfloat16 weights: blocks of 128 inputs are added to the output's accumulator in
  ascending order, whatever the order inside a block is in the one compiled kernel; then bias and
  residual. float32 weights are multiplied in float32 without tensor cores. Under bfloat16 weights
  an activation is split into three bfloat16 numbers whose sum it is (24 bits of fraction are
  3 x 8), so that tensor cores give float32 products; nothing is narrowed. There is one tile for
  all row counts, since a larger one could bring in another instruction with another order: what
  makes rows independent of each other is that nothing about the tile depends on their number.
- int8 and 4-bit weights: activations are quantized as the CPU's are, sums of integers are exact,
  and floats are combined in the CPU's order with the same roundings. So tiles may follow the
  number of rows, and the bits are those of the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.activation.triton import gated
from hasten.kernels.dispatch import interpreted
from hasten.kernels.linear.device import DeviceWeight

ROWS, OUTPUTS, INPUTS = 16, 32, 128
"""The one tile of float weights. 16 rows are what the smallest matrix instruction takes."""
WIDEN = interpreted()
"""The interpreter (triton 3.9) multiplies the bits of bfloat16 numbers as integers."""
LEAST = tl.constexpr(2.0**-100)
"""Activations whose largest magnitude is below this count as zeros: 127 / amax stays finite."""


@triton.jit
def _finish(
    y, row, column, some_rows, some_columns, bias, add, add_row, out, out_row,
    has_bias: tl.constexpr, has_add: tl.constexpr,
):  # fmt: skip
    """Bias, then residual, one addition each; then the outputs are written."""
    keep = some_rows[:, None] & some_columns[None, :]
    if has_bias:
        y += tl.load(bias + column, some_columns, 0.0)[None, :]
    if has_add:
        y += tl.load(add + row[:, None] * add_row + column[None, :], keep, 0.0)
    tl.store(out + row[:, None] * out_row + column[None, :], y, keep)


@triton.jit(do_not_specialize=["rows"])
def _dense(
    x, x_row, w, bias, add, add_row, out, out_row, rows, n, k,
    split: tl.constexpr, widen: tl.constexpr, has_bias: tl.constexpr, has_add: tl.constexpr,
    tile_rows: tl.constexpr, tile_outputs: tl.constexpr, tile_inputs: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)
    column = (tl.program_id(1) * tile_outputs + tl.arange(0, tile_outputs)).to(tl.int64)
    some_rows, some_columns = row < rows, column < n
    acc = tl.zeros([tile_rows, tile_outputs], tl.float32)
    for start in range(0, k, tile_inputs):
        i = start + tl.arange(0, tile_inputs)
        inside = i < k
        a = tl.load(
            x + row[:, None] * x_row + i[None, :], some_rows[:, None] & inside[None, :], 0.0
        )
        b = tl.load(
            w + column[None, :] * k + i[:, None], some_columns[None, :] & inside[:, None], 0.0
        )
        if split:
            high = a.to(tl.bfloat16)
            rest = a - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            if widen:
                low, middle = low.to(tl.float32), middle.to(tl.float32)
                high, b = high.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(low, b, acc)
            acc = tl.dot(middle, b, acc)
            acc = tl.dot(high, b, acc)
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")
    _finish(
        acc, row, column, some_rows, some_columns, bias, add, add_row, out, out_row, has_bias,
        has_add,
    )  # fmt: skip


@triton.jit
def _quantize(x, x_row, codes, scales, sums, k, block, blocks, width: tl.constexpr):
    """One block of activations of a row: codes, scale, and the sum of the codes."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, width)
    keep = at < block
    v = tl.load(x + row * x_row + part * block + at, keep, 0.0)
    size = tl.abs(v)
    amax = tl.max(tl.where(size < float("inf"), size, 0.0), 0)
    finite = tl.max((size < float("inf")).to(tl.int32) ^ 1, 0) == 0  # a NaN is below nothing
    some = finite & (amax >= LEAST)
    amax = tl.where(some, amax, 1.0)
    inverse = tl.where(some, tl.div_rn(127.0, amax), 0.0)
    v = tl.where(some, v, 0.0)
    # adding 1.5 * 2^23 rounds to a whole number, halves to even
    code = (v * inverse + 12582912.0) - 12582912.0
    code = code.to(tl.int32)
    tl.store(codes + row * k + part * block + at, code.to(tl.int8), keep)
    scale = tl.where(some, tl.div_rn(amax, 127.0), 0.0)
    tl.store(scales + row * blocks + part, tl.where(finite, scale, float("nan")))
    tl.store(sums + row * blocks + part, tl.sum(code, 0))


@triton.jit(do_not_specialize=["rows"])
def _int8(
    x, x_scale, w, w_scale, bias, add, add_row, out, out_row, rows, n, k,
    has_bias: tl.constexpr, has_add: tl.constexpr,
    tile_rows: tl.constexpr, tile_outputs: tl.constexpr, tile_inputs: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)
    column = (tl.program_id(1) * tile_outputs + tl.arange(0, tile_outputs)).to(tl.int64)
    some_rows, some_columns = row < rows, column < n
    acc = tl.zeros([tile_rows, tile_outputs], tl.int32)
    for start in range(0, k, tile_inputs):
        i = start + tl.arange(0, tile_inputs)
        inside = i < k
        a = tl.load(x + row[:, None] * k + i[None, :], some_rows[:, None] & inside[None, :], 0)
        b = tl.load(
            w + column[None, :] * k + i[:, None], some_columns[None, :] & inside[:, None], 0
        )
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    of_row = tl.load(x_scale + row, some_rows, 0.0)
    of_output = tl.load(w_scale + column, some_columns, 0.0)
    y = acc.to(tl.float32) * (of_row[:, None] * of_output[None, :])
    _finish(
        y, row, column, some_rows, some_columns, bias, add, add_row, out, out_row, has_bias,
        has_add,
    )  # fmt: skip


@triton.jit
def _add_group(
    y, codes, group, x, x_scale, x_sum, w_scale, w_zero, row, some_rows, column, some_columns, k,
    groups, asymmetric: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """``y = fma(float(sum of a group), row scale * output scale, y)``."""
    i = group * size + tl.arange(0, size)
    a = tl.load(x + row[:, None] * k + i[None, :], some_rows[:, None], 0)
    acc = tl.dot(a, codes, out_dtype=tl.int32)
    total = tl.load(x_sum + row * groups + group, some_rows, 0)
    if asymmetric:
        zero = tl.load(w_zero + column * groups + group, some_columns, 0).to(tl.int32)
        acc -= total[:, None] * zero[None, :]
    else:
        acc -= total[:, None] * 8
    of_row = tl.load(x_scale + row * groups + group, some_rows, 0.0)
    of_output = tl.load(w_scale + column * groups + group, some_columns, 0.0).to(tl.float32)
    return tl.fma(acc.to(tl.float32), of_row[:, None] * of_output[None, :], y)


@triton.jit(do_not_specialize=["rows"])
def _int4(
    x, x_scale, x_sum, w, w_scale, w_zero, bias, add, add_row, out, out_row, rows, n, k, groups,
    asymmetric: tl.constexpr, has_bias: tl.constexpr, has_add: tl.constexpr,
    tile_rows: tl.constexpr, tile_outputs: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)
    column = (tl.program_id(1) * tile_outputs + tl.arange(0, tile_outputs)).to(tl.int64)
    some_rows, some_columns = row < rows, column < n
    y = tl.zeros([tile_rows, tile_outputs], tl.float32)
    pairs = (groups + 1) // 2
    j = tl.arange(0, size)
    for pair in range(pairs):
        both = tl.load(
            w + column[None, :] * pairs * size + pair * size + j[:, None], some_columns[None, :], 0
        )
        y = _add_group(
            y, (both & 15).to(tl.int8), 2 * pair, x, x_scale, x_sum, w_scale, w_zero, row,
            some_rows, column, some_columns, k, groups, asymmetric, size,
        )  # fmt: skip
        if 2 * pair + 1 < groups:
            y = _add_group(
                y, (both >> 4).to(tl.int8), 2 * pair + 1, x, x_scale, x_sum, w_scale, w_zero, row,
                some_rows, column, some_columns, k, groups, asymmetric, size,
            )  # fmt: skip
    _finish(
        y, row, column, some_rows, some_columns, bias, add, add_row, out, out_row, has_bias,
        has_add,
    )  # fmt: skip


def quantize(x: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [R, K], scales float32 and sums of codes int32 [R, K / block] of activations."""
    rows, k = x.shape
    blocks = k // block
    codes = torch.empty((rows, k), dtype=torch.int8, device=x.device)
    scales = torch.empty((rows, blocks), device=x.device)
    sums = torch.empty((rows, blocks), dtype=torch.int32, device=x.device)
    if rows:
        _quantize[rows, blocks](
            x, x.stride(0), codes, scales, sums, k, block, blocks, triton.next_power_of_2(block),
            num_warps=1 if block <= 128 else 4, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scales, sums


def linear(
    x: Tensor,
    w: DeviceWeight,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    rows, k = x.shape
    if k != w.k or x.stride(1) != 1 or x.dtype != torch.float32:
        raise ValueError(f"cannot multiply {x.dtype} {tuple(x.shape)} by a weight {w.n} x {w.k}")
    if out is None:
        out = torch.empty((rows, w.n), device=x.device)
    if not rows:
        return out
    ends = (
        out if bias is None else bias,
        out if add is None else add,
        0 if add is None else add.stride(0),
        out,
        out.stride(0),
        rows,
        w.n,
        k,
    )
    has = bias is not None, add is not None
    if w.scale is None:
        grid = triton.cdiv(rows, ROWS), triton.cdiv(w.n, OUTPUTS)
        _dense[grid](
            x, x.stride(0), w.data, *ends, w.dtype == torch.bfloat16, WIDEN, *has, ROWS, OUTPUTS,
            INPUTS, num_warps=4, num_stages=4, enable_fp_fusion=False,
        )  # fmt: skip
        return out
    codes, scales, sums = quantize(x, w.group or k)
    tile_rows = 16 if rows <= 16 else 64
    tile_outputs = 32 if rows <= 16 else 64
    grid = triton.cdiv(rows, tile_rows), triton.cdiv(w.n, tile_outputs)
    if w.group:
        zero = w.scale if w.zero is None else w.zero
        _int4[grid](
            codes, scales, sums, w.data, w.scale, zero, *ends, k // w.group, w.zero is not None,
            *has, tile_rows, tile_outputs, w.group,
            num_warps=4, num_stages=4, enable_fp_fusion=False,
        )  # fmt: skip
    else:
        _int8[grid](
            codes, scales, w.data, w.scale, *ends, *has, tile_rows, tile_outputs, INPUTS,
            num_warps=4, num_stages=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def linear_gated(
    x: Tensor, w: DeviceWeight, kind: str, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Gate and up as one product, then the activation."""
    y = gated(linear(x, w, bias), kind)
    return y if out is None else out.copy_(y)


def linear_grouped(x: Tensor, w: DeviceWeight, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty((*x.shape[:2], w.n), device=x.device)
    for g in range(x.shape[1]):
        linear(x[:, g], DeviceWeight(w.data[g], w.n, w.k), out=out[:, g])
    return out


@triton.jit
def _embed(
    ids, w, scale, zero, out, n, k, group,
    kind: tl.constexpr, asymmetric: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.load(ids + row).to(tl.int64)
    at = part * block + tl.arange(0, block)
    known = (token >= 0) & (token < n)
    keep = at < tl.where(known, k, 0)
    if kind == "int4":
        g = at // group
        groups = k // group
        pairs = (groups + 1) // 2
        both = tl.load(w + (token * pairs + g // 2) * group + at % group, keep, 0).to(tl.int32)
        code = tl.where(g % 2 == 0, both & 15, both >> 4).to(tl.float32)
        if asymmetric:
            code -= tl.load(zero + token * groups + g, keep, 0).to(tl.float32)
        else:
            code -= 8.0
        v = code * tl.load(scale + token * groups + g, keep, 0.0).to(tl.float32)
    else:
        v = tl.load(w + token * k + at, keep, 0).to(tl.float32)
        if kind == "int8":
            v *= tl.load(scale + token, known, 0.0)
    tl.store(out + row * k + at, tl.where(known, v, float("nan")), at < k)


def embed(ids: Tensor, w: DeviceWeight) -> Tensor:
    """An id without a row gives NaN: nothing on a device can raise."""
    out = torch.empty((ids.shape[0], w.k), device=ids.device)
    if len(ids):
        kind = "int4" if w.group else "float" if w.scale is None else "int8"
        scale = out if w.scale is None else w.scale
        zero = out if w.zero is None else w.zero
        block = 1024
        _embed[len(ids), triton.cdiv(w.k, block)](
            ids, w.data, scale, zero, out, w.n, w.k, w.group or 1, kind, w.zero is not None, block,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
