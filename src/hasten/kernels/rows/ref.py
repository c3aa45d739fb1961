"""Definition of the row arithmetic in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def add(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.add(x, y, out=out)


def scale(x: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    return torch.mul(x, torch.tensor(factor, dtype=x.dtype), out=out)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    for i, row in enumerate(index.tolist()):
        if not 0 <= row < len(x):
            raise IndexError(f"index[{i}] is {row}, but there are {len(x)} rows")
    return x[index]
