"""Expert choice in Triton: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _route(
    logits, ids, weights, experts, k, group_size, top_groups,
    normalize: tl.constexpr, block: tl.constexpr, chosen_block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    x = tl.load(logits + row * experts + at, at < experts, float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    share = tl.where(at < experts, e / tl.sum(e, 0), -1.0)
    # the best groups, ties to the lower: the first of the equal best experts is in the lowest
    rest, allowed = share, at < 0
    for _ in range(top_groups):
        group = tl.argmax(rest, 0) // group_size
        inside = at // group_size == group
        allowed = allowed | inside
        rest = tl.where(inside, -1.0, rest)
    rest = tl.where(allowed, share, -1.0)
    of = tl.arange(0, chosen_block)
    best, value = tl.zeros([chosen_block], tl.int32), tl.zeros([chosen_block], tl.float32)
    for i in range(k):
        first = tl.argmax(rest, 0)
        best = tl.where(of == i, first, best)
        value = tl.where(of == i, tl.max(rest, 0), value)
        rest = tl.where(at == first, -1.0, rest)
    if normalize:
        value = value / tl.sum(value, 0)
    tl.store(ids + row * k + of, best, of < k)
    tl.store(weights + row * k + of, value, of < k)


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
    ids = torch.empty((rows, k), dtype=torch.int32, device=router_logits.device)
    weights = torch.empty((rows, k), device=router_logits.device)
    if rows:
        _route[(rows,)](
            router_logits.contiguous(), ids, weights, experts, k, experts // groups, top_groups,
            normalize, triton.next_power_of_2(experts), triton.next_power_of_2(k),
            enable_fp_fusion=False,
        )  # fmt: skip
    return ids, weights
