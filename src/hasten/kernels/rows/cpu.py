"""Row arithmetic through ``csrc/ops/rows.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten import _native


def add(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty(x.shape)
    _native.add(x, 1.0, y, out)
    return out


def scale(x: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty(x.shape)
    _native.add(x, factor, None, out)
    return out


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    out = torch.empty((index.shape[0], x.shape[1]))
    _native.take_rows(x, index, out)
    return out
