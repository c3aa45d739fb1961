"""Packed weights, the linear layer and the embedding."""

from __future__ import annotations

import pytest
import torch

from hasten import _native
from hasten.kernels.activation import gated
from hasten.kernels.embedding import embed
from hasten.kernels.linear import (
    PackedWeight,
    linear,
    linear_experts,
    linear_gated,
    linear_grouped,
    pack,
    pack_grouped,
    pack_rows,
    stack_experts,
    unpack,
)
from hasten.kernels.linear.ref import linear_in_order

from .common import (
    FAST,
    ISAS,
    assert_rows_independent,
    assert_same_bits,
    machines,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (outputs, inputs): less than a panel, odd, several groups of panels, several blocks of k
SHAPES = [(5, 123), (1, 1), (16, 16), (37, 300), (200, 129), (17, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_matches_reference_and_unpacks(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    packed, expected = pack(weight), pack(weight, impl="ref")
    assert (packed.n, packed.k) == shape
    assert_same_bits(packed.data, expected.data)
    kept = torch.float32 if dtype == torch.float16 else dtype
    assert_same_bits(unpack(packed), weight.to(kept))
    assert_same_bits(unpack(packed, impl="ref"), weight.to(kept))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3), (74, 45), (128, 64), (34, 1)])
def test_gated_pack_matches_reference_and_unpacks(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(dtype)
    packed = pack(weight, gated=True)
    assert_same_bits(packed.data, pack(weight, gated=True, impl="ref").data)
    kept = weight.float() if dtype == torch.float16 else weight
    assert_same_bits(unpack(packed), kept)
    assert_same_bits(unpack(packed, impl="ref"), kept)
    in_parts = pack_rows(weight.split(5), *shape, kept.dtype, gated=True)
    assert_same_bits(in_parts.data, packed.data)


@pytest.mark.parametrize("impl", ["cpu", "ref"])
@pytest.mark.parametrize("sizes", [(70,), (16, 32, 22), (5, 3, 30, 1, 0, 31), (64, 6)])
def test_pack_rows_equals_pack(sizes: tuple[int, ...], impl: str) -> None:
    weight = torch.randn(70, 45)
    parts = weight.split(list(sizes))
    for dtype in (torch.float32, torch.bfloat16):
        packed = pack_rows(iter(parts), 70, 45, dtype, impl=impl)
        assert (packed.n, packed.k) == (70, 45)
        assert_same_bits(packed.data, pack(weight.to(dtype)).data)
    for rows in (69, 71):
        with pytest.raises(ValueError, match=f"not {rows}"):
            pack_rows(iter(parts), rows, 45, torch.float32, impl=impl)


def test_pack_converts_every_float16() -> None:
    every = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(torch.float16).view(256, 256)
    got = unpack(pack(every))
    same = (got == every.float()) | (got.isnan() & every.isnan())
    assert same.all()
    assert_same_bits(got[~every.isnan()], every.float()[~every.isnan()])


def test_pack_reads_a_strided_view() -> None:
    weight = torch.randn(40, 50)
    view = weight[3:30, 5:41]
    assert_same_bits(unpack(pack(view)), view.contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 6, 7, 13, 64])
def test_linear_matches_reference(shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    n, k = shape
    w, x, bias = pack(torch.randn(n, k).to(dtype)), torch.randn(rows, k), torch.randn(n)
    weight = unpack(w).double()
    for with_bias in (None, bias):
        expected = linear(x.double(), w, with_bias, impl="ref")
        # k + 1 roundings, each at most 2^-24 of a partial sum of this size
        size = x.double().abs() @ weight.abs().T + (0 if with_bias is None else with_bias.abs())
        error = (linear(x, w, with_bias) - expected).abs()
        assert (error <= (k + 1) * 2**-24 * size).all(), f"bias {with_bias is not None}"


def test_linear_adds_in_ascending_order() -> None:
    x, w, bias = torch.randn(3, 150), pack(torch.randn(33, 150)), torch.randn(33)
    got, expected = linear(x, w, bias), linear_in_order(x, w, bias)
    # the reference rounds twice, which differs in the last bit once in 2^29 steps
    assert (got == expected).float().mean() > 0.99
    # an order that matters: 1e8 + 1 - 1e8 is 0 in float32 when added from the left
    x = torch.tensor([[1e8, 1.0, -1e8]])
    assert linear(x, pack(torch.ones(1, 3))).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(200, 300), (5, 123)])
def test_linear_rows_are_independent(shape: tuple[int, int], dtype: torch.dtype) -> None:
    n, k = shape
    w, x, bias = pack(torch.randn(n, k).to(dtype)), torch.randn(70, k), torch.randn(n)
    assert_rows_independent(lambda index: linear(x[index], w, bias), len(x))
    if n % 2 == 0:
        w = pack(torch.randn(n, k).to(dtype), gated=True)
        assert_rows_independent(lambda index: linear_gated(x[index], w, "silu", bias), len(x))


