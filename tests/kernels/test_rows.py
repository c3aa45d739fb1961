"""Operations that work row by row: norm, activations, logits, router, vector functions."""

from __future__ import annotations

import math

import pytest
import torch

from hasten import _native
from hasten.kernels.activation import gated, softcap
from hasten.kernels.logits import row_max_lse, row_top, sum_exp
from hasten.kernels.moe import route
from hasten.kernels.rms_norm import add_rms_norm, rms_norm
from hasten.kernels.rows import add, scale, take_rows

from .common import ISAS, assert_close, assert_rows_independent, assert_same_bits, machines

EPS = 1e-6


# ------------------------------------------------------------------ exp and tanh of the kernels


def vector(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    out = torch.empty_like(x)
    _native.vector_math(x, tanh, out)
    return out


@pytest.mark.parametrize("isa", ISAS)
def test_exp_is_accurate_and_exact_at_the_edges(isa: str) -> None:
    _native.set_isa(isa)
    x = torch.cat([torch.linspace(-87, 88.7, 300_001), torch.randn(1001) * 1e-3])
    relative = (vector(x, False).double() / torch.exp(x.double()) - 1).abs().max()
    assert relative < 2e-7
    edges = torch.tensor([-math.inf, -87.1, -1e30, 0.0, -0.0, math.inf, 89.5, math.nan])
    got = vector(edges, False)
    assert got[:3].tolist() == [0.0, 0.0, 0.0]
    assert got[3:7].tolist() == [1.0, 1.0, math.inf, math.inf]
    assert got[7].isnan()


@pytest.mark.parametrize("isa", ISAS)
def test_tanh_is_accurate(isa: str) -> None:
    _native.set_isa(isa)
    x = torch.cat([torch.linspace(-12, 12, 300_001), torch.randn(1001) * 1e-4])
    x = x[x != 0]
    relative = (vector(x, True).double() / torch.tanh(x.double()) - 1).abs().max()
    assert relative < 3e-7
    got = vector(torch.tensor([-math.inf, math.inf, 0.0, 100.0, math.nan]), True)
    assert got[:4].tolist() == [-1.0, 1.0, 0.0, 1.0]
    assert got[4].isnan()


def test_vector_functions_have_the_same_bits_everywhere() -> None:
    x = torch.cat([torch.randn(5000) * 40, torch.linspace(-90, 90, 5001)])
    for tanh in (False, True):
        results = {}
        for isa in ISAS:
            _native.set_isa(isa)
            results[isa] = vector(x, tanh)
        for isa in ISAS:
            assert_same_bits(results[isa], results[ISAS[0]], isa)


# ------------------------------------------------------------------ rms_norm


@pytest.mark.parametrize("size", [1, 15, 16, 33, 64, 65, 127, 896, 1000])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_rms_norm_matches_reference(size: int, rows: int) -> None:
    x, y, weight = torch.randn(rows, size) * 3, torch.randn(rows, size), torch.randn(size)
    expected = rms_norm(x.double(), weight.double(), EPS, impl="ref")
    assert_close(rms_norm(x, weight, EPS), expected, 1e-6)
    normed, total = add_rms_norm(x, y, weight, EPS)
    assert_same_bits(total, x + y, "sum")
    assert_same_bits(normed, rms_norm(total, weight, EPS), "fused against one after the other")


def test_rms_norm_of_a_slice_of_heads_and_in_place() -> None:
    fused, weight = torch.randn(6, 200), torch.randn(20)
    heads = fused[:, 40:100].view(6, 3, 20)
    expected = rms_norm(heads.contiguous(), weight, EPS)
    assert_same_bits(rms_norm(heads, weight, EPS), expected)
    assert_same_bits(expected.view(18, 20), rms_norm(heads.reshape(18, 20), weight, EPS))
    x = heads.contiguous()
    rms_norm(x, weight, EPS, out=x)
    assert_same_bits(x, expected)
    one = torch.randn(20)
    assert_same_bits(rms_norm(one, weight, EPS), rms_norm(one[None], weight, EPS)[0])


@pytest.mark.parametrize("size", [33, 896])
def test_rms_norm_rows_are_independent(size: int) -> None:
    x, y, weight = torch.randn(300, size), torch.randn(300, size), torch.randn(size)
    assert_rows_independent(lambda i: rms_norm(x[i], weight, EPS), 300)
    assert_rows_independent(lambda i: add_rms_norm(x[i], y[i], weight, EPS)[0], 100)


def test_rms_norm_refuses_what_does_not_fit() -> None:
    x, weight = torch.randn(4, 30), torch.randn(30)
    with pytest.raises(ValueError, match=r"weight has shape \[29\], not \[30\]"):
        rms_norm(x, weight[:29], EPS)
    with pytest.raises(TypeError, match="x is bfloat16"):
        rms_norm(x.bfloat16(), weight, EPS)
    with pytest.raises(ValueError, match=r"residual has shape \[3, 30\]"):
        add_rms_norm(x, x[:3], weight, EPS)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(torch.randn(30, 4).T, weight, EPS)


# ------------------------------------------------------------------ activations


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("size", [1, 16, 123, 1030])
def test_gated_matches_reference(kind: str, size: int) -> None:
    x = torch.randn(5, 2 * size) * 4
    assert_close(gated(x, kind), gated(x.double(), kind, impl="ref"), 2e-6)
    wide = torch.randn(5, 2 * size + 9)
    assert_same_bits(gated(wide[:, 4:-5], kind), gated(wide[:, 4:-5].contiguous(), kind))


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_at_the_edges(kind: str) -> None:
    gate = torch.tensor([-200.0, -100.0, 0.0, 100.0, 1e30])
    got = gated(torch.cat([gate, torch.ones(5)])[None], kind)[0]
    assert got.tolist() == [0.0, 0.0, 0.0, 100.0, pytest.approx(1e30)]


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_rows_are_independent(kind: str) -> None:
    x = torch.randn(64, 2 * 150)
    assert_rows_independent(lambda i: gated(x[i], kind), 64)


def test_activations_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="activation 'relu'"):
        gated(torch.zeros(2, 4), "relu")
    with pytest.raises(ValueError, match="odd number of columns"):
        gated(torch.zeros(2, 5), "silu")
    with pytest.raises(TypeError):
        gated(torch.zeros(2, 4).double(), "silu")
    for impl in ("cpu", "ref"):
        with pytest.raises(ValueError, match="positive"):
            softcap(torch.zeros(2, 4), 0.0, impl=impl)


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_softcap(cap: float) -> None:
    x = torch.randn(33, 321) * 60
    assert_close(softcap(x, cap), softcap(x.double(), cap, impl="ref"), 1e-6)
    assert_rows_independent(lambda i: softcap(x[i], cap), 33)


