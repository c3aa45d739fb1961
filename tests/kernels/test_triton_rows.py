"""Norms, activations, rotation and append, page moves, expert choice and logits in Triton."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hasten.kernels.activation import gated, softcap
from hasten.kernels.logits import row_max_lse
from hasten.kernels.moe import route
from hasten.kernels.pages import copy_pages, move_slots
from hasten.kernels.rms_norm import add_rms_norm, rms_norm
from hasten.kernels.rope import append

from .common import assert_close, assert_same_bits
from .triton_device import DEVICE


def on_device(run: Callable[..., Tensor], *args: object, **kwargs: object) -> Tensor:
    moved = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in args]
    return run(*moved, impl="triton", **kwargs).cpu()


def assert_rows_independent(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    alone = torch.cat([f(x[i : i + 1]) for i in range(len(x))])
    index = torch.randperm(len(x))
    assert_same_bits(f(x[index]), alone[index])


@pytest.mark.parametrize("size", [1, 37, 300])
def test_rms_norm(size: int) -> None:
    x, weight = torch.randn(6, 3, size + 5)[..., :size], torch.randn(size)
    expected = rms_norm(x.double(), weight.double(), 1e-5, impl="ref")
    assert_close(on_device(rms_norm, x, weight, 1e-5), expected, 2e-6)
    flat = x[:, 0]
    normed, total = add_rms_norm(
        flat.to(DEVICE), (2 * flat).contiguous().to(DEVICE), weight.to(DEVICE), 1e-5, impl="triton"
    )
    assert_same_bits(total.cpu(), flat + 2 * flat)
    assert_same_bits(normed.cpu(), on_device(rms_norm, total.cpu(), weight, 1e-5))
    assert_rows_independent(lambda rows: on_device(rms_norm, rows, weight, 1e-5), x)
    after = rms_norm(flat.to(DEVICE), weight.to(DEVICE), 1e-5, add=total, impl="triton")
    assert_same_bits(after.cpu(), on_device(rms_norm, flat, weight, 1e-5) + total.cpu())


def test_rms_norm_in_place() -> None:
    x, weight = torch.randn(4, 40), torch.randn(40)
    expected = on_device(rms_norm, x, weight, 1e-5)
    moved = x.to(DEVICE, copy=True)
    assert rms_norm(moved, weight.to(DEVICE), 1e-5, moved, impl="triton") is moved
    assert_same_bits(moved.cpu(), expected)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated(kind: str) -> None:
    x = torch.cat([torch.randn(5, 2 * 1111) * 3, torch.linspace(-90, 90, 2222)[None]])
    expected = gated(x.double(), kind, impl="ref")
    assert_close(on_device(gated, x, kind), expected, 1e-6)
    assert_rows_independent(lambda rows: on_device(gated, rows, kind), x)


def test_softcap() -> None:
    x = torch.cat([torch.randn(2, 500) * 40, torch.randn(1, 500) / 1000])
    assert_close(on_device(softcap, x, 30.0), softcap(x.double(), 30.0, impl="ref"), 1e-6)
    relative = on_device(softcap, x, 30.0).double() / softcap(x.double(), 30.0, impl="ref")
    assert_close(relative, torch.ones_like(relative), 1e-6)
    with pytest.raises(ValueError, match="positive"):
        on_device(softcap, x, 0.0)


def test_row_max_lse() -> None:
    logits = torch.randn(7, 9001) * 5
    logits[1, [5, 8000]] = logits[1].max() + 1  # a tie over two blocks
    logits[2] = float("-inf")
    logits[3, 4500] = float("nan")
    logits[4, :] = 1.25
    got = [t.cpu() for t in row_max_lse(logits.to(DEVICE), impl="triton")]
    expected = row_max_lse(logits, impl="cpu")
    assert torch.equal(got[0], expected[0])
    assert_same_bits(got[1], expected[1])
    assert_close(got[2], expected[2], 2e-6)
    alone = row_max_lse(logits[5:6].to(DEVICE), impl="triton")
    assert_same_bits(alone[2].cpu(), got[2][5:6])


@pytest.mark.parametrize(("experts", "groups"), [(5, 1), (64, 1), (24, 4)])
def test_route(experts: int, groups: int) -> None:
    logits = torch.randn(9, experts)
    logits[0] = 0.5  # ties to the lowest
    logits[1, [experts - 1, 2]] = 9.0
    for normalize in (False, True):
        args = (2, normalize, groups, min(2, groups))
        ids, weights = route(logits.to(DEVICE), *args, impl="triton")
        expected = route(logits, *args, impl="ref")
        assert torch.equal(ids.cpu(), expected[0])
        assert_close(weights.cpu(), expected[1], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dim", "half", "value_dim", "in_keys"),
    [(16, 8, 16, False), (20, 6, 35, False), (24, 12, 7, True)],
)
def test_append(dim: int, half: int, value_dim: int, in_keys: bool, dtype: torch.dtype) -> None:
    rows, heads, groups = 6, 4, 2
    q, k = torch.randn(rows, 7, dim)[:, 1:], torch.randn(rows, heads, dim)
    v = torch.randn(rows, heads, 0 if in_keys else value_dim)
    padded = 0 if in_keys else -(-value_dim // 16) * 16
    cos, sin = torch.rand(2, 50, half)
    positions = torch.tensor([0, 49, 3, 17, 4, 5], dtype=torch.int32)
    slots = torch.tensor([0, 31, 16, 15, 5, 6], dtype=torch.int32)
    table_row = torch.tensor([0, 1, 0, 1, 1, 1], dtype=torch.int32)
    table = torch.randperm(8).int().view(2, groups, 2)
    pages = (
        torch.full((9, heads // groups, dim, 16), torch.nan, dtype=dtype),
        torch.full((9, heads // groups, 16, padded), torch.nan, dtype=dtype),
    )
    results = []
    for impl, device in (("ref", "cpu"), ("triton", DEVICE)):
        own = [t.to(device, copy=True) for t in (q, *pages)]
        rest = [t.to(device) for t in (k, v, cos, sin, positions, slots, table_row, table)]
        append(own[0], *rest, *own[1:], impl=impl)
        results.append([t.cpu() for t in own])
    for got, expected in zip(results[1], results[0], strict=True):
        if DEVICE == "cuda" or got.dtype == torch.float32:
            assert_same_bits(got, expected)
        else:  # the interpreter (triton 3.9) cuts a number off where a device rounds it
            assert_close(got, expected, 2**-7)


def test_append_leaves_out_what_has_no_place() -> None:
    q, k, v = torch.randn(3, 4, 1, 8)
    cos, sin = torch.rand(2, 10, 4)
    k_pages, v_pages = torch.zeros(2, 1, 8, 16), torch.zeros(2, 1, 16, 16)
    args = [
        torch.tensor(x, dtype=torch.int32)
        for x in ([1, 1, 10, 1], [0, 16, 1, 32], [0, 0, 0, 0], [[[0, -1]]])
    ]  # fine; a block without a page; a position beyond cos; a slot beyond the table
    moved = [t.to(DEVICE) for t in (q, k, v, cos, sin, *args, k_pages, v_pages)]
    append(*moved, impl="triton")
    k_pages, v_pages = moved[-2].cpu(), moved[-1].cpu()
    assert (k_pages[0, 0, :, 0] != 0).all()
    assert (v_pages[0, 0, 0, :8] != 0).all()
    k_pages[0, 0, :, 0] = 0
    v_pages[0, 0, 0, :8] = 0
    assert not k_pages.any() and not v_pages.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_page_moves(dtype: torch.dtype) -> None:
    layers, pages, heads, dim, padded = 2, 7, 2, 5, 16
    k = torch.randn(layers, pages, heads, dim, 16).to(dtype)
    v = torch.randn(layers, pages, heads, 16, padded).to(dtype)
    src, dst = torch.tensor([0, 1, 2]), torch.tensor([1, 3, 0])  # a chain: order matters
    table = torch.randperm(6).int().view(1, 2, 3)
    rows = torch.zeros(4, dtype=torch.int32)
    moves = torch.tensor([[20, 22, 31, 33], [19, 20, 21, 22]], dtype=torch.int32)
    results = []
    for impl, device in (("ref", "cpu"), ("triton", DEVICE)):
        own = [k.to(device, copy=True), v.to(device, copy=True)]
        copy_pages(*own, src.to(device), dst.to(device), impl=impl)
        lists = [t.to(device) for t in (table, rows, *moves)]
        move_slots(*own, *lists, impl=impl)
        results.append([t.cpu() for t in own])
    for got, expected in zip(results[1], results[0], strict=True):
        assert_same_bits(got, expected)