@pytest.mark.parametrize("isa", ISAS)
def test_linear_any_number_of_rows(isa: str) -> None:
    w, x = pack(torch.randn(90, 140)), torch.randn(67, 140)
    _native.set_isa(FAST)
    alone = torch.cat([linear(x[i : i + 1], w) for i in range(len(x))])
    _native.set_isa(isa)
    for rows in range(1, len(x) + 1):
        assert_same_bits(linear(x[:rows], w), alone[:rows], f"{rows} rows")


def test_linear_strided_rows_and_out() -> None:
    x, w = torch.randn(9, 100), pack(torch.randn(21, 40))
    view = x[:, 30:70]
    expected = linear(view.contiguous(), w)
    assert_same_bits(linear(view, w), expected)
    out = torch.full((9, 50), 7.0)
    result = linear(view, w, out=out[:, 3:24])
    assert_same_bits(out[:, 3:24], expected)
    assert result.data_ptr() == out[:, 3:24].data_ptr()
    assert (out[:, :3] == 7).all() and (out[:, 24:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 9, 30])
def test_linear_adds_a_residual_last(rows: int, dtype: torch.dtype) -> None:
    x, w, bias = torch.randn(rows, 301), pack(torch.randn(75, 301).to(dtype)), torch.randn(75)
    residual = torch.randn(rows, 80)[:, 2:77]
    for machine in machines():
        expected = linear(x, w, bias) + residual
        assert_same_bits(linear(x, w, bias, add=residual), expected, machine)
        out = residual.clone()
        linear(x, w, bias, out, add=out)
        assert_same_bits(out, expected, f"in place, {machine}")
    reference = linear(x.double(), w, bias.double(), add=residual.double(), impl="ref")
    assert (expected - reference).abs().max() < 1e-3
    with pytest.raises(ValueError, match="add has shape"):
        linear(x, w, add=residual[:, 1:])


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3), (74, 45), (256, 301), (34, 1)])
def test_linear_gated_is_linear_then_gated(
    shape: tuple[int, int], dtype: torch.dtype, kind: str
) -> None:
    n, k = shape
    weight, bias = torch.randn(n, k).to(dtype), torch.randn(n)
    w, plain = pack(weight, gated=True), pack(weight)
    for machine in machines():
        for rows in (0, 1, 2, 7, 12, 50):
            x = torch.randn(rows, k + 3)[:, 2:-1]
            for with_bias in (None, bias):
                expected = gated(linear(x, plain, with_bias), kind)
                got = linear_gated(x, w, kind, with_bias)
                assert_same_bits(got, expected, f"{rows} rows, {machine}")
    reference = linear_gated(x.double(), w, kind, bias.double(), impl="ref")
    assert (got - reference).abs().max() < 1e-3 * (1 + reference.abs().max())
    out = torch.full((50, n), 7.0)
    linear_gated(x, w, kind, bias, out[:, : n // 2])
    assert_same_bits(out[:, : n // 2], got)
    assert (out[:, n // 2 :] == 7).all()


def test_gated_weights_are_not_mistaken() -> None:
    weight, x = torch.randn(32, 8), torch.randn(2, 8)
    with pytest.raises(ValueError, match="linear_gated reads it"):
        linear(x, pack(weight, gated=True))
    with pytest.raises(ValueError, match="gated=True"):
        linear_gated(x, pack(weight), "silu")
    with pytest.raises(ValueError, match="'relu' is neither"):
        linear_gated(x, pack(weight, gated=True), "relu")
    with pytest.raises(ValueError, match="no gate and up halves"):
        pack(weight[:31], gated=True)


@pytest.mark.parametrize("kind", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_one_linear_each(dtype: torch.dtype, kind: str | None) -> None:
    counts = [0, 1, 40, 0, 7, 13, 0]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    weights = [pack(torch.randn(70, 45).to(dtype), gated=kind is not None) for _ in counts]
    w, x = stack_experts(weights), torch.randn(61, 50)[:, 3:48]
    for machine in machines():
        expected = [
            linear(x[i:j], one) if kind is None else linear_gated(x[i:j], one, kind)
            for one, i, j in zip(weights, offsets, offsets[1:], strict=False)
        ]
        assert_same_bits(linear_experts(x, w, offsets, kind), torch.cat(expected), machine)
    reference = linear_experts(x.double(), w, offsets, kind, impl="ref")
    assert (torch.cat(expected) - reference).abs().max() < 1e-2
    none = torch.zeros(8, dtype=torch.int64)
    assert linear_experts(x[:0], w, none, kind).shape == (0, 70 if kind is None else 35)


@pytest.mark.parametrize("impl", ["cpu", "ref"])
def test_experts_refuse_what_does_not_fit(impl: str) -> None:
    w, x = stack_experts([pack(torch.randn(20, 8)) for _ in range(3)]), torch.randn(6, 8)
    for bad in ([0, 2, 4, 5], [1, 2, 4, 6], [0, 4, 2, 6], [0, 7, 7, 6]):
        with pytest.raises(ValueError, match="offsets"):
            linear_experts(x, w, torch.tensor(bad), impl=impl)
    with pytest.raises(ValueError, match="offsets"):
        linear_experts(x, w, torch.tensor([0, 6]), impl=impl)
    with pytest.raises(ValueError, match="activation"):
        linear_experts(x, w, torch.tensor([0, 2, 4, 6]), "silu", impl=impl)
    with pytest.raises(ValueError, match="one shape and type"):
        stack_experts([pack(torch.randn(20, 8)), pack(torch.randn(20, 9))])
    with pytest.raises(ValueError, match="one shape and type"):
        stack_experts([])


def test_padding_of_a_panel_is_not_read_into_outputs() -> None:
    w = pack(torch.randn(5, 64))
    w.data.view(64, 16)[:, 5:] = float("nan")
    assert linear(torch.randn(8, 64), w).isfinite().all()


def test_linear_refuses_what_does_not_fit() -> None:
    w, x = pack(torch.randn(20, 30)), torch.randn(4, 30)
    with pytest.raises(ValueError, match=r"x has shape \[4, 29\], not \[\*, 30\]"):
        linear(torch.randn(4, 29), w)
    with pytest.raises(TypeError, match="x is bfloat16, not float32"):
        linear(x.bfloat16(), w)
    with pytest.raises(ValueError, match=r"bias has shape \[19\]"):
        linear(x, w, torch.randn(19))
    with pytest.raises(ValueError, match="x is not contiguous"):
        linear(torch.randn(30, 4).T, w)
    with pytest.raises(ValueError, match="w has shape"):
        linear(x, PackedWeight(w.data, 40, 30))
    with pytest.raises(TypeError, match="w is float16"):
        linear(x, PackedWeight(w.data.half(), 20, 30))
    with pytest.raises(ValueError, match="out has shape"):
        linear(x, w, out=torch.zeros(4, 21))
    with pytest.raises(TypeError):
        pack(torch.zeros(4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="two dimensions"):
        pack(torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 37, 20), (16, 48, 129), (1, 5, 7), (5, 130, 1)])
@pytest.mark.parametrize("rows", [0, 1, 7, 40])
def test_grouped_linear_is_one_linear_a_group(
    shape: tuple[int, int, int], rows: int, dtype: torch.dtype
) -> None:
    groups, n, k = shape
    weights, wide = torch.randn(shape).to(dtype), torch.randn(rows, groups, k + 9)
    w, x = pack_grouped(weights), wide[..., 4:-5]
    assert (w.n, w.k, w.size) == (n, k, weights.numel())
    out = torch.full((rows, groups, n + 6), 7.0)
    assert linear_grouped(x, w, out[..., 2:-4]).data_ptr() == out[..., 2:-4].data_ptr()
    expected = torch.stack([linear(x[:, g], pack(weights[g])) for g in range(groups)], 1)
    assert_same_bits(out[..., 2:-4], expected)
    assert (out[..., :2] == 7).all() and (out[..., -4:] == 7).all()
    reference = linear_grouped(x.double(), pack_grouped(weights, impl="ref"), impl="ref")
    assert (expected - reference).abs().max().item() < 1e-4 if rows else reference.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_linear_rows_are_independent(dtype: torch.dtype) -> None:
    w, x = pack_grouped(torch.randn(6, 70, 150).to(dtype)), torch.randn(70, 6, 150)
    assert_rows_independent(lambda index: linear_grouped(x[index], w), len(x))


def test_grouped_linear_refuses_what_does_not_fit() -> None:
    w, x = pack_grouped(torch.randn(3, 20, 30)), torch.randn(4, 3, 30)
    for bad in (x[:, :2], x[..., :29], x[0]):
        with pytest.raises(ValueError, match="x has shape"):
            linear_grouped(bad, w, torch.empty(4, 3, 20))
    with pytest.raises(ValueError, match="out has shape"):
        linear_grouped(x, w, torch.empty(4, 3, 21))
    with pytest.raises(ValueError, match="x is not contiguous"):
        linear_grouped(x.transpose(0, 2).contiguous().transpose(0, 2), w)
    with pytest.raises(ValueError, match="w has shape"):
        linear_grouped(x, pack(torch.randn(20, 30)))
    with pytest.raises(TypeError, match="w is float16"):
        linear_grouped(x, PackedWeight(w.data.half(), 20, 30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embed(dtype: torch.dtype) -> None:
    weight = torch.randn(37, 45).to(dtype)
    w, ids = pack(weight), torch.randint(0, 37, (50,))
    for machine in machines():
        assert_same_bits(embed(ids, w), weight[ids].float(), machine)
    assert_same_bits(embed(ids, w, impl="ref"), weight[ids].float())
    assert embed(ids[:0], w).shape == (0, 45)


@pytest.mark.parametrize("impl", ["cpu", "ref"])
@pytest.mark.parametrize("bad", [37, -1, 2**40])
def test_embed_names_a_bad_id(bad: int, impl: str) -> None:
    w = pack(torch.randn(37, 8))  # 37: inside of the last panel, but beyond the table
    with pytest.raises(IndexError, match=rf"ids\[2\] is {bad}"):
        embed(torch.tensor([0, 36, bad]), w, impl=impl)
