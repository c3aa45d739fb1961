"""Definition of the normalization in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    if add is not None:
        y = y + add
    return y if out is None else out.copy_(y)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total
