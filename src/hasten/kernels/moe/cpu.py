"""Expert choice through ``csrc/ops/logits.cpp``."""

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
