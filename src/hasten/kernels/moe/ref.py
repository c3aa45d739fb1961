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


def group_rows(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, k = ids.shape
    for row, expert in enumerate(ids.flatten().tolist()):
        if not 0 <= expert < experts:
            raise IndexError(f"row {row // k} chose expert {expert}, but there are {experts}")
    order = ids.flatten().sort(stable=True)[1]
    slots = torch.empty_like(order)
    slots[order] = torch.arange(rows * k)
    counts = torch.bincount(ids.flatten(), minlength=experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return offsets, (order // k).int(), slots.view(rows, k).int()


def gather(x: Tensor, index: Tensor) -> Tensor:
    return x[index.long()]


def combine(y: Tensor, slots: Tensor, shares: Tensor, add: Tensor | None) -> Tensor:
    slots, order = slots.long().sort(dim=-1)
    shares = shares.gather(1, order)
    out = y.new_zeros((slots.shape[0], y.shape[1]))
    for choice in range(slots.shape[1]):
        out = out + y[slots[:, choice]] * shares[:, choice, None]
    return out if add is None else out + add
