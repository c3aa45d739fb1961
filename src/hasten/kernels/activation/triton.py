"""Activations in Triton: element by element, so an element's bits depend on nothing else."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def tanh(x):
    """tanh in float32 to about 4e-7, relative: a series near 0, else by exp(-2 |x|)."""
    a = tl.abs(x)
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315))))
    t = tl.exp(-2 * a)
    far = (1 - t) / (1 + t)
    return tl.where(a < 0.2, series, tl.where(x < 0, -far, far))


@triton.jit
def _gated(x, out, columns, tanh_form: tl.constexpr, block: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    keep = at < columns
    gate = tl.load(x + row * 2 * columns + at, keep)
    up = tl.load(x + row * 2 * columns + columns + at, keep)
    if tanh_form:
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), here with 2 sqrt(2 / pi)
        turn = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    else:
        turn = gate
    act = gate / (1 + tl.exp(-turn))
    tl.store(out + row * columns + at, act * up, keep)


@triton.jit(do_not_specialize=["count"])
def _softcap(x, out, count, cap, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    keep = at < count
    tl.store(out + at, cap * tanh(tl.load(x + at, keep) / cap), keep)


def gated(x: Tensor, kind: str) -> Tensor:
    rows, columns = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, columns), device=x.device)
    if out.numel():
        grid = rows, triton.cdiv(columns, BLOCK)
        tanh_form = kind == "gelu_tanh"
        _gated[grid](x.contiguous(), out, columns, tanh_form, BLOCK, enable_fp_fusion=False)
    return out


def softcap(x: Tensor, cap: float) -> Tensor:
    if cap <= 0:
        raise ValueError("the cap must be positive")
    out = torch.empty(x.shape, device=x.device)
    if out.numel():
        grid = (triton.cdiv(x.numel(), BLOCK),)
        _softcap[grid](x.contiguous(), out, x.numel(), cap, BLOCK, enable_fp_fusion=False)
    return out