# ------------------------------------------------------------------ logits


@pytest.mark.parametrize("size", [1, 5, 4097, 8192, 20011])
def test_row_max_lse_matches_reference(size: int) -> None:
    x = torch.randn(6, size) * 5
    x[1] = x[1].round()  # ties
    x[2] = 3.0
    got, expected = row_max_lse(x), row_max_lse(x.double(), impl="ref")
    assert got[0].tolist() == expected[0].tolist()
    assert_same_bits(got[1], x.amax(1))
    assert_close(got[2], expected[2], 1e-6)


def test_row_max_takes_the_lowest_of_equal_ids_across_lanes_and_blocks() -> None:
    x = torch.zeros(4, 9000)
    x[0, [8999, 8300, 177, 33]] = 5.0
    x[1, [8200, 8201]] = 5.0
    x[2, 7] = -0.0  # equal to 0
    for machine in machines():
        assert row_max_lse(x)[0].tolist() == [33, 8200, 0, 0], machine


def test_row_max_lse_of_odd_rows() -> None:
    x = torch.randn(5, 9001)
    x[0, 8999] = math.nan
    x[1] = -math.inf
    x[2, 4] = math.inf
    x[3, 17:] = -math.inf
    x[4] = math.nan
    for impl in ("cpu", "ref"):
        argmax, top, lse = row_max_lse(x, impl=impl)
        assert argmax.tolist() == [0, 0, 4, int(x[3].argmax()), 0]
        assert top[[0, 4]].isnan().all() and lse[[0, 4]].isnan().all()
        assert top[1:3].tolist() == lse[1:3].tolist() == [-math.inf, math.inf]
        assert_close(lse[3], x[3].double().logsumexp(0), 1e-6)


