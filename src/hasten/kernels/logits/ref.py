"""Definition of what sampling needs of a row, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def row_max_lse(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    argmax, top, lse, _ = row_top(logits, 0)
    return argmax, top, lse


def row_top(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if logits.shape[1] < 1:
        raise ValueError("logits has no columns")
    if k > logits.shape[1]:
        raise ValueError(f"the first {k} of {logits.shape[1]} columns were asked for")
    top = logits.amax(1)  # NaN where the row holds one
    ordered = logits.nan_to_num(-math.inf, math.inf, -math.inf)
    ids = ordered.sort(dim=1, descending=True, stable=True)[1]
    first = torch.where(top.isnan(), 0, ids[:, 0])
    return first, top, logits.logsumexp(1), ids[:, :k].contiguous()


def sum_exp(logits: Tensor, shift: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError("the temperature must be positive")
    x = (logits.double() - shift.double()[:, None]) / temperature
    return torch.where(x >= -700, x.exp(), 0.0).sum(1)
