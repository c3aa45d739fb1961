"""Queries, keys and values of rows, the keys and values written to their pages."""

from __future__ import annotations

from torch import Tensor

from hasten.kernels.dispatch import operation
from hasten.kernels.linear import Weight

HeadNorms = tuple[Tensor, Tensor, float]
"""Weights of the norms of queries and of keys, and what is added to a mean square."""


def qkv(
    x: Tensor,
    w: Weight,
    bias: Tensor | None,
    head_dim: int,
    norms: HeadNorms | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    table_row: Tensor,
    table: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rotate_keys: bool = True,
    *,
    impl: str | None = None,
) -> Tensor:
    """Project rows to queries, keys and values, append keys and values, give rotated queries.

    This is `hasten.kernels.linear.linear` by a weight of all queries, then all keys, then all
    values; with ``norms`` `hasten.kernels.rms_norm.rms_norm` of a row's queries and of its keys;
    then `hasten.kernels.rope.append`. The bits are those of one after the other.

    Args:
        x: float32 [R, K]; rows may be strided.
        w: [(Hq + 2 Hkv) D, K], of any kind, without a gate.
        bias: float32 [(Hq + 2 Hkv) D] or None.
        head_dim: D, of queries, keys and values.
        norms: each weight is float32 [size] and norms spans of so many numbers: heads (D), or any
            other part of what a row has of queries, or of keys, up to all of it.
        cos, sin, positions, slots, table_row, table, k_pages, v_pages, rotate_keys: as in
            `append`. Hkv is that of the pages.

    Returns the queries, float32 [R, Hq, D], a view whose rows are strided. Raises TypeError or
    ValueError for other types and shapes, a weight with a gate, and what `append` refuses, before
    anything is written to a page.
    """
    if w.gated:
        raise ValueError("the weight has a gate and an up half; linear_gated reads it")
    places = cos, sin, positions, slots, table_row, table, k_pages, v_pages, rotate_keys
    run = operation(__name__, "qkv", impl, x)
    queries: Tensor = run(x, w, bias, head_dim, norms, *places)
    return queries
