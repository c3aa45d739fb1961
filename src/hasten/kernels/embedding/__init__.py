"""Token embeddings out of a packed weight, so that tied embeddings are stored once."""

from __future__ import annotations

from torch import Tensor

from hasten.kernels.dispatch import operation
from hasten.kernels.linear import PackedWeight, Weight, implementation


def embed(ids: Tensor, w: Weight, *, impl: str | None = None) -> Tensor:
    """Rows ``ids`` of the weight, as float32 [R, K].

    ``ids`` is int64 [R]. Raises IndexError, naming the id, for one outside of [0, N).
    """
    if not isinstance(w, PackedWeight):
        return implementation(w, impl, ids).embed(ids, w)
    rows: Tensor = operation(__name__, "embed", impl, ids)(ids, w)
    return rows
