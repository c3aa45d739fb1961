"""Root mean square normalization, alone or fused with the residual sum before it."""

from __future__ import annotations

from torch import Tensor

from hasten.kernels.dispatch import operation


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None = None,
    add: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, then ``+ add``.

    ``x`` is float32 [..., H] of one to three dimensions, of which only the last must be
    contiguous (a slice of heads works), ``weight`` float32 [H]. ``add`` and ``out`` are like
    ``x``; ``out`` may be ``x``. Raises TypeError or ValueError for other types or shapes.
    """
    normed: Tensor = operation(__name__, "rms_norm", impl, x)(x, weight, eps, out, add)
    return normed


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + residual), x + residual)``, with the bits of doing one after the other.

    ``x`` and ``residual`` are float32 [..., H] of one shape, ``weight`` float32 [H].
    """
    run = operation(__name__, "add_rms_norm", impl, x)
    normed, total = run(x, residual, weight, eps)
    return normed, total
