"""Helpers of the kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hasten import _native

ISAS = [name for name in ("avx512", "avx2", "portable") if _native.isa_supported(name)]
FAST = ISAS[0]
# what multiplies integers has forms of its own on some processors
INTEGER_ISAS = [name for name in ("avx512vnni",) if _native.isa_supported(name)] + ISAS


def machines(isas: Sequence[str] = ISAS, threads: Sequence[int] = (1, 2)) -> Iterator[str]:
    """Set each instruction set with each number of threads, one after the other."""
    for isa in isas:
        for count in threads:
            _native.set_isa(isa)
            _native.set_num_threads(count)
            yield f"{isa}, {count} threads"


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal in every bit, so that NaN equals NaN and 0 differs from -0."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    integer = {4: torch.int32, 2: torch.int16, 8: torch.int64, 1: torch.int8}[actual.dtype.itemsize]
    a, b = actual.contiguous().view(integer), expected.contiguous().view(integer)
    if not torch.equal(a, b):
        where = (a != b).nonzero()
        first = tuple(where[0].tolist())
        raise AssertionError(
            f"{what}: {len(where)} of {a.numel()} differ, first at {first}: "
            f"{actual[first].item()!r} against {expected[first].item()!r}"
        )


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """|actual - expected| <= tolerance * (1 + |expected|), compared in float64; NaN equals NaN."""
    assert actual.shape == expected.shape, what
    a, b = actual.double(), expected.double()
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, 0.0, (a - b).abs() / (1 + b.abs()))
    worst = float(error.max()) if error.numel() else 0.0
    assert worst <= tolerance, f"{what}: error {worst:.3g} at {int(error.argmax())}"


def assert_rows_independent(
    f: Callable[[Tensor], Tensor], rows: int, isas: Sequence[str] = ISAS
) -> None:
    """f(index) computes the rows ``index`` of some input; each row's bits are always the same.

    The expected bits are those of every row alone, on one thread of the best instruction set.
    """
    _native.set_isa(FAST)
    _native.set_num_threads(1)
    alone = torch.cat([f(torch.tensor([i])) for i in range(rows)])
    for machine in machines(isas):
        assert_same_bits(f(torch.arange(rows)), alone, f"all rows, {machine}")
        some = torch.randperm(rows)[: int(torch.randint(1, rows + 1, ()))]
        assert_same_bits(f(some), alone[some], f"rows {some.tolist()}, {machine}")
