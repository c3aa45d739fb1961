"""Rows of a weight rounded to the nearest of the codes that a scale allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hasten.kernels.dispatch import choose
from hasten.kernels.linear import Rows
from hasten.kernels.rtn import cpu, ref


def rtn_int8(values: Tensor, clips: Sequence[float], *, impl: str | None = None) -> Rows:
    """Codes in [-127, 127] with one scale a row, for ``values`` [n, K], float32 or bfloat16.

    ``clips`` are shares of the largest magnitude of a row that its scale may span; the one with
    the least squared error is taken, the earlier of equals. Raises ValueError for values that are
    not finite.
    """
    return _module(impl, values).rtn(values, 0, False, clips)


def rtn_int4(
    values: Tensor, group: int, asymmetric: bool, clips: Sequence[float], *, impl: str | None = None
) -> Rows:
    """Codes in [0, 15] with one scale float16 for each ``group`` of inputs.

    The symmetric form has the zero 8, and a scale of the sign with which the largest magnitude
    (the positive one of equals) becomes code 0, of which there is one more on that side of 8. The
    asymmetric form spans the least and the largest value, and 0, and has a zero beside each scale.
    ``values`` and ``clips`` as in `rtn_int8`; raises ValueError also for a scale beyond float16.
    """
    return _module(impl, values).rtn(values, group, asymmetric, clips)


def _module(impl: str | None, values: Tensor) -> Any:
    return cpu if choose(impl, values) == "cpu" else ref
