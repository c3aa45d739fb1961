"""Elementwise functions: the gate of a feed-forward layer, the soft cap of final logits."""

from __future__ import annotations

from torch import Tensor

from hasten.kernels.dispatch import operation

KINDS = ("silu", "gelu_tanh")


def gated(x: Tensor, kind: str, *, impl: str | None = None) -> Tensor:
    """``act(gate) * up`` for ``x`` = [gate | up], float32 [R, 2F]; the result is [R, F].

    ``kind`` is "silu" or "gelu_tanh" (the tanh form of GELU); another one raises ValueError.
    """
    if kind not in KINDS:
        raise ValueError(f"activation {kind!r} is none of {', '.join(KINDS)}")
    out: Tensor = operation(__name__, "gated", impl, x)(x, kind)
    return out


def softcap(x: Tensor, cap: float, *, impl: str | None = None) -> Tensor:
    """``cap * tanh(x / cap)`` for a contiguous float32 ``x`` of any shape; ``cap`` > 0."""
    out: Tensor = operation(__name__, "softcap", impl, x)(x, cap)
    return out
