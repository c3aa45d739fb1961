"""Definition of the embedding in plain torch."""

from __future__ import annotations

from torch import Tensor

from hasten.kernels.linear.packed import PackedWeight
from hasten.kernels.linear.ref import unpack


def embed(ids: Tensor, w: PackedWeight) -> Tensor:
    for i, token in enumerate(ids.tolist()):
        if not 0 <= token < w.n:
            raise IndexError(f"ids[{i}] is {token}, but the table has {w.n} rows")
    return unpack(w)[ids].float()
