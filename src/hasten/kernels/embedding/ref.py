"""Definition of the embedding in plain torch."""

from __future__ import annotations

from torch import Tensor

from hasten.kernels.linear.packed import PackedWeight
from hasten.kernels.linear.ref import rows_of_table, unpack


def embed(ids: Tensor, w: PackedWeight) -> Tensor:
    return rows_of_table(unpack(w), ids).float()
