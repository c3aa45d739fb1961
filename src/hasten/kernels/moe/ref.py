"""Definition of the expert choice in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def route(router_logits: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    experts = router_logits.shape[1]
    if not 1 <= k <= experts:
        raise ValueError(f"k is {k}, but there are {experts} experts")
    probabilities = torch.softmax(router_logits, -1)
    weights, ids = probabilities.sort(dim=-1, descending=True, stable=True)  # ties: lower id first
    weights, ids = weights[:, :k], ids[:, :k]
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids.int(), weights.contiguous()