@pytest.mark.parametrize("size", [4097, 20011])
def test_row_max_lse_rows_are_independent(size: int) -> None:
    x = torch.randn(20, size)
    assert_rows_independent(lambda i: row_max_lse(x[i])[2], 20)
    assert_rows_independent(lambda i: row_max_lse(x[i])[0], 20)


def test_row_max_lse_refuses_what_does_not_fit() -> None:
    with pytest.raises(TypeError, match="logits is bfloat16"):
        row_max_lse(torch.zeros(2, 3, dtype=torch.bfloat16))
    for impl in ("cpu", "ref"):
        with pytest.raises(ValueError, match="no columns"):
            row_max_lse(torch.zeros(2, 0), impl=impl)
    assert [len(part) for part in row_max_lse(torch.zeros(0, 3))] == [0, 0, 0]


@pytest.mark.parametrize("size", [1, 3, 16, 61, 1000, 4096, 8200, 50021])
def test_the_likeliest_ids_are_those_of_a_sort(size: int) -> None:
    x = torch.randn(9, size) * 3
    x[1] = x[1].round()  # many ties
    x[2] = 0.5
    x[3, size // 2 :] = -math.inf
    x[4, ::3] = math.nan
    x[5] = torch.arange(size)
    x[6] = -torch.arange(size)
    x[7] = torch.where(torch.rand(size) < 0.5, 0.0, -0.0)
    x[8, size - 1] = math.inf
    for k in {0, 1, min(7, size), min(256, size), size}:
        expected = row_top(x, k, impl="ref")[3]
        for machine in machines():
            got = row_top(x, k)
            assert torch.equal(got[3], expected), (k, machine)
            for one, other in zip(got, row_top(x, 0), strict=True):  # k changes nothing else
                if one is not got[3]:
                    assert_same_bits(one, other)
    with pytest.raises(ValueError, match=f"the first {size + 1} of {size} columns"):
        row_top(x, size + 1)


@pytest.mark.parametrize("size", [1, 15, 8193, 20011])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 5e-320, 40.0])
def test_sum_exp(size: int, temperature: float) -> None:
    x = torch.randn(7, size) * 9
    x[1, 0] = math.nan
    x[2, size - 1] = -math.inf
    shift = x.nan_to_num(-math.inf, neginf=-math.inf).amax(1)
    if size == 1:
        shift[1:3] = 0
    got = sum_exp(x, shift, temperature)
    expected = sum_exp(x, shift, temperature, impl="ref")
    assert torch.allclose(got, expected, rtol=1e-13, atol=0)
    assert_rows_independent(lambda i: sum_exp(x[i], shift[i], temperature), 7)


def test_sum_exp_refuses_what_does_not_fit() -> None:
    for impl in ("cpu", "ref"):
        with pytest.raises(ValueError, match="temperature"):
            sum_exp(torch.zeros(2, 3), torch.zeros(2), 0.0, impl=impl)
    with pytest.raises(ValueError, match="shift"):
        sum_exp(torch.zeros(2, 3), torch.zeros(3), 1.0)


# ------------------------------------------------------------------ rows


@pytest.mark.parametrize("shape", [(5,), (3, 77), (4, 3, 20)])
def test_add_and_scale(shape: tuple[int, ...]) -> None:
    x, y = torch.randn(shape), torch.randn(shape)
    for machine in machines():
        assert_same_bits(add(x, y), x + y, machine)
        assert_same_bits(scale(x, 0.3), x * torch.tensor(0.3), machine)
        out = x.clone()
        assert add(out, y, out) is out
        assert_same_bits(out, x + y)
    assert_same_bits(scale(-torch.zeros(3), 1.0), -torch.zeros(3))
    with pytest.raises(ValueError, match="y has shape"):
        add(x, torch.zeros(2, 2))


