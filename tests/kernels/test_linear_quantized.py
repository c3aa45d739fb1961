"""Linear layers and embeddings on weights of 8 and 4 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten import _native
from hasten.kernels.activation import gated
from hasten.kernels.embedding import embed
from hasten.kernels.linear import (
    Int4Weight,
    Int8Weight,
    Rows,
    linear,
    linear_experts,
    linear_gated,
    pack_int4,
    pack_int4_rows,
    pack_int8,
    pack_int8_rows,
    stack_experts,
    unpack,
)
from hasten.kernels.linear.quantized_ref import quantize, unpack_codes

from .common import FAST, INTEGER_ISAS, assert_rows_independent, assert_same_bits, machines

Quantized = Int8Weight | Int4Weight

# (outputs, inputs): less than a panel, odd, several strips, a last strip of each width, several
# pieces of a strip (128 KiB)
INT8_SHAPES = [(5, 123), (1, 1), (16, 16), (37, 300), (200, 129), (128, 64), (70, 4500)]
# with groups of 32, 64 and 128, with zeros or not
INT4_SHAPES = [
    (5, 96, 32, False),
    (1, 32, 32, True),
    (37, 256, 64, True),
    (200, 128, 128, False),
    (120, 384, 128, True),
    (70, 7680, 32, False),
]


def int8_rows(n: int, k: int) -> Rows:
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return Rows(codes, torch.randn(n) * 0.01)


def int4_rows(n: int, k: int, group: int, asymmetric: bool) -> Rows:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    shape = (n, k // group)
    zero = torch.randint(0, 256, shape, dtype=torch.uint8) if asymmetric else None
    return Rows(codes, torch.randn(shape).mul(0.1).half(), zero)


def weight_of(shape: tuple[int, ...], gated: bool = False) -> Quantized:
    if len(shape) == 2:
        rows = int8_rows(*shape)
        return pack_int8(rows.codes, rows.scale, gated=gated)
    n, k, group, asymmetric = shape
    rows = int4_rows(n, k, group, bool(asymmetric))
    return pack_int4(rows.codes, rows.scale, rows.zero, group=group, gated=gated)


def ungated(w: Quantized) -> Quantized:
    rows = unpack_codes(w)
    if isinstance(w, Int8Weight):
        return pack_int8(rows.codes, rows.scale)
    return pack_int4(rows.codes, rows.scale, rows.zero, group=w.group)


SHAPES: list[tuple[int, ...]] = [*INT8_SHAPES, *INT4_SHAPES]


def assert_rows_equal(a: Rows, b: Rows) -> None:
    assert torch.equal(a.codes, b.codes)
    assert_same_bits(a.scale, b.scale)
    assert (a.zero is None) == (b.zero is None)
    assert a.zero is None or b.zero is None or torch.equal(a.zero, b.zero)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_matches_reference_and_unpacks(shape: tuple[int, ...], gated: bool) -> None:
    n = shape[0] + shape[0] % 2 if gated else shape[0]
    if len(shape) == 2:
        rows = int8_rows(n, shape[1])
        w8 = [pack_int8(rows.codes, rows.scale, gated=gated, impl=i) for i in ("cpu", "ref")]
        packed: list[Quantized] = [*w8]
        values = rows.codes.float() * rows.scale[:, None]
    else:
        rows, group = int4_rows(n, shape[1], shape[2], bool(shape[3])), shape[2]
        w4 = [
            pack_int4(rows.codes, rows.scale, rows.zero, group=group, gated=gated, impl=i)
            for i in ("cpu", "ref")
        ]
        packed = [*w4]
        zero = 8.0 if rows.zero is None else rows.zero.float().repeat_interleave(group, 1)
        scale = rows.scale.float().repeat_interleave(group, 1)
        values = (rows.codes.float() - zero) * scale
    for w in packed:
        assert (w.n, w.k, w.size, w.gated) == (n, shape[1], rows.codes.numel(), gated)
        assert w.nbytes == w.data.nbytes
        assert_rows_equal(unpack_codes(w), rows)
        assert_same_bits(unpack(w), values)
        assert_same_bits(unpack(w, impl="ref"), values)
    # inputs beyond k and outputs beyond n may hold anything, and here do not
    if shape[1] % 16 == 0:
        assert torch.equal(packed[0].data, packed[1].data)


def test_bytes_of_a_weight() -> None:
    """8 bits, and 4 bits with 16 more (24 with zeros) for a group of inputs."""
    assert weight_of((64, 1024)).nbytes == 64 * 1024 + 64 * 4
    assert weight_of((64, 1024, 32, False)).nbytes == 64 * 1024 * (4 + 16 / 32) / 8
    assert weight_of((64, 1024, 128, True)).nbytes == 64 * 1024 * (4 + 24 / 128) / 8


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("impl", ["cpu", "ref"])
@pytest.mark.parametrize("sizes", [(70,), (16, 32, 22), (5, 3, 30, 1, 0, 31), (64, 6)])
def test_pack_rows_equals_pack(sizes: tuple[int, ...], impl: str, gated: bool) -> None:
    n, k, group = 70, 96, 32

    def parts(rows: Rows) -> list[Rows]:
        columns = [rows.codes.split(sizes), rows.scale.split(sizes)]
        if rows.zero is not None:
            columns.append(rows.zero.split(sizes))
        return [Rows(*part) for part in zip(*columns, strict=True)]

    eight, four = int8_rows(n, k), int4_rows(n, k, group, True)
    w8 = pack_int8_rows(iter(parts(eight)), n, k, gated=gated, impl=impl)
    assert_rows_equal(unpack_codes(w8), eight)
    w4 = pack_int4_rows(
        iter(parts(four)), n, k, group=group, asymmetric=True, gated=gated, impl=impl
    )
    assert_rows_equal(unpack_codes(w4), four)
    for rows_wanted in (68, 72):
        with pytest.raises(ValueError, match=f"not {rows_wanted}"):
            pack_int8_rows(iter(parts(eight)), rows_wanted, k, gated=gated, impl=impl)


def test_quantize_rounds_halves_to_even_and_shows_what_is_not_finite() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, 3.4999, -127.0, 0.0, -0.0]])
    codes, scale = quantize(x, 8)
    assert codes.tolist() == [[127, 0, 2, -2, 3, -127, 0, 0]] and scale.tolist() == [[1.0]]
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = torch.ones(1, 64)
        x[0, 40] = bad
        codes, scale = quantize(x, 32)
        assert not scale[0, 0].isnan() and scale[0, 1].isnan()
    tiny = torch.full((1, 32), 2.0**-101)
    assert quantize(tiny, 32)[1].item() == 0.0 and not quantize(tiny, 32)[0].any()


def odd_inputs(rows: int, k: int) -> Tensor:
    """Rows of many magnitudes, among them some of zeros, tiny numbers, halves and outliers."""
    x = torch.randn(rows, k) * torch.exp(torch.randn(rows, 1) * 5)
    if rows > 4:
        x[1] = 0
        x[2] = 2.0**-120 * torch.randn(k)
        x[3] = torch.randint(-254, 255, (k,)) / 2
        x[3, 0] = 127.0
        x[4, k // 2] = 1e6
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 7, 13, 140])
def test_linear_is_its_definition(shape: tuple[int, ...], rows: int) -> None:
    """Bit for bit: the reference emulates each operation (a fused one in all but rare cases)."""
    w, x, bias = weight_of(shape), odd_inputs(rows, shape[1]), torch.randn(shape[0])
    for with_bias in (None, bias):
        got, expected = linear(x, w, with_bias), linear(x, w, with_bias, impl="ref")
        if isinstance(w, Int8Weight):
            assert_same_bits(got, expected)
        elif rows:
            assert (got == expected).float().mean() > 0.999
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_near_the_exact_product(shape: tuple[int, ...]) -> None:
    """In float64, against what the codes stand for; what is left is rounding of activations."""
    w, x = weight_of(shape), torch.randn(9, shape[1])
    weight = unpack(w).double()
    block = shape[2] if len(shape) == 4 else shape[1]
    parts = x.double().view(9, -1, block)
    half_step = parts.abs().amax(-1, keepdim=True) / 254 * 1.0001 + parts.abs() * 2**-22
    bound = half_step.expand_as(parts).reshape(9, -1) @ weight.abs().T
    size = x.double().abs() @ weight.abs().T * 2**-20
    assert ((linear(x, w) - x.double() @ weight.T).abs() <= bound + size).all()


@pytest.mark.parametrize(
    "shape", [(200, 320), (5, 123), (70, 4500), (200, 320, 32, True), (69, 7680, 32, False)]
)
def test_rows_are_independent(shape: tuple[int, ...]) -> None:
    w, x, bias = weight_of(shape), odd_inputs(70, shape[1]), torch.randn(shape[0])
    assert_rows_independent(lambda index: linear(x[index], w, bias), len(x), INTEGER_ISAS)


@pytest.mark.parametrize("isa", INTEGER_ISAS)
@pytest.mark.parametrize("shape", [(90, 140), (90, 128, 64, True)])
def test_any_number_of_rows(shape: tuple[int, ...], isa: str) -> None:
    w, x = weight_of(shape), torch.randn(256, shape[1])
    _native.set_isa(FAST)
    alone = torch.cat([linear(x[i : i + 1], w) for i in range(len(x))])
    _native.set_isa(isa)
    for rows in [*range(1, 30), 127, 128, 129, 256]:
        assert_same_bits(linear(x[:rows], w), alone[:rows], f"{rows} rows")


@pytest.mark.parametrize("isa", INTEGER_ISAS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_codes_do_not_saturate(isa: str, sign: int) -> None:
    """Every product at its largest, for as many inputs as there may be."""
    _native.set_isa(isa)
    k = 1 << 17
    x = torch.ones(2, k)
    x[1] = -1
    w = pack_int8(torch.full((3, k), 127 * sign, dtype=torch.int8), torch.ones(3))
    expected = torch.tensor(127 * 127 * k * sign, dtype=torch.float64).float() / 127.0
    assert (linear(x, w) == torch.stack([expected, -expected])[:, None]).all()
    for group in (32, 64, 128):
        codes = torch.full((3, 256), 15, dtype=torch.uint8)
        zero = torch.full((3, 256 // group), 255 if sign < 0 else 0, dtype=torch.uint8)
        scale = torch.ones(3, 256 // group).half()
        y = linear(x[:, :256], pack_int4(codes, scale, zero, group=group))
        total = 256 * (15.0 if sign > 0 else -240.0)
        assert torch.allclose(y, torch.tensor([[total], [-total]]), rtol=1e-6)


@pytest.mark.parametrize("shape", [(200, 320), (200, 320, 64, False)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_its_row_alone(shape: tuple[int, ...], bad: float) -> None:
    w, x = weight_of(shape), torch.randn(9, 320)
    expected = linear(x, w)
    x[4, 200] = bad
    for isa in INTEGER_ISAS:
        _native.set_isa(isa)
        y = linear(x, w)
        assert y[4].isnan().all()
        keep = torch.arange(9) != 4
        assert_same_bits(y[keep], expected[keep], isa)


@pytest.mark.parametrize("shape", [(21, 40), (21, 64, 32, True)])
@pytest.mark.parametrize("rows", [2, 9])
def test_strided_rows_and_out(shape: tuple[int, ...], rows: int) -> None:
    w, x = weight_of(shape), torch.randn(rows, 100)
    view = x[:, 30 : 30 + shape[1]]
    expected = linear(view.contiguous(), w)
    assert_same_bits(linear(view, w), expected)
    out = torch.full((rows, 50), 7.0)
    result = linear(view, w, out=out[:, 3:24])
    assert_same_bits(out[:, 3:24], expected)
    assert result.data_ptr() == out[:, 3:24].data_ptr()
    assert (out[:, :3] == 7).all() and (out[:, 24:] == 7).all()


@pytest.mark.parametrize("shape", [(37, 300), (200, 128, 64, True)])
@pytest.mark.parametrize("rows", [1, 9])
def test_residual_is_added_last(shape: tuple[int, ...], rows: int) -> None:
    w, x, bias = weight_of(shape), torch.randn(rows, shape[1]), torch.randn(shape[0])
    add = torch.randn(rows, shape[0] + 5)[:, 2:-3]
    for machine in machines(INTEGER_ISAS):
        assert_same_bits(linear(x, w, add=add), linear(x, w) + add, machine)
        assert_same_bits(linear(x, w, bias, add=add), linear(x, w, bias) + add, machine)
    assert_same_bits(linear(x, w, bias, add.clone(), add=add), linear(x, w, bias) + add)


# halves that end inside of a panel, and strips of two and four panels
@pytest.mark.parametrize("shape", [(10, 45), (96, 300), (132, 96, 32, True), (300, 128, 64, False)])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_is_linear_and_activation(shape: tuple[int, ...], kind: str) -> None:
    w, bias = weight_of(shape, gated=True), torch.randn(shape[0])
    x, plain = torch.randn(9, shape[1]), ungated(w)
    for machine in machines(INTEGER_ISAS):
        for with_bias in (None, bias):
            expected = gated(linear(x, plain, with_bias), kind)
            assert_same_bits(linear_gated(x, w, kind, with_bias), expected, machine)
            assert_same_bits(linear_gated(x[:1], w, kind, with_bias), expected[:1], machine)
    reference = linear_gated(x, w, kind, bias, impl="ref")
    assert torch.allclose(linear_gated(x, w, kind, bias), reference, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="linear_gated reads it"):
        linear(x, w)
    with pytest.raises(ValueError, match="pack it with gated=True"):
        linear_gated(x, plain, kind)


@pytest.mark.parametrize("shape", [(96, 45), (132, 96, 32, True)])
@pytest.mark.parametrize("kind", [None, "silu"])
@pytest.mark.parametrize("counts", [[3, 0, 1, 20], [0, 0, 2, 0], [1, 1, 0, 0]])
def test_experts_are_one_linear_each(
    shape: tuple[int, ...], kind: str | None, counts: list[int]
) -> None:
    weights = [weight_of(shape, gated=kind is not None) for _ in counts]
    x = torch.randn(sum(counts), shape[1])
    offsets = torch.tensor([0, *counts]).cumsum(0)
    for machine in machines(INTEGER_ISAS):
        expected = torch.cat(
            [
                linear(part, w) if kind is None else linear_gated(part, w, kind)
                for part, w in zip(x.split(counts), weights, strict=True)
            ]
        )
        got = linear_experts(x, stack_experts(weights), offsets, kind)
        assert_same_bits(got, expected, machine)
    reference = linear_experts(x, stack_experts(weights), offsets, kind, impl="ref")
    assert torch.allclose(expected, reference, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="one shape and type"):
        stack_experts([weights[0], weight_of((32, 32))])
    for impl, error in (("cpu", "offsets do not"), ("ref", "do not divide")):
        with pytest.raises(ValueError, match=error):
            linear_experts(x, stack_experts(weights), offsets + 1, kind, impl=impl)


def test_padding_is_not_read_into_outputs() -> None:
    for shape in ((5, 61), (5, 64, 32, True)):
        w, x = weight_of(shape), torch.randn(8, shape[1])
        rows, expected = unpack_codes(w), linear(x, w)
        w.data.fill_(255)
        if isinstance(w, Int8Weight):
            _native.put_int8(w.data, w.n, w.k, False, 0, rows.codes, rows.scale)
        else:
            _native.put_int4(w.data, w.n, w.k, w.group, False, 0, rows.codes, rows.scale, rows.zero)
        assert_same_bits(linear(x, w), expected)


@pytest.mark.parametrize("shape", [(37, 45), (37, 96, 32, True), (200, 128, 64, False)])
def test_embed(shape: tuple[int, ...]) -> None:
    w = weight_of(shape)
    values, ids = unpack(w), torch.randint(0, shape[0], (50,))
    for machine in machines(INTEGER_ISAS):
        assert_same_bits(embed(ids, w), values[ids], machine)
    assert_same_bits(embed(ids, w, impl="ref"), values[ids])
    assert embed(ids[:0], w).shape == (0, shape[1])
    for impl in ("cpu", "ref"):
        for bad in (shape[0], -1, 2**40):
            with pytest.raises(IndexError, match=rf"ids\[2\] is {bad}"):
                embed(torch.tensor([0, 1, bad]), w, impl=impl)


def test_refuses_what_does_not_fit() -> None:
    codes, scale = torch.zeros((4, 64), dtype=torch.int8), torch.zeros(4)
    with pytest.raises(TypeError, match=r"codes is torch.uint8, not torch.int8"):
        pack_int8(codes.view(torch.uint8), scale)
    with pytest.raises(TypeError, match=r"scale is torch.float16"):
        pack_int8(codes, scale.half())
    with pytest.raises(ValueError, match=r"scale has shape \[3\], not \[4\]"):
        pack_int8(codes, scale[:3])
    with pytest.raises(ValueError, match="one is -128"):
        pack_int8(codes - 128, scale)
    with pytest.raises(ValueError, match="1 to 131072 inputs"):
        pack_int8(torch.zeros((1, (1 << 17) + 1), dtype=torch.int8), scale[:1])
    with pytest.raises(ValueError, match="no gate and up halves"):
        pack_int8(codes[:3], scale[:3], gated=True)
    four, halves = codes.view(torch.uint8), torch.zeros((4, 2)).half()
    with pytest.raises(ValueError, match="32, 64 or 128 inputs, not 48"):
        pack_int4(four, halves, group=48)
    with pytest.raises(ValueError, match="63 inputs are no whole number of groups of 32"):
        pack_int4(four[:, :63], halves, group=32)
    with pytest.raises(ValueError, match=r"scale has shape \[4, 2\], not \[4, 1\]"):
        pack_int4(four, halves, group=64)
    with pytest.raises(ValueError, match=r"in \[0, 15\]"):
        pack_int4(four + 16, halves, group=32)
    with pytest.raises(ValueError, match="asymmetric"):
        pack_int4_rows([Rows(four, halves)], 4, 64, group=32, asymmetric=True)
    w, x = weight_of((20, 32)), torch.randn(4, 32)
    with pytest.raises(ValueError, match=r"x has shape \[4, 31\], not \[\*, 32\]"):
        linear(x[:, :31], w)
    with pytest.raises(TypeError, match="x is bfloat16, not float32"):
        linear(x.bfloat16(), w)
    with pytest.raises(ValueError, match=r"bias has shape \[19\]"):
        linear(x, w, torch.randn(19))
    with pytest.raises(ValueError, match="out has shape"):
        linear(x, w, out=torch.zeros(4, 21))
    with pytest.raises(ValueError, match="w has 1152 bytes, not"):
        linear(x, Int8Weight(w.data, 40, 32))
    with pytest.raises(ValueError, match="w has 1152 bytes, not"):
        linear(x, Int4Weight(w.data, 20, 32, 32))
