"""Definition of the expert choice in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def route(
    router_logits: Tensor, k: int, normalize: bool, groups: int, top_groups: int
) -> tuple[Tensor, Tensor]:
    rows, experts = router_logits.shape
    if groups < 1 or experts % groups or not 1 <= top_groups <= groups:
        raise ValueError(
            f"cannot choose {top_groups} of {groups} equal groups of {experts} experts"
        )
    most = experts // groups * top_groups
    if not 1 <= k <= most:
        where = " in the chosen groups" if groups > 1 else ""
        raise ValueError(f"k is {k}, but there are {most} experts{where}")
    probabilities = torch.softmax(router_logits, -1)
    by_group = probabilities.view(rows, groups, -1)
    best = by_group.amax(-1).sort(dim=-1, descending=True, stable=True)[1][:, top_groups:]
    by_group = by_group.scatter(1, best[..., None].expand(-1, -1, experts // groups), -1.0)
    # ties: lower id first
    weights, ids = by_group.view(rows, experts).sort(dim=-1, descending=True, stable=True)
    weights, ids = weights[:, :k], ids[:, :k]
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids.int(), weights.contiguous()
