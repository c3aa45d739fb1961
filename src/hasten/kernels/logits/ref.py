"""Definition of the row maximum and log-sum-exp in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def row_max_lse(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if logits.shape[1] < 1:
        raise ValueError("logits has no columns")
    top = logits.amax(1)  # NaN where the row holds one
    ids = torch.arange(logits.shape[1], device=logits.device)
    first = torch.where(logits == top[:, None], ids, len(ids)).amin(1)
    first = torch.where(top.isnan(), 0, first)
    return first, top, logits.logsumexp(1)
