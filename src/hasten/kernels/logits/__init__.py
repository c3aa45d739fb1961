"""What greedy decoding and log probabilities need of a row of logits."""

from __future__ import annotations

from torch import Tensor

from hasten.kernels.dispatch import operation


def row_max_lse(logits: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(argmax int64 [R], max float32 [R], log-sum-exp float32 [R]) of float32 logits [R, V].

    Ties go to the lowest id. A row that holds a NaN gives 0, NaN, NaN; a row of -inf gives 0,
    -inf, -inf. The sum has a fixed order: blocks of 8192 columns, 16 lanes in each.
    """
    argmax, top, lse = operation(__name__, "row_max_lse", impl, logits)(logits)
    return argmax, top, lse
