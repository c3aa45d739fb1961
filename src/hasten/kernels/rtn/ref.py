"""Definition of rounding to nearest in plain torch.

Errors are summed in float64 here and in float32 by the kernel: where two clips are equally good to
rounding, the choice may differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.kernels.linear import Rows

LEAST = 2.0**-100
"""A row of 8 bits whose largest magnitude is below this becomes zeros: 1 / scale stays finite."""


def rtn(values: Tensor, group: int, asymmetric: bool, clips: Sequence[float]) -> Rows:
    rows, inputs = values.shape
    parts = values.float().reshape(-1, group or inputs)
    most, least = parts.amax(1, keepdim=True).clamp(min=0), parts.amin(1, keepdim=True).clamp(max=0)
    low, high = (0, 15) if group else (-127, 127)
    error = torch.full(most.shape, float("inf"), dtype=torch.float64)
    best_codes, best_scale, best_zero = torch.zeros_like(parts), most, most
    for clip in torch.tensor(clips, dtype=torch.float32):
        zero = torch.full_like(most, 8.0 if group else 0.0)
        if not group:
            amax = torch.maximum(most, -least)
            scale = torch.where(amax < LEAST, 0.0, amax * (clip / 127))
        else:
            largest = torch.where(most >= -least, most, least)
            span = (most - least) * (clip / 15) if asymmetric else largest * (clip / -8)
            scale = span.to(torch.float16).float()  # as it is stored
            if asymmetric:
                zero = torch.where(scale == 0, 0.0, least * -clip / scale).clamp(max=15).round()
        if not (scale.isfinite().all() and parts.isfinite().all()):
            raise ValueError("a weight is infinite, not a number, or too large for a float16 scale")
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        codes = (parts * inverse + zero).clamp(low, high).round()
        off = (codes - zero) * scale - parts
        found = off.double().square().sum(1, keepdim=True)
        better = found < error
        error = torch.where(better, found, error)
        best_codes = torch.where(better, codes, best_codes)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    if not group:
        return Rows(best_codes.to(torch.int8), best_scale[:, 0])
    return Rows(
        best_codes.to(torch.uint8).view(rows, inputs),
        best_scale.to(torch.float16).view(rows, -1),
        best_zero.to(torch.uint8).view(rows, -1) if asymmetric else None,
    )
