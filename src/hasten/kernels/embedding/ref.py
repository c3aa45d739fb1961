"""Definition of the embedding in plain torch."""

from __future__ import annotations

from torch import Tensor

from hasten.kernels.linear.packed import PANEL, PackedWeight


def embed(ids: Tensor, w: PackedWeight) -> Tensor:
    for i, token in enumerate(ids.tolist()):
        if not 0 <= token < w.n:
            raise IndexError(f"ids[{i}] is {token}, but the table has {w.n} rows")
    return w.data[ids // PANEL, :, ids % PANEL].float()
