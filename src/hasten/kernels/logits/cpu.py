"""Row maximum and log-sum-exp through ``csrc/ops/logits.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten import _native


def row_max_lse(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    argmax = torch.empty(rows, dtype=torch.int64)
    top, lse = torch.empty(rows), torch.empty(rows)
    _native.row_max_lse(logits, argmax, top, lse)
    return argmax, top, lse
