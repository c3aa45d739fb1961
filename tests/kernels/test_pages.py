"""Writing to pages: rotation and append, page copies, moves of slots."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from hasten import _native
from hasten.kernels.pages import copy_pages, move_slots
from hasten.kernels.rope import append
from hasten.kernels.rope.ref import quantize, scales_of

from .common import FAST, assert_close, assert_same_bits, machines
from .paged import PAGE, Cache, Form


@pytest.fixture(autouse=True)
def python_seed(seed: int) -> None:
    random.seed(seed)


def tables(positions: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(positions)[:, None] * 0.7 ** torch.arange(half)
    return angle.cos().float(), angle.sin().float()


class Case:
    """Random rows of three sequences; ``run`` appends some of them to a fresh cache."""

    def __init__(
        self,
        q_heads: int,
        kv_heads: int,
        dim: int,
        half: int,
        groups: int,
        value_dim: int | None = None,
    ) -> None:
        value_dim = dim if value_dim is None else value_dim
        self.shape = kv_heads, dim, groups, value_dim
        self.cos, self.sin = tables(120, half)
        places = random.sample([(t, s) for t in range(3) for s in range(60)], 70)
        self.table_row = torch.tensor([t for t, _ in places], dtype=torch.int32)
        self.slots = torch.tensor([s for _, s in places], dtype=torch.int32)
        self.positions = torch.randint(0, 120, (70,), dtype=torch.int32)
        self.q = torch.randn(70, q_heads, dim)
        self.k, self.v = torch.randn(70, kv_heads, dim), torch.randn(70, kv_heads, value_dim)
        self.cache = Cache(3, 4, kv_heads, dim, groups, Form(), value_dim, value_dim == 0)
        for t, s in places:
            self.cache.reserve(t, s)

    def run(
        self,
        dtype: torch.dtype,
        index: Tensor | None = None,
        impl: str = "cpu",
        rotate_keys: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.arange(70) if index is None else index
        q, k, v = (
            self.q[index],
            self.cache.k.to(dtype, copy=True),
            self.cache.v.to(dtype, copy=True),
        )
        if dtype == torch.int8:
            kv_heads, dim, groups, value_dim = self.shape
            pages = Cache(3, 4, kv_heads, dim, groups, Form(dtype), value_dim, value_dim == 0)
            k, v = pages.k.fill_(0x55), pages.v.fill_(0x55)
        rows = (x[index] for x in (self.positions, self.slots, self.table_row))
        keys = self.k[index], self.v[index]
        angles = self.cos, self.sin
        append(q, *keys, *angles, *rows, self.cache.table, k, v, rotate_keys, impl=impl)
        return q, k, v


SHAPES = [
    # query heads, KV heads, dim, half of the rotated dimensions, head groups, dim of a value
    (4, 2, 64, 32, 1),
    (4, 2, 20, 7, 2, 35),
    (5, 1, 26, 3, 1, 0),  # none is stored: values lie in the keys
    (6, 2, 20, 10, 2),
    (3, 3, 33, 8, 3),  # a part of an odd head is rotated
    (2, 1, 16, 0, 1),  # nothing is
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_append_matches_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case(*shape)
    got, expected = case.run(dtype), case.run(dtype, impl="ref")
    assert_close(got[0], expected[0], 1e-6, "q")
    # where a float32 differs in its last bit, its bfloat16 may be the neighbour
    assert_close(got[1], expected[1], 1e-6 if dtype == torch.float32 else 8e-3, "k")
    assert_same_bits(got[2], expected[2], "v")
    assert torch.equal(got[1].isnan(), expected[1].isnan()), "what was not written"


def decoded(case: Case, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [N, H, D, 16] and values [N, H, 16, Dp] of int8 pages as floats."""
    dim = case.shape[1]
    k_scale, *rest = scales_of(k, dim)
    keys = k[:, :, :dim] * k_scale[:, :, None]
    return keys, v * rest[0][..., None] if rest else v.float()


