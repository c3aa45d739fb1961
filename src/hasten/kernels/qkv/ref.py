"""Definition of the fused projection: the operations that it is made of, one after the other."""

from __future__ import annotations

from torch import Tensor

from hasten.kernels.linear import Weight, linear
from hasten.kernels.qkv import HeadNorms
from hasten.kernels.rms_norm import rms_norm
from hasten.kernels.rope import append


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
    rotate_keys: bool,
    *,
    impl: str = "ref",
) -> Tensor:
    """``impl`` is that of the operations."""
    kv_heads = table.shape[1] * k_pages.shape[1]
    q_heads = w.n // head_dim - 2 * kv_heads
    if q_heads < 0 or (q_heads + 2 * kv_heads) * head_dim != w.n:
        raise ValueError(
            f"the weight has {w.n} outputs, not queries beside {kv_heads} keys and values of "
            f"{head_dim} dimensions"
        )
    heads = linear(x, w, bias, impl=impl).unflatten(1, (w.n // head_dim, head_dim))
    q, k, v = heads.split([q_heads, kv_heads, kv_heads], 1)
    if norms is not None:
        q_weight, k_weight, eps = norms
        q, k = _normed(q, q_weight, eps, impl), _normed(k, k_weight, eps, impl)
    places = positions, slots, table_row, table, k_pages, v_pages, rotate_keys
    append(q, k, v, cos, sin, *places, impl=impl)
    return q


def _normed(heads: Tensor, weight: Tensor, eps: float, impl: str) -> Tensor:
    """Norm of ``heads`` [R, n, D] in spans of ``weight``: one head, or several of them."""
    spans = heads.flatten(1).unflatten(1, (-1, weight.shape[0]))
    return rms_norm(spans, weight, eps, impl=impl).view(heads.shape)
