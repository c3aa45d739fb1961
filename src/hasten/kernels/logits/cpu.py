"""Rows of logits through ``csrc/ops/logits.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten import _native


def row_max_lse(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    argmax, top, lse, _ = row_top(logits, 0)
    return argmax, top, lse


def row_top(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    argmax, ids = torch.empty(rows, dtype=torch.int64), torch.empty((rows, k), dtype=torch.int64)
    top, lse = torch.empty(rows), torch.empty(rows)
    _native.row_top(logits, argmax, top, lse, ids)
    return argmax, top, lse, ids


def sum_exp(logits: Tensor, shift: Tensor, temperature: float) -> Tensor:
    out = torch.empty(logits.shape[0], dtype=torch.float64)
    _native.sum_exp(logits, shift, temperature, out)
    return out
