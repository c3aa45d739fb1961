"""Weights of a linear layer in the order in which the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 16
"""Outputs in a panel: the width of the kernels' vectors."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [n, k] in panels of 16 outputs.

    ``data`` is [ceil(n / 16), k, 16], float32 or bfloat16: ``data[p, i, j]`` is the weight of
    output ``16 p + j`` for input ``i``; outputs beyond ``n`` are zero. So the kernel reads memory
    from front to back, one vector a step. Weights of several groups lie one after the other,
    ``data`` [groups, ceil(n / 16), k, 16].
    """

    data: Tensor
    n: int
    k: int

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def size(self) -> int:
        """Numbers in the weight, without the padding of its last panels."""
        groups = self.data.shape[0] if self.data.dim() == 4 else 1
        return groups * self.n * self.k

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def packed_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which weights of this type are kept: float16 becomes float32."""
    kept = {
        torch.float32: torch.float32,
        torch.bfloat16: torch.bfloat16,
        torch.float16: torch.float32,
    }
    if dtype not in kept:
        raise TypeError(f"weights are float32, bfloat16 or float16, not {dtype}")
    return kept[dtype]
