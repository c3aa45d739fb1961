"""Mixtures of experts through ``csrc/ops/logits.cpp`` and ``csrc/ops/moe.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten import _native


def route(
    router_logits: Tensor, k: int, normalize: bool, groups: int, top_groups: int
) -> tuple[Tensor, Tensor]:
    rows = router_logits.shape[0]
    ids = torch.empty((rows, max(k, 0)), dtype=torch.int32)
    weights = torch.empty((rows, max(k, 0)))
    _native.route(router_logits, k, normalize, ids, weights, groups, top_groups)
    return ids, weights


def group_rows(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    offsets = torch.empty(experts + 1, dtype=torch.int64)
    order = torch.empty(ids.numel(), dtype=torch.int32)
    slots = torch.empty(ids.shape, dtype=torch.int32)
    _native.group_rows(ids, experts, offsets, order, slots)
    return offsets, order, slots


def gather(x: Tensor, index: Tensor) -> Tensor:
    out = torch.empty((index.shape[0], x.shape[1]))
    _native.gather(x, index, out)
    return out


def combine(y: Tensor, slots: Tensor, shares: Tensor, add: Tensor | None) -> Tensor:
    out = torch.empty((slots.shape[0], y.shape[1]))
    _native.combine(y, slots, shares, add, out)
    return out
