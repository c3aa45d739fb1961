"""Normalization through ``csrc/ops/norm.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten import _native


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    if out is None:
        out = torch.empty(x.shape)
    _native.rms_norm(x, None, weight, eps, add, out, None)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, total = torch.empty(x.shape), torch.empty(x.shape)
    _native.rms_norm(x, residual, weight, eps, None, out, total)
    return out, total
