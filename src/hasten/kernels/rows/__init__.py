"""Plain arithmetic on rows of activations, and rows picked out of them.

A forward pass is recorded as its kernels (``hasten.engine.recording``), so what would be one torch
operation elsewhere is a kernel here.
"""

from __future__ import annotations

from torch import Tensor

from hasten.kernels.dispatch import operation


def add(x: Tensor, y: Tensor, out: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """``x + y`` for float32 [..., H] of one shape and one to three dimensions.

    Only the last dimension must be contiguous, also that of ``out``, which may be ``x`` or ``y``.
    Raises TypeError or ValueError for other types or shapes.
    """
    total: Tensor = operation(__name__, "add", impl, x)(x, y, out)
    return total


def scale(
    x: Tensor, factor: float, out: Tensor | None = None, *, impl: str | None = None
) -> Tensor:
    """``x * factor``, the factor rounded to float32; shapes and errors as for `add`."""
    product: Tensor = operation(__name__, "scale", impl, x)(x, factor, out)
    return product


def take_rows(x: Tensor, index: Tensor, *, impl: str | None = None) -> Tensor:
    """Rows ``index``, int64 [n], of ``x``, float32 [R, H] with contiguous rows, as [n, H].

    Raises IndexError, naming it, for a row outside of [0, R).
    """
    rows: Tensor = operation(__name__, "take_rows", impl, x)(x, index)
    return rows
