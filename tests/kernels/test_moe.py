"""Rows to their experts and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.kernels.moe import combine, gather, group_rows

from .common import assert_rows_independent, assert_same_bits, machines


def choices(rows: int, k: int, experts: int) -> Tensor:
    """Distinct experts for each row, int32 [rows, k]."""
    return torch.stack([torch.randperm(experts)[:k] for _ in range(rows)]).int()


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 2, 8), (300, 8, 128), (7, 4, 4)])
def test_rows_are_grouped_by_expert_then_row(shape: tuple[int, int, int]) -> None:
    rows, k, experts = shape
    ids = choices(rows, k, experts)
    offsets, order, slots = group_rows(ids, experts)
    for one, reference in zip(
        (offsets, order, slots), group_rows(ids, experts, impl="ref"), strict=True
    ):
        assert_same_bits(one, reference)
    assert offsets[0] == 0 and offsets[-1] == rows * k
    for expert in range(experts):
        of_expert = order[offsets[expert] : offsets[expert + 1]].tolist()
        assert of_expert == (ids == expert).any(1).nonzero().flatten().tolist()
    assert_same_bits(order[slots.long()], torch.arange(rows).int()[:, None].expand(rows, k))


@pytest.mark.parametrize("impl", ["cpu", "ref"])
def test_group_rows_names_a_bad_expert(impl: str) -> None:
    for bad in (-1, 4, 2**30):
        with pytest.raises(IndexError, match=f"row 1 chose expert {bad}, but there are 4"):
            group_rows(torch.tensor([[0, 3], [2, bad]]).int(), 4, impl=impl)


def test_group_rows_of_nothing() -> None:
    offsets, order, slots = group_rows(torch.empty((0, 2), dtype=torch.int32), 3)
    assert offsets.tolist() == [0, 0, 0, 0] and order.shape == (0,) and slots.shape == (0, 2)


def test_gather_reads_strided_rows() -> None:
    x, index = torch.randn(20, 90)[:, 5:78], torch.randint(0, 20, (500,)).int()
    for machine in machines():
        assert_same_bits(gather(x, index), x[index.long()], machine)
    for impl in ("cpu", "ref"):
        with pytest.raises(IndexError):
            gather(x, torch.tensor([0, 20]).int(), impl=impl)


@pytest.mark.parametrize("shape", [(1, 1, 5), (40, 3, 77), (9, 8, 300)])
def test_combine_adds_by_ascending_slot(shape: tuple[int, int, int]) -> None:
    rows, k, size = shape
    slots = torch.randperm(rows * k).view(rows, k).int()
    y, shares, add = torch.randn(rows * k, size), torch.rand(rows, k), torch.randn(rows, size)
    for residual in (None, add):
        expected = combine(y, slots, shares, residual, impl="ref")
        for machine in machines():
            assert_same_bits(combine(y, slots, shares, residual), expected, machine)
        shuffled = torch.argsort(torch.rand(rows, k), -1)
        moved = combine(y, slots.gather(1, shuffled), shares.gather(1, shuffled), residual)
        assert_same_bits(moved, expected, "the order of the choices does not matter")
    for impl in ("cpu", "ref"):
        with pytest.raises(IndexError):
            combine(y, slots + 1, shares, impl=impl)


def test_combine_rows_are_independent() -> None:
    ids, y, shares = choices(30, 4, 9), torch.randn(30, 4, 50), torch.rand(30, 4)

    def f(index: Tensor) -> Tensor:
        _, _, slots = group_rows(ids[index], 9)
        grouped = torch.zeros(len(index) * 4, 50)
        grouped[slots.flatten().long()] = y[index].flatten(0, 1)
        return combine(grouped, slots, shares[index])

    assert_rows_independent(f, 30)
