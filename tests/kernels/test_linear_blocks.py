"""Linear layers directly on the blocks of GGUF files."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hasten import _native
from hasten.kernels.activation import gated
from hasten.kernels.embedding import embed
from hasten.kernels.linear import (
    BLOCK_KINDS,
    BlockWeight,
    StackedWeight,
    linear,
    linear_experts,
    linear_gated,
    pack,
    pack_blocks,
    stack_experts,
    unpack,
)
from hasten.kernels.linear.blocks_ref import read, rows_of
from hasten.models.gguf.blocks import EXPAND

from .common import INTEGER_ISAS, assert_rows_independent, assert_same_bits, machines

KINDS = list(BLOCK_KINDS)


def random_rows(kind: str, n: int, k: int) -> Tensor:
    """Rows as in a file: random codes and scales of both signs (float16 between 2^-12 and 2^-4)."""
    values, nbytes, _ = BLOCK_KINDS[kind]
    raw = torch.randint(0, 256, (n, k // values, nbytes), dtype=torch.uint8)
    for at in {"Q4_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,)):
        size = 2.0 ** torch.empty(n, k // values, 1).uniform_(-12, -4)
        sign = torch.randint(0, 2, size.shape) * 2 - 1
        raw[..., at : at + 2] = (size * sign).half().view(torch.uint8)
    return raw.view(n, -1)


def expanded(kind: str, rows: Tensor) -> Tensor:
    return EXPAND[kind](rows.view(-1, BLOCK_KINDS[kind].bytes)).view(len(rows), -1)


def shapes(kind: str) -> list[tuple[int, int]]:
    """Less than a panel, several strips, a last span that is shorter."""
    if BLOCK_KINDS[kind].values == 256:
        return [(5, 256), (150, 768)]
    return [(1, 32), (70, 544), (130, 256)]


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packing_keeps_every_value(kind: str, gate: bool) -> None:
    for n, k in shapes(kind):
        n += n % 2 if gate else 0
        rows = random_rows(kind, n, k)
        parts = rows.split([n // 3, n - n // 3])
        w = pack_blocks(iter(parts), n, k, kind, gated=gate)
        assert (w.n, w.k, w.size, w.name, w.gated) == (n, k, n * k, kind, gate)
        assert_same_bytes(w.data, pack_blocks(iter(parts), n, k, kind, gated=gate, impl="ref").data)
        assert_same_bytes(rows_of(w), rows)
        expected = expanded(kind, rows)
        assert_same_bits(unpack(w), expected)
        assert_same_bits(unpack(w, impl="ref"), expected)


def assert_same_bytes(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.uint8 and torch.equal(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_size_is_that_of_the_file(kind: str) -> None:
    rows = random_rows(kind, 128, 512)
    assert pack_blocks([rows], 128, 512, kind).nbytes == rows.nbytes
    view = torch.cat([rows, rows], 1)[:, : rows.shape[1]]  # strided, as in a mapped file
    assert_same_bytes(rows_of(pack_blocks([view], 128, 512, kind)), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_the_definition_on_every_machine(kind: str) -> None:
    """Whole blocks of rows, bias and residual; a fused multiply-add rounds twice in the
    definition, which differs once in about 2^29 steps."""
    for n, k in shapes(kind):
        w = pack_blocks([random_rows(kind, n, k)], n, k, kind)
        x, bias, add = torch.randn(27, k), torch.randn(n), torch.randn(27, n)
        expected = linear(x, w, bias, add=add, impl="ref")
        for machine in machines(INTEGER_ISAS):
            for rows in (1, 2, 5, 13, 27):
                got = linear(x[:rows], w, bias, add=add[:rows])
                wrong = (got != expected[:rows]).sum().item()
                assert wrong <= got.numel() // 1000, f"{n}x{k}, {rows} rows, {machine}: {wrong}"
                torch.testing.assert_close(got, expected[:rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_close_to_the_expanded_weight(kind: str) -> None:
    """Against float64 products of the values; activations lose at most half a code."""
    n, k = shapes(kind)[1]
    rows = random_rows(kind, n, k)
    w, values, x = pack_blocks([rows], n, k, kind), expanded(kind, rows).double(), torch.randn(9, k)
    half = x.view(9, -1, 32).abs().amax(-1, keepdim=True) / 254
    bound = half.expand(-1, -1, 32).reshape(9, k).double() @ values.abs().T
    error = (linear(x, w).double() - x.double() @ values.T).abs()
    # half a code, and the roundings of scales and of the fold, in which a scale and a minimum
    # that cancel count apart
    fields = read(rows, kind)
    size = (
        fields.scale.abs().repeat_interleave(k // fields.scale.shape[1], 1)
    ) * fields.codes.abs()
    if fields.minimum is not None:
        size = size + fields.minimum.abs().repeat_interleave(32, 1)
    bound += (x.double().abs() + bound.mean()) @ size.double().T * (k // 16) * 2.0**-22
    assert (error <= bound).all()
    assert error.mean() > 0  # it is not the float path


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent(kind: str) -> None:
    n, k = shapes(kind)[1]
    w, bias = pack_blocks([random_rows(kind, n, k)], n, k, kind), torch.randn(n)
    x = torch.randn(40, k) * torch.logspace(-3, 3, 40)[:, None]
    assert_rows_independent(lambda index: linear(x[index], w, bias), len(x), INTEGER_ISAS)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_rows(kind: str) -> None:
    """Across the bounds between tiles, between few and many rows, and between rounds."""
    n, k = 80, 512
    w, x = pack_blocks([random_rows(kind, n, k)], n, k, kind), torch.randn(257, k)
    alone = torch.cat([linear(x[i : i + 1], w) for i in range(len(x))])
    for rows in (*range(1, 15), 24, 25, 96, 127, 128, 129, 256, 257):
        assert_same_bits(linear(x[:rows], w), alone[:rows], f"{rows} rows")


@pytest.mark.parametrize("kind", KINDS)
def test_strided_rows_and_out(kind: str) -> None:
    n, k = shapes(kind)[1]
    w, wide = pack_blocks([random_rows(kind, n, k)], n, k, kind), torch.randn(9, k + 20)
    view = wide[:, 7 : 7 + k]
    expected = linear(view.contiguous(), w)
    assert_same_bits(linear(view, w), expected)
    out = torch.full((9, n + 8), 7.0)
    assert linear(view, w, out=out[:, 3 : 3 + n]).data_ptr() == out[:, 3:].data_ptr()
    assert_same_bits(out[:, 3 : 3 + n], expected)
    assert (out[:, :3] == 7).all() and (out[:, 3 + n :] == 7).all()
    residual = torch.randn(9, n)
    both = linear(view, w, add=residual)
    assert_same_bits(linear(view, w, out=residual, add=residual), both)
    assert_same_bits(linear(x := view[:0], w), torch.empty(0, n))
    assert x.shape[0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_gates_are_the_activation_after_the_sums(kind: str) -> None:
    k = 512
    for half in (16, 50):
        rows, bias = random_rows(kind, 2 * half, k), torch.randn(2 * half)
        plain = pack_blocks([rows], 2 * half, k, kind)
        w = pack_blocks([rows], 2 * half, k, kind, gated=True)
        x = torch.randn(15, k) / 8
        for act in ("silu", "gelu_tanh"):
            expected = gated(linear(x, plain, bias), act)
            for machine in machines(INTEGER_ISAS, (2,)):
                assert_same_bits(linear_gated(x, w, act, bias), expected, f"{act}, {machine}")
        assert_same_bits(linear_gated(x[:3], w, "silu"), gated(linear(x[:3], plain), "silu"))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_one_linear_each(kind: str) -> None:
    k, n = 256, 40
    weights = [pack_blocks([random_rows(kind, n, k)], n, k, kind) for _ in range(4)]
    gates = [pack_blocks([rows_of(w)], n, k, kind, gated=True) for w in weights]
    x, offsets = torch.randn(150, k), torch.tensor([0, 3, 3, 145, 150])
    spans = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    for machine in machines(INTEGER_ISAS, (2,)):
        got = linear_experts(x, stack_experts(weights), offsets)
        each = [linear(x[a:b], w) for (a, b), w in zip(spans, weights, strict=True)]
        assert_same_bits(got, torch.cat(each), machine)
        got = linear_experts(x, stack_experts(gates), offsets, "silu")
        each = [linear_gated(x[a:b], w, "silu") for (a, b), w in zip(spans, gates, strict=True)]
        assert_same_bits(got, torch.cat(each), machine)
    with pytest.raises(ValueError, match="offsets"):
        linear_experts(x, stack_experts(weights), offsets.flip(0))


def test_stacked_weights_of_several_kinds() -> None:
    k = 512
    parts = [pack_blocks([random_rows(kind, 34, k)], 34, k, kind) for kind in KINDS]
    w = StackedWeight((*parts, pack(torch.randn(9, k).bfloat16())))
    assert (w.n, w.k) == (4 * 34 + 9, k)
    assert w.nbytes == sum(part.nbytes for part in w.parts)
    x, bias, add = torch.randn(7, k), torch.randn(w.n), torch.randn(7, w.n)
    sizes = [part.n for part in w.parts]
    each = [
        linear(x, part, b, add=a)
        for part, b, a in zip(w.parts, bias.split(sizes), add.split(sizes, 1), strict=True)
    ]
    assert_same_bits(linear(x, w, bias, add=add), torch.cat(each, 1))
    assert_same_bits(unpack(w), torch.cat([unpack(part).float() for part in w.parts]))


@pytest.mark.parametrize("kind", KINDS)
def test_embed(kind: str) -> None:
    n, k = shapes(kind)[1]
    rows = random_rows(kind, n, k)
    w, ids = pack_blocks([rows], n, k, kind), torch.randint(0, n, (50,))
    for machine in machines(INTEGER_ISAS):
        assert_same_bits(embed(ids, w), expanded(kind, rows)[ids], machine)
    assert_same_bits(embed(ids, w, impl="ref"), expanded(kind, rows)[ids])
    for impl in ("cpu", "ref"):
        with pytest.raises(IndexError, match=rf"ids\[1\] is {n}"):
            embed(torch.tensor([0, n]), w, impl=impl)


@pytest.mark.parametrize("isa", INTEGER_ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_extremes(kind: str, isa: str) -> None:
    """Codes at their bounds, zero rows, and what is not finite shows in its own row only."""
    _native.set_isa(isa)
    n, k = 16, 512
    rows = torch.full_like(random_rows(kind, n, k), 255)
    for at in {"Q4_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,)):
        blocks = rows.view(n, -1, BLOCK_KINDS[kind].bytes)
        blocks[..., at : at + 2] = torch.tensor([1.0]).half().view(torch.uint8)
    for fill in (0, 255):
        body = rows.clone()
        if fill == 0 and kind in ("Q8_0", "Q4_0"):
            body.view(n, -1, BLOCK_KINDS[kind].bytes)[..., 2:] = 0x80 if kind == "Q8_0" else 0
        w = pack_blocks([body], n, k, kind)
        x = torch.stack([torch.ones(k), -torch.ones(k), torch.zeros(k), torch.ones(k)])
        x[3, 40] = float("inf")
        got, expected = linear(x, w), linear(x, w, impl="ref")
        assert_same_bits(got[:3], expected[:3])
        assert got[3].isnan().all() and (got[2] == 0).all()


def test_what_does_not_fit_is_refused() -> None:
    rows = random_rows("Q4_0", 20, 64)
    w, x = pack_blocks([rows], 20, 64, "Q4_0"), torch.randn(4, 64)
    refused: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, r"x has shape \[4, 63\]", lambda: linear(torch.randn(4, 63), w)),
        (TypeError, "x is bfloat16", lambda: linear(x.bfloat16(), w)),
        (ValueError, r"bias has shape \[19\]", lambda: linear(x, w, torch.randn(19))),
        (ValueError, "out has shape", lambda: linear(x, w, out=torch.zeros(4, 21))),
        (ValueError, "bytes", lambda: linear(x, BlockWeight(w.data, 80, 64, "Q4_0"))),
        (ValueError, "kind is Q2_K", lambda: pack_blocks([rows], 20, 64, "Q2_K")),
        (ValueError, "no whole number", lambda: pack_blocks([rows], 20, 80, "Q4_0")),
        (ValueError, "no whole number", lambda: pack_blocks([rows], 20, 64, "Q4_K")),
        (ValueError, "have 20 rows, not 21", lambda: pack_blocks([rows], 21, 64, "Q4_0")),
        (ValueError, "have 20 rows, not 19", lambda: pack_blocks([rows], 19, 64, "Q4_0")),
        (ValueError, r"shape \[\*, 36\]", lambda: pack_blocks([rows[:, 1:]], 20, 64, "Q4_0")),
        (TypeError, "uint8", lambda: pack_blocks([rows.int()], 20, 64, "Q4_0")),
        (ValueError, "gates", lambda: pack_blocks([rows[:19]], 19, 64, "Q4_0", gated=True)),
        (ValueError, "linear_gated reads it", lambda: linear(x, gate)),
    ]
    gate = pack_blocks([rows], 20, 64, "Q4_0", gated=True)
    for error, what, call in refused:
        with pytest.raises(error, match=what):
            call()
