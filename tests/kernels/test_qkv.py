"""Queries, keys and values in one call: the bits of the operations that it is made of."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from hasten import _native
from hasten.kernels.linear import StackedWeight, Weight, pack, pack_blocks, unpack
from hasten.kernels.qkv import HeadNorms, qkv, ref

from .common import FAST, INTEGER_ISAS, assert_close, assert_same_bits, machines
from .paged import FORMS, PAGE, Cache, Form, angles
from .test_linear_blocks import random_rows
from .test_linear_quantized import weight_of

INPUTS = 256


def stacked(sizes: list[int]) -> StackedWeight:
    """Queries in blocks, keys in int8, values in float32."""
    blocks = pack_blocks([random_rows("Q6_K", sizes[0], INPUTS)], sizes[0], INPUTS, "Q6_K")
    return StackedWeight((blocks, weight_of((sizes[1], INPUTS)), pack(torch.randn(sizes[2], 256))))


KINDS = {
    "float32": lambda sizes: pack(torch.randn(sum(sizes), INPUTS)),
    "bfloat16": lambda sizes: pack(torch.randn(sum(sizes), INPUTS).bfloat16()),
    "int8": lambda sizes: weight_of((sum(sizes), INPUTS)),
    "int4": lambda sizes: weight_of((sum(sizes), INPUTS, 64, True)),
    "blocks": lambda sizes: pack_blocks(
        [random_rows("Q4_K", sum(sizes), INPUTS)], sum(sizes), INPUTS, "Q4_K"
    ),
    "stacked": stacked,
}
SHAPES = [
    # query heads, KV heads, dim, half of the rotated dimensions, head groups
    (4, 2, 64, 32, 1),
    (6, 2, 20, 7, 2),
    (3, 3, 33, 16, 3),
    (1, 1, 16, 0, 1),
]


class Case:
    """A weight and random rows of three sequences; ``run`` puts some of them into a fresh cache."""

    def __init__(self, kind: str, shape: tuple[int, ...], form: Form, rows: int, norm: str) -> None:
        q_heads, kv_heads, self.dim, half, groups = shape
        sizes = [heads * self.dim for heads in (q_heads, kv_heads, kv_heads)]
        self.w: Weight = KINDS[kind](sizes)
        self.bias = torch.randn(sum(sizes)) if random.random() < 0.5 else None
        # rows of a wider matrix, as a slice of one is
        self.x = torch.randn(rows, INPUTS + 3)[:, :INPUTS]
        self.norms: HeadNorms | None = None
        if norm != "none":
            spans = [self.dim] * 2 if norm == "heads" else sizes[:2]
            q_norm, k_norm = (torch.rand(span) + 0.5 for span in spans)
            self.norms = q_norm, k_norm, 1e-5
        self.cos, self.sin = angles(600, half)
        places = random.sample([(t, s) for t in range(3) for s in range(300)], rows)
        self.table_row = torch.tensor([t for t, _ in places], dtype=torch.int32)
        self.slots = torch.tensor([s for _, s in places], dtype=torch.int32)
        self.positions = torch.randint(0, 600, (rows,), dtype=torch.int32)
        self.pre_rope = form.pre_rope
        self.cache = Cache(3, 19, kv_heads, self.dim, groups, form)
        for t, s in places:
            self.cache.reserve(t, s)

    def run(
        self, index: Tensor | None = None, impl: str = "cpu", dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(queries, key pages, value pages); "steps" are the CPU's operations one by one.

        ``dtype`` is that of the rows and the pages."""
        index = torch.arange(len(self.x)) if index is None else index
        k, v = (pages.to(dtype or pages.dtype, copy=True) for pages in (self.cache.k, self.cache.v))
        x = self.x[index].to(dtype or torch.float32)
        rows = (part[index] for part in (self.positions, self.slots, self.table_row))
        args = x, self.w, self.bias, self.dim, self.norms, self.cos, self.sin, *rows
        pages = self.cache.table, k, v, not self.pre_rope
        if impl == "steps":
            return ref.qkv(*args, *pages, impl="cpu"), k, v
        return qkv(*args, *pages, impl=impl), k, v


@pytest.fixture(autouse=True)
def python_seed(seed: int) -> None:
    random.seed(seed)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_the_operations(kind: str, form: Form) -> None:
    for shape in SHAPES:
        rows, norm = random.choice([0, 1, 5, 40]), random.choice(["none", "heads", "all"])
        case = Case(kind, shape, form, rows, norm)
        for machine in machines(INTEGER_ISAS):
            parts = zip(case.run(), case.run(impl="steps"), "qkv", strict=True)
            for got, expected, name in parts:
                assert_same_bits(got, expected, f"{name}, {shape}, {norm} norms, {machine}")


def test_bits_of_many_rows() -> None:
    case = Case(random.choice([*KINDS]), SHAPES[1], random.choice(FORMS), 512, "heads")
    for machine in machines(INTEGER_ISAS):
        for got, expected in zip(case.run(), case.run(impl="steps"), strict=True):
            assert_same_bits(got, expected, machine)