def test_codes_are_rounded_once() -> None:
    """127 / amax as a reciprocal times 127 makes this product 13.5 and its code 14."""
    case = Case(4, 2, 64, 32, 1)
    case.k[0, 0] = 1.0
    case.k[0, 0, :2] = torch.tensor(
        [float.fromhex("0x1.e65068p14"), float.fromhex("0x1.9d8ef4p11")]
    )
    codes = [case.run(torch.int8, rotate_keys=False, impl=impl)[1] for impl in ("cpu", "ref")]
    assert_same_bits(*codes)
    assert quantize(case.k[0, 0])[0][:2].tolist() == [127, 13]


@pytest.mark.parametrize("shape", SHAPES)
def test_append_quantizes_each_row_alone(shape: tuple[int, ...]) -> None:
    case = Case(*shape)
    case.k *= 10.0 ** torch.randint(-20, 20, (70, shape[1], 1))
    case.k[3], case.k[4, 0], case.k[5, 0, -1] = 0, 1e-32, torch.inf
    case.v[6], case.v[7, 0, -1:] = torch.nan, torch.inf
    got = case.run(torch.int8, rotate_keys=False)
    expected = case.run(torch.int8, rotate_keys=False, impl="ref")
    assert_same_bits(got[1], expected[1], "keys before the rotation, and scales")
    assert_same_bits(got[2], expected[2], "values")
    assert_close(got[0], expected[0], 1e-6, "q")
    # rotated, codes may be neighbours; nothing is further from its float than half a code
    k, v = decoded(case, *case.run(torch.int8)[1:])
    exact = case.run(torch.float32)
    for stored, floats, axis in ((k, exact[1], 2), (v, exact[2], 3)):
        if floats.numel() == 0:
            continue
        top = floats.abs().amax(axis, keepdim=True)
        written = ~floats.isnan() & top.isfinite() & (top >= 2.0**-100)
        assert ((stored - floats).abs() / top)[written.expand_as(floats)].max() <= 1.001 / 254
    tiny = torch.zeros_like(case.k[0, 0])
    assert_same_bits(quantize(tiny + 2.0**-101)[0], tiny.to(torch.int8))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_append_without_rotation_equals_angles_of_zero(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    case = Case(*shape)
    got = case.run(dtype, rotate_keys=False)
    rotated = case.run(dtype)[0]
    assert_same_bits(got[0], rotated, "queries are rotated in any case")
    case.cos, case.sin = torch.ones_like(case.cos), torch.zeros_like(case.sin)
    expected = case.run(dtype)
    assert_same_bits(got[1], expected[1])
    assert_same_bits(got[2], expected[2])


def test_append_rounds_to_nearest_even() -> None:
    case = Case(2, 2, 16, 0, 1)
    case.k = (
        torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800001])[
            torch.randint(0, 5, (70, 2, 16))
        ]
        .int()
        .view(torch.float32)
    )
    case.v = case.k.flip(2)
    got, expected = case.run(torch.bfloat16), case.run(torch.bfloat16, impl="ref")
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert_same_bits(a.nan_to_num(0), b.nan_to_num(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_append_rows_are_independent(shape: tuple[int, ...]) -> None:
    case, dtype = Case(*shape), random.choice([torch.float32, torch.bfloat16, torch.int8])
    _native.set_isa(FAST)
    expected = case.run(dtype)
    one = torch.randperm(70)[:5]
    for machine in machines():
        index = torch.randperm(70)
        q, k, v = case.run(dtype, index)
        assert_same_bits(q, expected[0][index], machine)
        assert_same_bits(k, expected[1], machine)
        assert_same_bits(v, expected[2], machine)
        for i in one.tolist():
            assert_same_bits(case.run(dtype, torch.tensor([i]))[0][0], expected[0][i], machine)


def test_append_takes_slices_of_a_fused_projection() -> None:
    case = Case(4, 2, 16, 8, 1)
    fused = torch.cat([case.q.flatten(1), case.k.flatten(1), case.v.flatten(1)], 1)
    expected = case.run(torch.float32)
    q = fused[:, :64].view(70, 4, 16)
    k, v = fused[:, 64:96].view(70, 2, 16), fused[:, 96:].view(70, 2, 16)
    pages = case.cache.k.clone(), case.cache.v.clone()
    rows = case.positions, case.slots, case.table_row
    append(q, k, v, case.cos, case.sin, *rows, case.cache.table, *pages)
    assert_same_bits(q, expected[0])
    assert_same_bits(pages[0], expected[1])
    assert_same_bits(pages[1], expected[2])


@pytest.mark.parametrize("impl", ["cpu", "ref"])
@pytest.mark.parametrize("what", ["slot", "negative slot", "page", "page id", "position"])
def test_append_checks_before_it_writes(what: str, impl: str) -> None:
    case = Case(2, 2, 16, 8, 2)
    if what == "slot":
        case.slots[-1] = 64
    elif what == "negative slot":
        case.slots[-1] = -1
    elif what == "position":
        case.positions[-1] = 120
    else:
        block = int(case.slots[-1]) // PAGE
        bad = -1 if what == "page" else len(case.cache.k)
        case.cache.table[int(case.table_row[-1]), 1, block] = bad
    q, k, v = case.q.clone(), case.cache.k.clone(), case.cache.v.clone()
    rows = case.positions, case.slots, case.table_row
    args = case.k, case.v, case.cos, case.sin, *rows, case.cache.table
    with pytest.raises(ValueError, match=r"slot|position"):
        append(q, *args, k, v, impl=impl)
    assert_same_bits(q, case.q)
    assert_same_bits(k, case.cache.k)
    assert_same_bits(v, case.cache.v)


def test_append_refuses_what_does_not_fit() -> None:
    case = Case(2, 2, 16, 8, 1)
    good = {
        "q": case.q,
        "k": case.k,
        "v": case.v,
        "cos": case.cos,
        "sin": case.sin,
        "positions": case.positions,
        "slots": case.slots,
        "table_row": case.table_row,
        "table": case.cache.table,
        "k_pages": case.cache.k,
        "v_pages": case.cache.v,
    }

    def refuse(error: type[Exception], match: str, **bad: Tensor) -> None:
        with pytest.raises(error, match=match):
            append(**{**good, **bad})

    refuse(TypeError, "k is float16, not float32", k=case.k.half())
    refuse(ValueError, r"k has shape \[70, 1, 16\]", k=case.k[:, :1].contiguous())
    refuse(ValueError, r"v has shape \[69", v=case.v[1:])
    refuse(ValueError, "sin has shape", sin=case.sin[:, 1:].contiguous())
    wide = torch.zeros(120, 9)
    refuse(ValueError, "rotates 18 of 16 dimensions", cos=wide, sin=wide)
    refuse(TypeError, "slots is int64, not int32", slots=case.slots.long())
    refuse(ValueError, "v_pages has shape", v_pages=case.cache.v[:-1].contiguous())
    refuse(ValueError, "v_pages has shape", v=torch.randn(70, 2, 17))
    nothing = case.cache.v[..., :0].contiguous()
    refuse(ValueError, r"v has shape \[70, 2, 16\], not \[70, 2, 0\]", v_pages=nothing)
    refuse(ValueError, "3 tables", table_row=case.table_row + 3)


# ------------------------------------------------------------------ moves

STORAGE = [
    # layers, heads, dim, dtype, stored dimensions of a value
    (3, 2, 20, torch.float32, 32),
    (2, 1, 64, torch.bfloat16, 64),
    (2, 1, 24, torch.bfloat16, 0),  # values lie in the keys
    (2, 2, 21, torch.int8, 32),
    (2, 1, 24, torch.int8, 0),
]


def storage(
    layers: int, heads: int, dim: int, dtype: torch.dtype, padded: int
) -> tuple[Tensor, Tensor]:
    if dtype == torch.int8:
        k = torch.randint(-128, 128, (layers, 24, heads, dim + (8 if padded else 4), PAGE))
        v = torch.randint(-128, 128, (layers, 24, heads, PAGE, padded))
        return k.to(dtype), v.to(dtype)
    k = torch.randn(layers, 24, heads, dim, PAGE).to(dtype)
    return k, torch.randn(layers, 24, heads, PAGE, padded).to(dtype)


@pytest.mark.parametrize("shape", STORAGE)
def test_copy_pages_matches_reference(shape: tuple[int, int, int, torch.dtype, int]) -> None:
    k, v = storage(*shape)
    # chains on purpose: the order given is the order of the copies
    src, dst = torch.randint(0, 24, (9,)), torch.randint(0, 24, (9,))
    expected = k.clone(), v.clone()
    copy_pages(*expected, src, dst, impl="ref")
    for machine in machines(isas=(FAST,)):
        got = k.clone(), v.clone()
        copy_pages(*got, src, dst)
        assert_same_bits(got[0], expected[0], machine)
        assert_same_bits(got[1], expected[1], machine)


@pytest.mark.parametrize("impl", ["cpu", "ref"])
@pytest.mark.parametrize("bad", [-1, 24])
def test_copy_pages_checks_before_it_writes(bad: int, impl: str) -> None:
    k, v = storage(*STORAGE[0])
    before = k.clone(), v.clone()
    for src, dst in (([0, bad], [1, 2]), ([0, 1], [2, bad])):
        with pytest.raises(ValueError, match=rf"\[1\] is {bad}, but there are 24 pages"):
            copy_pages(k, v, torch.tensor(src), torch.tensor(dst), impl=impl)
    assert_same_bits(k, before[0])
    assert_same_bits(v, before[1])
    with pytest.raises(TypeError, match="src is int32"):
        copy_pages(k, v, torch.tensor([0]).int(), torch.tensor([1]))
    with pytest.raises(ValueError, match="v has shape"):
        copy_pages(k, v[:, 1:].contiguous(), torch.tensor([0]), torch.tensor([1]))


@pytest.mark.parametrize("shape", STORAGE)
@pytest.mark.parametrize("groups", [1, 2])
def test_move_slots_matches_reference(
    shape: tuple[int, int, int, torch.dtype, int], groups: int
) -> None:
    k, v = storage(*shape)
    table = torch.randperm(24)[: 2 * groups * 4].view(2, groups, 4).int()
    moves = []
    for row in range(2):  # accepted paths: destinations ascend and never pass the sources
        src = sorted(random.sample(range(30, 64), 12))
        moves += [(row, s, 30 + i) for i, s in enumerate(src)]
    args = [torch.tensor(column, dtype=torch.int32) for column in zip(*moves, strict=True)]
    expected = k.clone(), v.clone()
    move_slots(*expected, table, *args, impl="ref")
    for machine in machines(isas=(FAST,)):
        got = k.clone(), v.clone()
        move_slots(*got, table, *args)
        assert_same_bits(got[0], expected[0], machine)
        assert_same_bits(got[1], expected[1], machine)
    # the moved rows are those of the original
    row, src, dst = moves[7]
    for group in range(groups):
        a, b = (int(table[row, group, slot // PAGE]) for slot in (src, dst))
        dim = shape[2]
        assert_same_bits(expected[0][:, b, :, :dim, dst % PAGE], k[:, a, :, :dim, src % PAGE])
        assert_same_bits(expected[1][:, b, :, dst % PAGE], v[:, a, :, src % PAGE])


@pytest.mark.parametrize("impl", ["cpu", "ref"])
@pytest.mark.parametrize("bad", ["src", "dst", "page"])
def test_move_slots_checks_before_it_writes(bad: str, impl: str) -> None:
    k, v = storage(*STORAGE[0])
    before = k.clone(), v.clone()
    table = torch.arange(8).view(1, 2, 4).int()
    src, dst = [40, 41], [30, 31]
    if bad == "src":
        src[1] = 64
    elif bad == "dst":
        dst[1] = -1
    else:
        table[0, 1, 1] = -1
    args = [torch.tensor(x, dtype=torch.int32) for x in ([0, 0], src, dst)]
    with pytest.raises(ValueError, match="slot"):
        move_slots(k, v, table, *args, impl=impl)
    assert_same_bits(k, before[0])
    assert_same_bits(v, before[1])
