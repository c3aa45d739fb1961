"""Row maximum and log-sum-exp in Triton: one program a row, blocks of columns in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _row_max_lse(logits, stride, argmax, top, lse, columns, block: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    best = tl.full([], float("-inf"), tl.float32)
    first = tl.full([], 0, tl.int32)
    wrong = tl.full([], 0, tl.int32)
    for start in range(0, columns, block):
        at = start + tl.arange(0, block)
        v = tl.load(logits + at, at < columns, float("-inf"))
        wrong += tl.sum((v != v).to(tl.int32), 0)
        here = tl.max(v, 0)
        where = tl.min(tl.where(v == here, at, columns), 0)
        first = tl.where(here > best, where, first)  # ties stay with the earlier block
        best = tl.where(here > best, here, best)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, columns, block):
        at = start + tl.arange(0, block)
        v = tl.load(logits + at, at < columns, float("-inf"))
        total += tl.sum(tl.exp(v - best), 0)
    is_number = wrong == 0
    result = tl.where(best == float("-inf"), best, best + tl.log(total))
    tl.store(argmax + row, tl.where(is_number, first, 0).to(tl.int64))
    tl.store(top + row, tl.where(is_number, best, float("nan")))
    tl.store(lse + row, tl.where(is_number, result, float("nan")))


def row_max_lse(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = logits.shape
    if columns < 1:
        raise ValueError("logits has no columns")
    argmax = torch.empty(rows, dtype=torch.int64, device=logits.device)
    top, lse = torch.empty(rows, device=logits.device), torch.empty(rows, device=logits.device)
    if rows:
        _row_max_lse[(rows,)](
            logits, logits.stride(0), argmax, top, lse, columns, BLOCK, enable_fp_fusion=False
        )
    return argmax, top, lse