@pytest.mark.parametrize("norm", ["none", "heads", "all"])
@pytest.mark.parametrize("pre_rope", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_matches_the_reference(kind: str, pre_rope: bool, norm: str) -> None:
    for shape in SHAPES:
        case = Case(kind, shape, Form(pre_rope=pre_rope), 9, norm)
        # what rounds activations to codes is defined on float32
        exact = torch.float64 if kind in ("float32", "bfloat16") else None
        expected = case.run(impl="ref", dtype=exact)
        for got, want in zip(case.run(), expected, strict=True):
            scale = float(want.nan_to_num(0).abs().max())
            assert_close(got / scale, want / scale, 2e-6, f"{shape}")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent(kind: str) -> None:
    shape, norm = random.choice(SHAPES), random.choice(["none", "heads", "all"])
    case = Case(kind, shape, random.choice(FORMS), 60, norm)
    _native.set_isa(FAST)
    expected = case.run()
    for machine in machines(INTEGER_ISAS):
        index = torch.randperm(60)
        q, k, v = case.run(index)
        assert_same_bits(q, expected[0][index], machine)
        assert_same_bits(k, expected[1], machine)
        assert_same_bits(v, expected[2], machine)
        for i in index[:4].tolist():
            assert_same_bits(case.run(torch.tensor([i]))[0][0], expected[0][i], machine)


def test_a_recorded_call_reads_what_its_arrays_hold() -> None:
    case = Case("int8", SHAPES[0], Form(), 6, "heads")
    k, v, other = case.cache.k.clone(), case.cache.v.clone(), torch.randn_like(case.x)
    rows = case.positions, case.slots, case.table_row, case.cache.table, k, v
    tape = _native.Tape()
    tape.record()
    q = qkv(case.x, case.w, case.bias, case.dim, case.norms, case.cos, case.sin, *rows)
    tape.stop()
    assert len(tape) == 1
    case.x.copy_(other)
    tape.replay()
    expected = case.run(impl="steps")
    for got, want in zip((q, k, v), expected, strict=True):
        assert_same_bits(got, want)
    case.slots[2] = 304
    with pytest.raises(ValueError, match=r"slots\[2\] is 304, but a table has 304 slots"):
        tape.replay()


@pytest.mark.parametrize("what", ["slot", "page", "position"])
def test_it_checks_before_it_writes(what: str) -> None:
    case = Case("float32", SHAPES[1], Form(), 12, "none")
    if what == "slot":
        case.slots[-1] = 19 * PAGE
    elif what == "position":
        case.positions[-1] = 600
    else:
        case.cache.table[int(case.table_row[-1]), 1, int(case.slots[-1]) // PAGE] = -1
    k, v = case.cache.k.clone(), case.cache.v.clone()
    rows = case.positions, case.slots, case.table_row, case.cache.table
    args = case.x, case.w, None, case.dim, None, case.cos, case.sin, *rows
    for impl in ("cpu", "ref"):
        with pytest.raises(ValueError, match=r"slot|position"):
            qkv(*args, case.cache.k, case.cache.v, impl=impl)
        assert_same_bits(case.cache.k, k)
        assert_same_bits(case.cache.v, v)


def test_it_refuses_what_does_not_fit() -> None:
    case = Case("float32", SHAPES[0], Form(), 5, "none")
    good = {
        "x": case.x,
        "w": case.w,
        "bias": None,
        "head_dim": 64,
        "norms": None,
        "cos": case.cos,
        "sin": case.sin,
        "positions": case.positions,
        "slots": case.slots,
        "table_row": case.table_row,
        "table": case.cache.table,
        "k_pages": case.cache.k,
        "v_pages": case.cache.v,
    }

    def refuse(error: type[Exception], match: str, **bad: object) -> None:
        with pytest.raises(error, match=match):
            qkv(**{**good, **bad})  # type: ignore[arg-type]

    weight = unpack(case.w)
    refuse(ValueError, "gate and an up half", w=pack(weight, gated=True))
    refuse(ValueError, "500 outputs, not 448 for 3 queries and 2 keys", w=pack(weight[:500]))
    refuse(ValueError, r"v_pages has shape .* not .*, 2, 16, 32\]", head_dim=32)
    refuse(ValueError, "no room for 2 keys and values", w=pack(weight[:192]))
    refuse(ValueError, r"x has shape \[5, 255\]", x=case.x[:, 1:])
    refuse(TypeError, "x is float64, not float32", x=case.x.double())
    refuse(ValueError, r"bias has shape \[511\]", bias=torch.zeros(511))
    norm = torch.ones(64)
    refuse(ValueError, "q_norm has 48 numbers", norms=(norm[:48].contiguous(), norm, 1e-6))
    refuse(TypeError, "k_norm is float64", norms=(norm, norm.double(), 1e-6))
    nothing = case.cache.v[..., :0].contiguous()
    refuse(ValueError, "no room for values", v_pages=nothing)
    refuse(ValueError, "rotates 66 of 64", cos=torch.zeros(9, 33), sin=torch.zeros(9, 33))
    refuse(TypeError, "slots is int64", slots=case.slots.long())
