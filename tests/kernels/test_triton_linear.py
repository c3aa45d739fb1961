"""Linear layers and embeddings in Triton: against the definitions, and the promises about bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.kernels.embedding import embed
from hasten.kernels.linear import (
    Weight,
    linear,
    linear_grouped,
    pack,
    pack_grouped,
    pack_int4,
    pack_int8,
    unpack,
)
from hasten.models.device import to_device

from .common import assert_close, assert_same_bits
from .triton_device import DEVICE

KINDS = ["float32", "bfloat16", "int8", "int4-32", "int4-64", "int4-128", "int4-32-zeros"]
SHAPES = [(5, 128), (33, 384)]  # outputs, inputs; 384 is an odd number of groups of 128


def new_weight(kind: str, n: int, k: int) -> Weight:
    if kind == "int8":
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        return pack_int8(codes, torch.rand(n) / 100)
    if kind.startswith("int4"):
        group = int(kind.split("-")[1])
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        scale = (torch.randn(n, k // group) / 10).half()
        zeros = kind.endswith("zeros")
        zero = torch.randint(0, 16, scale.shape, dtype=torch.uint8) if zeros else None
        return pack_int4(codes, scale, zero, group=group)
    return pack(torch.randn(n, k, dtype=getattr(torch, kind)))


def run(x: Tensor, w: Weight, *rest: Tensor | None) -> Tensor:
    at = [None if t is None else t.to(DEVICE) for t in (x, *rest)]
    return linear(at[0], to_device(w, DEVICE), *at[1:], impl="triton").cpu()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_definition(kind: str, shape: tuple[int, int]) -> None:
    n, k = shape
    w = new_weight(kind, n, k)
    x = torch.randn(19, 2 * k)[:, :k]  # strided, more rows than a tile of few
    x[3] = 0
    bias = torch.randn(n)
    got = run(x, w, bias)
    if kind.startswith("int"):  # exact sums and the same roundings: the CPU's bits
        expected = linear(x, w, bias, impl="cpu")
        assert_same_bits(got, expected, kind)
    else:
        expected = x.double() @ unpack(w).double().T + bias.double()
        assert_close(got, expected, 4e-6 * k**0.5, kind)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4-32", "int4-64-zeros"])
def test_rows_are_independent(kind: str) -> None:
    w = new_weight(kind, 37, 128)
    x = torch.randn(20, 128)  # more than a tile of few rows
    alone = torch.cat([run(x[i : i + 1], w) for i in range(0, 20, 5)])
    whole = run(x, w)
    assert_same_bits(whole[::5], alone, "20 rows")
    index = torch.randperm(20)
    assert_same_bits(run(x[index], w), whole[index], "shuffled")
    assert_same_bits(run(x[::5], w), alone, "4 rows")


@pytest.mark.parametrize("kind", ["int8", "int4-32"])
def test_what_is_no_number_shows(kind: str) -> None:
    w = new_weight(kind, 9, 128)
    x = torch.randn(4, 128)
    x[1, 5], x[2, 100] = float("nan"), float("inf")
    got = run(x, w)
    assert got[1:3].isnan().all()
    assert got[[0, 3]].isfinite().all()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4-32-zeros", "int4-128"])
def test_embedding(kind: str) -> None:
    w = new_weight(kind, 21, 384)
    ids = torch.randint(0, 21, (8,))
    got = embed(ids.to(DEVICE), to_device(w, DEVICE), impl="triton").cpu()
    assert_same_bits(got, unpack(w)[ids].float())
    beyond = torch.tensor([3, 21, -1], device=DEVICE)
    rows = embed(beyond, to_device(w, DEVICE), impl="triton").cpu()
    assert rows[0].isfinite().all()
    assert rows[1:].isnan().all()


def test_grouped() -> None:
    weights = torch.randn(3, 20, 40)
    x = torch.randn(5, 3, 40)
    w = to_device(pack_grouped(weights), DEVICE)
    got = linear_grouped(x.to(DEVICE), w, impl="triton").cpu()
    assert_close(got, torch.einsum("rgk,gnk->rgn", x.double(), weights.double()), 1e-5)


def test_kinds_of_weights_do_not_mix_with_devices() -> None:
    w = new_weight("int8", 4, 32)
    x = torch.randn(1, 32, device=DEVICE)
    with pytest.raises(TypeError, match=r"Int8Weight is not what 'triton' kernels read"):
        linear(x, w, impl="triton")
    with pytest.raises(TypeError, match=r"DeviceWeight is not what 'ref' kernels read"):
        linear(x, to_device(w, DEVICE), impl="ref")
    with pytest.raises(ValueError, match="cannot multiply"):
        linear(x[:, :8], to_device(w, DEVICE), impl="triton")