def test_strided_rows() -> None:
    """Slices of heads and columns, as inputs and as results; what lies between stays."""
    wide, other = torch.randn(4, 6, 50), torch.randn(4, 6, 33)
    x, y = wide[:, 1:4, 5:38], other[:, :3]
    out = torch.full((4, 5, 40), 7.0)
    add(x, y, out[:, :3, 2:35])
    expected = torch.full((4, 5, 40), 7.0)
    expected[:, :3, 2:35] = x + y
    assert_same_bits(out, expected)
    weight = torch.rand(33) + 0.5
    rms_norm(x, weight, EPS, out[:, :3, 2:35], add=y)
    expected[:, :3, 2:35] = rms_norm(x.contiguous(), weight, EPS) + y
    assert_same_bits(out, expected)
    assert_rows_independent(lambda i: rms_norm(x[i], weight, EPS, add=y[i]), 4)


def test_take_rows() -> None:
    x = torch.randn(6, 44)[:, 3:36]
    for index in ([5, 0, 0, 3], [], [2]):
        rows = torch.tensor(index, dtype=torch.int64)
        for impl in ("cpu", "ref"):
            assert_same_bits(take_rows(x, rows, impl=impl), x[rows])
            with pytest.raises(IndexError, match="6 rows"):
                take_rows(x, torch.tensor([0, 6]), impl=impl)


# ------------------------------------------------------------------ router


@pytest.mark.parametrize("experts", [1, 8, 33, 128])
@pytest.mark.parametrize("normalize", [False, True])
def test_route_matches_reference(experts: int, normalize: bool) -> None:
    x, k = torch.randn(50, experts) * 3, min(experts, 6)
    ids, weights = route(x, k, normalize)
    expected_ids, expected = route(x.double(), k, normalize, impl="ref")
    assert ids.tolist() == expected_ids.tolist()
    assert_close(weights, expected, 1e-6)


def test_route_breaks_ties_by_the_lower_id() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    for impl in ("cpu", "ref"):
        assert route(x, 4, True, impl=impl)[0].tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("experts", "groups", "top_groups", "k"),
    [(8, 4, 2, 3), (33, 3, 1, 11), (160, 8, 3, 6), (6, 6, 2, 2), (12, 3, 3, 5)],
)
def test_route_within_the_best_groups(experts: int, groups: int, top_groups: int, k: int) -> None:
    x = torch.randn(50, experts) * 3
    ids, weights = route(x, k, False, groups, top_groups)
    expected_ids, expected = route(x.double(), k, False, groups, top_groups, impl="ref")
    assert ids.tolist() == expected_ids.tolist()
    assert_close(weights, expected, 1e-6)
    for row, chosen in zip(x.softmax(1), ids.tolist(), strict=True):  # said in another way
        best = row.view(groups, -1).max(1).values.topk(top_groups).indices.tolist()
        open_to_choice = [e for e in range(experts) if e // (experts // groups) in best]
        assert chosen == sorted(open_to_choice, key=lambda e: -row[e])[:k]


def test_route_breaks_ties_of_groups_by_the_lower_group() -> None:
    x = torch.tensor([[1.0, 3.0, 0.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    for impl in ("cpu", "ref"):
        assert route(x, 3, True, 3, 2, impl=impl)[0].tolist() == [[1, 3, 0], [0, 1, 2]]
        with pytest.raises(ValueError, match="4 experts in the chosen groups"):
            route(x, 5, True, 3, 2, impl=impl)
        for groups, top_groups in ((4, 2), (3, 4), (3, 0), (0, 0)):
            with pytest.raises(ValueError, match=f"choose {top_groups} of {groups} equal groups"):
                route(x, 1, True, groups, top_groups, impl=impl)


def test_route_rows_are_independent() -> None:
    x = torch.randn(70, 60)
    for choice in ((8, True), (8, False, 6, 2)):
        assert_rows_independent(lambda i, c=choice: route(x[i], *c)[1], 70)
        assert_rows_independent(lambda i, c=choice: route(x[i], *c)[0], 70)


@pytest.mark.parametrize("k", [0, 9, -1])
@pytest.mark.parametrize("impl", ["cpu", "ref"])
def test_route_refuses_more_experts_than_there_are(k: int, impl: str) -> None:
    with pytest.raises(ValueError, match=f"k is {k}, but there are 8 experts"):
        route(torch.zeros(2, 8), k, True, impl=impl)
