"""Rounding through ``csrc/ops/rtn.cpp``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten import _native
from hasten.kernels.linear import Rows


def rtn(values: Tensor, group: int, asymmetric: bool, clips: Sequence[float]) -> Rows:
    rows, inputs = values.shape
    tried = torch.tensor(clips, dtype=torch.float32)
    if group:
        codes = torch.empty((rows, inputs), dtype=torch.uint8)
        scale = torch.empty((rows, inputs // group), dtype=torch.float16)
    else:
        codes = torch.empty((rows, inputs), dtype=torch.int8)
        scale = torch.empty(rows)
    zero = torch.empty(scale.shape, dtype=torch.uint8) if asymmetric else None
    _native.rtn(values, group, tried, codes, scale, zero)
    return Rows(codes, scale, zero)
