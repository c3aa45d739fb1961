"""Round to nearest: each weight becomes the code next to it, alone.

A scale serves one row (8 bits) or one group of a row (4 bits). One that spans the largest
magnitude wastes codes on a few outliers, so some shorter ones are tried, too, which clip them, and
the one with the least squared error is kept. No data is needed.
"""

from __future__ import annotations

from torch import Tensor

from hasten.kernels.linear import Rows
from hasten.kernels.rtn import rtn_int4, rtn_int8

# Shares of the full range that are tried. In the symmetric 4-bit form the largest magnitude is 8
# codes away from zero at 1 and 7 at 8 / 7, where both signs reach equally far.
INT8_CLIPS = (1.0, 0.96, 0.92)
INT4_CLIPS = (1.0, 8 / 7, 1.1, 1.05, 0.95, 0.9, 0.85, 0.8)
ASYMMETRIC_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)


def to_int8(values: Tensor) -> Rows:
    """Rows [n, K], float32 or bfloat16, as codes in [-127, 127] with one scale a row."""
    return rtn_int8(values, INT8_CLIPS)


def to_int4(values: Tensor, group: int, asymmetric: bool) -> Rows:
    """Rows [n, K] as codes in [0, 15] with one scale float16 for each group of inputs, and in the
    asymmetric form a zero."""
    return rtn_int4(values, group, asymmetric, ASYMMETRIC_CLIPS if asymmetric else INT4_CLIPS)
