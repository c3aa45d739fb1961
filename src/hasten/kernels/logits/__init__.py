"""What sampling needs of a row of logits, so that no vocabulary is ever sorted."""

from __future__ import annotations

from torch import Tensor

from hasten.kernels.dispatch import operation


def row_max_lse(logits: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(argmax int64 [R], max float32 [R], log-sum-exp float32 [R]) of float32 logits [R, V].

    Ties go to the lowest id. A row that holds a NaN gives 0, NaN, NaN; a row of -inf gives 0,
    -inf, -inf. The sum has a fixed order: blocks of 8192 columns, each relative to its own maximum
    and summed in 16 lanes, are rescaled to the row's maximum and added in ascending order.
    """
    argmax, top, lse = operation(__name__, "row_max_lse", impl, logits)(logits)
    return argmax, top, lse


def row_top(
    logits: Tensor, k: int, *, impl: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of `row_max_lse` and the ``k`` <= V likeliest ids, int64 [R, k].

    Ids are ordered by value descending, then id ascending; a NaN counts as -inf there.
    """
    argmax, top, lse, ids = operation(__name__, "row_top", impl, logits)(logits, k)
    return argmax, top, lse, ids


def sum_exp(
    logits: Tensor, shift: Tensor, temperature: float, *, impl: str | None = None
) -> Tensor:
    """Sum of ``exp((logits - shift) / temperature)`` over each row, float64 [R].

    ``logits`` is float32 [R, V], ``shift`` float32 [R] the maximum of each row (so that no term
    exceeds 1), ``temperature`` > 0. All arithmetic is in float64. A term below e^-700 counts as 0,
    as does a NaN. The sum has a fixed order: 16 lanes in each block of 8192 columns, blocks
    ascending.
    """
    total: Tensor = operation(__name__, "sum_exp", impl, logits)(logits, shift, temperature)
    return total
