"""Round to nearest: each weight becomes the code next to it, alone.

A scale serves one row (8 bits) or one group of a row (4 bits). The one that spans the largest
magnitude wastes codes on a few outliers, so some shorter ones are tried, too, and the one with the
least squared error is kept: outliers are then clipped. No data is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.linear import Rows

# Shares of the full range that are tried. In the symmetric 4-bit form the largest magnitude is -8
# codes away from zero at 1 and -7 at 8 / 7, where both signs reach equally far.
INT8_CLIPS = (1.0, 0.96, 0.92)
INT4_CLIPS = (1.0, 8 / 7, 1.1, 1.05, 0.95, 0.9, 0.85, 0.8)
ASYMMETRIC_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)


def to_int8(values: Tensor) -> Rows:
    """Rows float32 [n, K] as codes in [-127, 127] with one scale a row."""
    amax = _finite(values.abs().amax(1, keepdim=True))
    best = _Best(values)
    for clip in INT8_CLIPS:
        scale = amax * (clip / 127)
        codes = (values / scale).nan_to_num_(0).round_().clamp_(-127, 127)
        best.offer(codes, scale, codes * scale)
    return Rows(best.codes.to(torch.int8), best.scale[:, 0])


def _finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise ValueError("a weight is infinite, not a number, or too large for a float16 scale")
    return values


def to_int4(values: Tensor, group: int, asymmetric: bool) -> Rows:
    """Rows float32 [n, K] as codes in [0, 15] with one scale float16 for each group of inputs.

    The symmetric form gives a scale the sign with which the largest magnitude becomes code 0, of
    which there is one more on that side of 8. The asymmetric form spans the least and the largest
    value and has a zero for each group.
    """
    rows, inputs = values.shape
    parts = values.reshape(-1, group)
    best = _Best(parts)
    if asymmetric:
        least, most = parts.amin(1, keepdim=True), parts.amax(1, keepdim=True)
        least, most = least.clamp_(max=0), most.clamp_(min=0)  # a zero has a code
    else:
        largest = parts.gather(1, parts.abs().argmax(1, keepdim=True))
    for clip in ASYMMETRIC_CLIPS if asymmetric else INT4_CLIPS:
        span = (most - least) * (clip / 15) if asymmetric else largest * (clip / -8)
        scale = _finite(span.to(torch.float16).float())  # as it is stored
        zero = (least * -clip / scale).nan_to_num_(0).round_() if asymmetric else None
        shift = 8 if zero is None else zero
        codes = (parts / scale).nan_to_num_(0).add_(shift).round_().clamp_(0, 15)
        best.offer(codes, scale, (codes - shift) * scale, zero)
    return Rows(
        best.codes.to(torch.uint8).view(rows, inputs),
        best.scale.to(torch.float16).view(rows, -1),
        best.zero.to(torch.uint8).view(rows, -1) if asymmetric else None,
    )


class _Best:
    """The codes, scales and zeros of least squared error so far, row by row of ``values``."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._error = values.new_full((len(values), 1), float("inf"))
        self.codes = torch.zeros_like(values)
        self.scale = values.new_zeros(len(values), 1)
        self.zero = values.new_zeros(len(values), 1)

    def offer(self, codes: Tensor, scale: Tensor, read: Tensor, zero: Tensor | None = None) -> None:
        """``read`` is what the codes stand for; it is overwritten. Ties go to the earlier offer."""
        error = read.sub_(self._values).square_().sum(1, keepdim=True)
        better = error < self._error
        torch.where(better, error, self._error, out=self._error)
        torch.where(better, codes, self.codes, out=self.codes)
        torch.where(better, scale, self.scale, out=self.scale)
        if zero is not None:
            torch.where(better, zero, self.zero, out=self.zero)
