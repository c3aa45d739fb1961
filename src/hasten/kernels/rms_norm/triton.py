"""Normalization in Triton: one program a row, its sum over one block of fixed width."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(
    x, outer, inner, residual, weight, eps, add, out, total, count, size,
    has_residual: tl.constexpr, has_add: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    keep = at < size
    v = tl.load(x + row // count * outer + row % count * inner + at, keep, 0.0)
    if has_residual:
        v += tl.load(residual + row * size + at, keep, 0.0)
        tl.store(total + row * size + at, v, keep)
    mean = tl.sum(v * v, 0) / size
    y = v * tl.rsqrt(mean + eps) * tl.load(weight + at, keep, 0.0)
    if has_add:
        y += tl.load(add + row * size + at, keep, 0.0)
    tl.store(out + row * size + at, y, keep)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, add: Tensor | None, out: Tensor
) -> Tensor:
    if not 1 <= x.dim() <= 3 or x.shape[-1] != weight.numel():
        raise ValueError(f"cannot norm {tuple(x.shape)} by a weight of {tuple(weight.shape)}")
    if x.stride(-1) != 1:
        raise ValueError("the last dimension must be contiguous")
    total = out if residual is None else torch.empty(x.shape, device=x.device)
    lead = x[None, None] if x.dim() == 1 else x[:, None] if x.dim() == 2 else x
    rows, count, size = lead.shape
    if rows * count:
        block = triton.next_power_of_2(size)
        _rms_norm[(rows * count,)](
            lead, lead.stride(0), lead.stride(1), x if residual is None else residual, weight, eps,
            out if add is None else add, out, total, count, size, residual is not None,
            add is not None, block,
            num_warps=4 if block <= 4096 else 8, enable_fp_fusion=False,
        )  # fmt: skip
    return total


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    if out is None:
        out = torch.empty(x.shape, device=x.device)
    _launch(x, None, weight, eps, None if add is None else add.contiguous(), out)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, device=x.device)
    return out, _launch(x, residual.contiguous(), weight, eps, None, out)
