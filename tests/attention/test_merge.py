"""The log-sum-exp merge against attention in one pass."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.attention.merge import merge


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries [T, D] over keys [n, D]; n may be 0."""
    if not len(k):
        return q.new_zeros(len(q), v.shape[1]), q.new_full((len(q),), -math.inf)
    score = q @ k.T
    return torch.softmax(score, -1) @ v, score.logsumexp(-1)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_disjoint_partition_equals_one_pass(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 60), "keys")
    owner = torch.tensor(
        data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n), "part of each key"),
        dtype=torch.int64,
    )
    torch.manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    q = torch.randn(5, 12, dtype=torch.float64)
    k, v = torch.randn(n, 12).double(), torch.randn(n, 7).double()
    expected = attend(q, k, v)
    parts = [attend(q, k[owner == part], v[owner == part]) for part in range(5)]
    out, lse = merge([(o.float(), x.float()) for o, x in parts])
    assert (out - expected[0]).abs().max() <= 2e-6
    seen = expected[1] > -math.inf
    error = (lse - expected[1])[seen].abs() / (1 + expected[1][seen].abs())
    assert error.numel() == 0 or error.max() <= 2e-6
    assert (lse[~seen] == -math.inf).all()
    # in float64 the order of the parts hardly matters
    order = data.draw(st.permutations(range(5)), "order")
    permuted = merge([parts[i] for i in order])
    assert (permuted[0] - expected[0]).abs().max() <= 1e-12


def test_merge_of_merges() -> None:
    q, k, v = torch.randn(3, 8).double(), torch.randn(30, 8).double(), torch.randn(30, 8).double()
    part = [attend(q, k[i : i + 10], v[i : i + 10]) for i in (0, 10, 20)]
    got = merge([merge(part[:2]), part[2]])
    expected = attend(q, k, v)
    assert (got[0] - expected[0]).abs().max() < 1e-13
    assert (got[1] - expected[1]).abs().max() < 1e-13


@pytest.mark.parametrize("level", [1e4, -1e4])
def test_extreme_levels(level: float) -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 6.0]])
    out, lse = merge([(a, torch.tensor([level])), (b, torch.tensor([level]))])
    assert out.tolist() == [[3.0, 4.0]]
    assert lse.item() == pytest.approx(level + math.log(2))
    out, lse = merge([(a, torch.tensor([level])), (b, torch.tensor([level - 300.0]))])
    assert out.tolist() == a.tolist() and lse.item() == level
    out, lse = merge([(a, torch.tensor([-1e4])), (b, torch.tensor([1e4]))])
    assert out.tolist() == b.tolist() and lse.item() == 1e4


def test_empty_parts_are_the_identity() -> None:
    out, lse = torch.randn(4, 3), torch.randn(4)
    nothing = torch.full((4, 3), math.nan), torch.full((4,), -math.inf)
    for parts in ([(out, lse)], [(out, lse), nothing], [nothing, (out, lse), nothing]):
        got = merge(parts)
        assert torch.equal(got[0], out) and torch.equal(got[1], lse)
    got = merge([nothing, nothing])
    assert (got[0] == 0).all() and (got[1] == -math.inf).all()
    # row by row
    mixed = torch.tensor([0.0, -math.inf])
    got = merge([(torch.ones(2, 1), mixed), (torch.full((2, 1), 3.0), mixed)])
    assert got[0].tolist() == [[2.0], [0.0]]


def test_a_learned_sink_is_a_part() -> None:
    out, lse = merge(
        [(torch.tensor([6.0]), torch.tensor(0.0)), (torch.zeros(1), torch.tensor(0.0))]
    )
    assert out.tolist() == [3.0] and lse.item() == pytest.approx(math.log(2))


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at least one"):
        merge([])
    with pytest.raises(ValueError, match="shape"):
        merge([(torch.zeros(2, 3), torch.zeros(2)), (torch.zeros(2, 4), torch.zeros(2))])
    with pytest.raises(ValueError, match="shape"):
        merge([(torch.zeros(2, 3), torch.zeros(3))])
