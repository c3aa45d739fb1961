"""Paged attention: against the reference, and the promises about bits."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from hasten import _native
from hasten.kernels.attention import paged_attention
from hasten.kernels.rope import append

from .common import FAST, ISAS, assert_close, assert_same_bits, machines
from .paged import FORMS, PAGE, Cache, Form, Rows, angles, page_tables, paths, random_tree

# Keys and values are exact in both types, so the output differs by roundings of the sums only.
TOLERANCE = 4e-6


@pytest.fixture(autouse=True)
def python_seed(seed: int) -> None:
    random.seed(seed)


def new_keys(heads: int, dim: int, value_dim: int | None = None) -> tuple[Tensor, Tensor]:
    return torch.randn(heads, dim), torch.randn(heads, value_dim or dim)


def ragged_mix(
    kv_heads: int,
    dim: int,
    groups: int,
    form: Form,
    nodes: int = 90,
    value_dim: int | None = None,
    in_keys: bool = False,
) -> tuple[Cache, Rows]:
    """A one-token query, a short chunk, a long chunk, two trees; unread slots hold NaN."""
    cache = Cache(5, 16, kv_heads, dim, groups, form, value_dim, in_keys)
    dims = kv_heads, dim, cache.value_dim
    rows = Rows()
    for slot in range(131):  # one token after 130
        cache.write(0, slot, *new_keys(*dims))
    rows.add(0, 130, 130, 131)
    for slot in range(75):  # a chunk of 5 that crosses a page
        cache.write(1, slot, *new_keys(*dims))
    for position in range(62, 67):
        rows.add(1, position, position, position + 1)
    for slot in range(70):  # a prompt from its start
        cache.write(2, slot, *new_keys(*dims))
        rows.add(2, slot, slot, slot + 1)
    # trees: one after 57 positions (its paths cross a chunk), one from the very first token
    for table, root, size in ((3, 57, nodes), (4, 0, 20)):
        parent = random_tree(size)
        for slot in range(root + size):
            cache.write(table, slot, *new_keys(*dims))
        for node, path in enumerate(paths(parent)):
            bits = sum(1 << (ancestor - 1) for ancestor in path)
            rows.add(table, root + len(path), root + node, root + 1, bits)
    rows.add(4, 0, 0, 0)  # sees nothing
    return cache, rows


SETTINGS = [
    # window, sinks, softcap
    (None, 0, None),
    (20, 4, None),
    (70, 0, 5.0),
    (1, 0, None),
    (33, 65, 30.0),
]


def attend(
    cache: Cache, rows: Rows, q: Tensor, index: Tensor | None = None, **kwargs: object
) -> tuple[Tensor, Tensor]:
    scale = cache.dim**-0.5
    if index is not None:
        q = q[index]
    settings = {"window": None, "sinks": 0, "softcap": None, **kwargs}
    settings["value_dim"], settings["rope"] = cache.value_dim, cache.rope
    result = paged_attention(
        q, cache.k, cache.v, cache.table, *rows.tensors(index), scale, return_lse=True, **settings
    )
    return result[0], result[1]


SHAPES = [
    # query heads, KV heads, dim, head groups, dim of a value, values in keys
    (4, 2, 64, 1, 64, False),
    (6, 2, 20, 2, 20, False),
    (3, 3, 33, 3, 33, False),
    (8, 1, 16, 1, 16, False),
    (4, 4, 128, 2, 128, False),
    (20, 1, 48, 1, 48, False),  # more query heads than a tile
    (6, 2, 20, 2, 35, False),
    (4, 2, 48, 1, 7, False),
    (20, 1, 42, 1, 32, True),
    (6, 2, 21, 2, 18, True),
    (3, 1, 33, 1, 33, True),
    (5, 1, 80, 1, 80, False),
    (3, 1, 96, 1, 96, False),
    (2, 2, 192, 1, 128, False),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: tuple[int, int, int, int, int, bool], form: Form) -> None:
    q_heads, kv_heads, dim, groups, value_dim, in_keys = shape
    cache, rows = ragged_mix(kv_heads, dim, groups, form, value_dim=value_dim, in_keys=in_keys)
    q = torch.randn(len(rows), q_heads, dim)
    some = torch.randperm(len(rows))[:25]  # the reference is slow
    for window, sinks, softcap in random.sample(SETTINGS, 2):
        kwargs = {"window": window, "sinks": sinks, "softcap": softcap}
        out, lse = attend(cache, rows, q, **kwargs)
        expected = attend(cache, rows, q.double(), some, impl="ref", **kwargs)
        assert_close(out[some], expected[0], TOLERANCE, f"{kwargs}")
        assert_close(lse[some], expected[1], TOLERANCE, f"lse {kwargs}")


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "shape", [(6, 2, 20, 2, 20, False), (2, 2, 64, 1, 37, False), (18, 1, 26, 1, 20, True)]
)
def test_rows_are_independent(
    shape: tuple[int, int, int, int, int, bool], setting: tuple[int | None, int, float | None]
) -> None:
    """The same bits alone, in any batch and order, with any threads and instruction set."""
    q_heads, kv_heads, dim, groups, value_dim, in_keys = shape
    window, sinks, softcap = setting
    kwargs = {"window": window, "sinks": sinks, "softcap": softcap}
    form = random.choice(FORMS)
    cache, rows = ragged_mix(kv_heads, dim, groups, form, value_dim=value_dim, in_keys=in_keys)
    q = torch.randn(len(rows), q_heads, dim)
    alone = [attend(cache, rows, q, torch.tensor([i]), **kwargs) for i in range(len(rows))]
    expected = torch.cat([a[0] for a in alone]), torch.cat([a[1] for a in alone])
    for machine in machines():
        for _ in range(2):
            index = torch.randperm(len(rows))[: random.randint(1, len(rows))]
            if random.random() < 0.5:
                index = index.sort().values  # neighbours share tiles
            for got, want in zip(attend(cache, rows, q, index, **kwargs), expected, strict=True):
                assert_same_bits(got, want[index], machine)
        for got, want in zip(attend(cache, rows, q, **kwargs), expected, strict=True):
            assert_same_bits(got, want, machine)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[-1]])
def test_values_in_keys_have_the_bits_of_values_in_pages(
    shape: tuple[int, int, int, int, int, bool], form: Form
) -> None:
    """Committed keys, tree nodes, windows: where a value is read from changes nothing."""
    q_heads, kv_heads, dim, groups, value_dim, in_keys = shape
    cache, rows = ragged_mix(kv_heads, dim, groups, form, value_dim=value_dim, in_keys=in_keys)
    twin = cache.with_value_pages()
    q = torch.randn(len(rows), q_heads, dim)
    for window, sinks, softcap in SETTINGS:
        kwargs = {"window": window, "sinks": sinks, "softcap": softcap}
        _native.set_isa(FAST)
        expected = attend(twin, rows, q, **kwargs)
        for machine in machines(threads=(2,)):
            for got, want in zip(attend(cache, rows, q, **kwargs), expected, strict=True):
                assert_same_bits(got, want, f"{machine} {kwargs}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("nodes", [2, 17, 65, 140])
@pytest.mark.parametrize("root", [0, 15, 60, 130])
def test_tree_rows_equal_the_causal_rows_of_their_paths(root: int, nodes: int, isa: str) -> None:
    """A node's key has the same bits in its tree slot as in the slot of its position."""
    q_heads, kv_heads, dim = 6, 2, 20
    groups, form = random.choice([1, 2]), random.choice(FORMS)
    parent = random_tree(nodes)
    node_paths = paths(parent)
    blocks = (root + nodes) // PAGE + 1
    cache = Cache(nodes + 1, blocks, kv_heads, dim, groups, form)
    past = [new_keys(kv_heads, dim) for _ in range(root)]
    node_keys = [new_keys(kv_heads, dim) for _ in range(nodes)]
    tree, plain = Rows(), Rows()
    for slot, keys in enumerate(past + node_keys):
        cache.write(nodes, slot, *keys)
    for node, path in enumerate(node_paths):
        bits = sum(1 << (ancestor - 1) for ancestor in path)
        tree.add(nodes, root + len(path), root + node, root + 1, bits)
        for slot, keys in enumerate(past + [node_keys[i] for i in [0, *path]]):
            cache.write(node, slot, *keys)
        plain.add(node, root + len(path), root + len(path), root + len(path) + 1)
    q = torch.randn(nodes, q_heads, dim)
    for window, sinks, softcap in SETTINGS:
        kwargs = {"window": window, "sinks": sinks, "softcap": softcap}
        _native.set_isa(isa)
        got = attend(cache, tree, q, **kwargs)
        _native.set_isa(FAST)
        want = attend(cache, plain, q, **kwargs)
        assert_same_bits(got[0], want[0], f"{kwargs}")
        assert_same_bits(got[1], want[1], f"lse {kwargs}")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_chunk_equals_its_rows_one_step_at_a_time(form: Form) -> None:
    """While later keys do not exist yet (NaN) and once they do."""
    cache, q = Cache(1, 9, 2, 32, form=form), torch.randn(140, 4, 32)
    single = []
    rows = Rows()
    for position in range(140):
        cache.write(0, position, *new_keys(2, 32))
        rows.add(0, position, position, position + 1)
        single.append(attend(cache, rows, q, torch.tensor([position]))[0])
    assert_same_bits(attend(cache, rows, q)[0], torch.cat(single))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_chunks_shared_out_to_threads(form: Form) -> None:
    """A lone row, a tree and a row with a window: any thread count gives the bits of one thread."""
    kv_heads, dim, length = random.choice([1, 3]), 24, random.randint(500, 760)
    cache, rows = Cache(1, 50, kv_heads, dim, form=form), Rows()
    parent = random_tree(9)
    for slot in range(length + 9):
        cache.write(0, slot, *new_keys(kv_heads, dim))
    for node, path in enumerate(paths(parent)):
        bits = sum(1 << (ancestor - 1) for ancestor in path)
        rows.add(0, length + len(path), length + node, length + 1, bits)
    q = torch.randn(9, 2 * kv_heads, dim)
    for index in (torch.tensor([0]), torch.tensor([8]), torch.arange(9)):
        for window, sinks in ((None, 0), (random.randint(1, 400), 5)):
            _native.set_num_threads(1)
            expected = attend(cache, rows, q, index, window=window, sinks=sinks)
            for machine in machines((FAST,), threads=(2, 3, 5, 16)):
                got = attend(cache, rows, q, index, window=window, sinks=sinks)
                assert_same_bits(got[0], expected[0], machine)
                assert_same_bits(got[1], expected[1], machine)
    out, _ = attend(cache, rows, q)
    assert_close(out, attend(cache, rows, q.double(), impl="ref")[0], TOLERANCE)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_row_among_256(form: Form) -> None:
    """Decodes of many sequences, chunks and trees in one call."""
    cache, rows = Cache(24, 8, 2, 16, form=form), Rows()
    for table in range(24):
        for slot in range(125):
            cache.write(table, slot, *new_keys(2, 16))
        for position in random.sample(range(100), 10):
            rows.add(table, position, position, position + 1)
    parent = random_tree(25)
    for node, path in enumerate(paths(parent)[:16]):
        bits = sum(1 << (ancestor - 1) for ancestor in path)
        rows.add(23, 100 + len(path), 100 + node, 101, bits)
    q = torch.randn(len(rows), 4, 16)
    assert len(rows) == 256
    whole = attend(cache, rows, q)
    for i in (0, 255, *random.sample(range(256), 10)):
        alone = attend(cache, rows, q, torch.tensor([i]))
        assert_same_bits(alone[0][0], whole[0][i])
        assert_same_bits(alone[1][0], whole[1][i])
    for count in (2, 3, 17, 100):
        index = torch.randperm(256)[:count]
        assert_same_bits(attend(cache, rows, q, index)[0], whole[0][index])


@pytest.mark.parametrize("half", [0, 5, 10])
def test_float32_keys_before_the_rotation_give_the_bits_of_rotated_keys(half: int) -> None:
    """Appended by the kernel both ways; committed keys, a tree that crosses a chunk."""
    root, nodes, dim = 57, 20, 20
    parent, rows = random_tree(nodes), Rows()
    for position in range(root):
        rows.add(0, position, position, position + 1)
    for node, path in enumerate(paths(parent)):
        bits = sum(1 << (ancestor - 1) for ancestor in path)
        rows.add(0, root + len(path), root + node, root + 1, bits)
    cos, sin = angles(96, half)
    k, v = torch.randn(len(rows), 2, dim), torch.randn(len(rows), 2, dim)
    results = []
    for machine in machines(threads=(2,)):
        for form in (Form(), Form(pre_rope=True)):
            cache, q = Cache(1, 6, 2, dim, form=form), torch.ones(len(rows), 4, dim)
            for slot in range(len(rows)):
                cache.reserve(0, slot)
            table_row, positions, _, _ = rows.tensors()
            slots = torch.tensor(rows.slot, dtype=torch.int32)
            where = positions, slots, table_row, cache.table
            append(q, k, v, cos, sin, *where, cache.k, cache.v, not form.pre_rope)
            if form.pre_rope:
                cache.rope = page_tables(cos, sin)
            results.append((attend(cache, rows, q), f"{machine} {form}"))
    for got, what in results[1:]:
        assert_same_bits(got[0], results[0][0][0], what)
        assert_same_bits(got[1], results[0][0][1], what)


def test_where_pages_lie_does_not_matter() -> None:
    keys = [new_keys(2, 24) for _ in range(100)]
    results = []
    for _ in range(2):
        cache, rows = Cache(3, 7, 2, 24, groups=2), Rows()
        table = random.randrange(3)
        for slot, (k, v) in enumerate(keys):
            cache.write(table, slot, k, v)
        rows.add(table, 99, 99, 100)
        results.append((cache, rows))
    q = torch.randn(1, 2, 24)
    assert_same_bits(attend(*results[0], q)[0], attend(*results[1], q)[0])


@pytest.mark.parametrize("setting", [(20, 0), (20, 4), (1, 0), (64, 17)])
def test_pages_without_a_visible_key_are_never_touched(setting: tuple[int, int]) -> None:
    """Blocks outside of window and sinks may be gone from the table."""
    window, sinks = setting
    cache, rows = Cache(1, 20, 1, 16), Rows()
    position = random.randint(150, 300)
    for slot in range(position + 1):
        cache.write(0, slot, *new_keys(1, 16))
    rows.add(0, position, position, position + 1)
    q = torch.randn(1, 2, 16)
    expected = attend(cache, rows, q, window=window, sinks=sinks)
    for block in range(20):
        positions = range(block * PAGE, (block + 1) * PAGE)
        if not any(p < sinks or position - window < p <= position for p in positions):
            cache.table[0, 0, block] = random.choice([-1, 10**9])
    got = attend(cache, rows, q, window=window, sinks=sinks)
    assert_same_bits(got[0], expected[0])
    assert_same_bits(got[1], expected[1])


def test_a_row_that_sees_nothing_gives_zero() -> None:
    cache, rows = Cache(1, 2, 2, 16), Rows()
    rows.add(0, 0, 0, 0)
    for machine in machines(threads=(1,)):
        out, lse = attend(cache, rows, torch.randn(1, 2, 16))
        assert (out == 0).all(), machine
        assert (lse == -math.inf).all(), machine


def test_rows_that_see_keys_after_their_own() -> None:
    """A bidirectional block: base beyond the row's own position."""
    cache, rows = Cache(1, 6, 2, 16), Rows()
    for slot in range(90):
        cache.write(0, slot, *new_keys(2, 16))
    for position in range(58, 90):
        rows.add(0, position, position, 90)
    q = torch.randn(32, 2, 16)
    out, lse = attend(cache, rows, q)
    expected = attend(cache, rows, q.double(), impl="ref")
    assert_close(out, expected[0], TOLERANCE)
    assert_close(lse, expected[1], TOLERANCE)


def test_extreme_scores() -> None:
    """Scores of +-1e4 neither overflow nor vanish; a NaN key spoils its readers only."""
    cache, rows = Cache(2, 6, 1, 16), Rows()
    for slot in range(80):
        k, v = new_keys(1, 16)
        cache.write(0, slot, k * 3e3, v)
        cache.write(1, slot, k * torch.nan if slot == 70 else k, v)
    rows.add(0, 79, 79, 80)
    rows.add(1, 70, 70, 70)
    rows.add(1, 71, 71, 71)
    q = torch.randn(3, 1, 16) * 4
    out, lse = attend(cache, rows, q)
    expected = attend(cache, rows, q.double(), impl="ref")
    assert_close(out[:2], expected[0][:2], 1e-3)  # scores of 1e4 carry errors of 1e-3
    assert_close(lse[:2], expected[1][:2], TOLERANCE)
    assert out[2].isnan().all() and lse[2].isnan().all()


def test_strided_queries() -> None:
    cache, rows = ragged_mix(2, 32, 1, Form(), nodes=5)
    fused = torch.randn(len(rows), 8 * 32)
    view = fused[:, : 4 * 32].view(-1, 4, 32)
    assert_same_bits(attend(cache, rows, view)[0], attend(cache, rows, view.contiguous())[0])


def test_no_rows() -> None:
    cache = Cache(1, 2, 2, 16)
    none = torch.zeros(0, dtype=torch.int32)
    mask = torch.zeros(0, 0, dtype=torch.uint64)
    out = paged_attention(
        torch.zeros(0, 2, 16), cache.k, cache.v, cache.table, none, none, none, mask, 1.0
    )
    assert isinstance(out, Tensor) and out.shape == (0, 2, 16)


def test_refuses_what_does_not_fit() -> None:
    cache, rows = Cache(1, 2, 2, 16), Rows()
    for slot in range(20):
        cache.write(0, slot, *new_keys(2, 16))
    rows.add(0, 19, 19, 20)
    table_row, positions, base, mask = rows.tensors()
    good = {
        "q": torch.randn(1, 4, 16),
        "k_pages": cache.k,
        "v_pages": cache.v,
        "table": cache.table,
        "table_row": table_row,
        "positions": positions,
        "base": base,
        "mask": mask,
        "scale": 0.25,
    }
    paged_attention(**good)

    def refuse(error: type[Exception], match: str, **bad: object) -> None:
        with pytest.raises(error, match=match):
            paged_attention(**{**good, **bad})

    refuse(ValueError, "5 heads, no multiple of the 2 KV heads", q=torch.randn(1, 5, 16))
    refuse(ValueError, r"q has shape \[1, 4, 15\]", q=torch.randn(1, 4, 15))
    refuse(TypeError, "q is bfloat16", q=torch.randn(1, 4, 16).bfloat16())
    refuse(TypeError, "v_pages is bfloat16, not float32", v_pages=cache.v.bfloat16())
    refuse(TypeError, "k_pages is float16", k_pages=cache.k.half(), v_pages=cache.v.half())
    refuse(ValueError, "v_pages has shape", v_pages=cache.v[..., :8].contiguous())
    refuse(ValueError, "v_pages has shape", value_dim=17)
    nothing = cache.v[..., :0].contiguous()
    refuse(ValueError, "cannot hold values of 17", v_pages=nothing, value_dim=17)
    refuse(ValueError, "k_pages is not contiguous", k_pages=cache.k.transpose(0, 1))
    refuse(TypeError, "table is int64", table=cache.table.long())
    refuse(TypeError, "positions is int64", positions=positions.long())
    refuse(ValueError, r"base has shape \[2\]", base=torch.zeros(2, dtype=torch.int32))
    refuse(TypeError, "mask is int64", mask=mask.view(torch.int64))
    refuse(ValueError, "table has 32 slots", base=torch.tensor([33], dtype=torch.int32))
    refuse(ValueError, "1 tables", table_row=torch.tensor([1], dtype=torch.int32))
    refuse(ValueError, "window", window=0)
    refuse(ValueError, "soft cap", softcap=-1.0)
    far = torch.tensor([[1 << 12]]).view(torch.uint64)
    refuse(ValueError, "reaches slot 32", mask=far)
    two = torch.tensor([[3]]).view(torch.uint64)
    refuse(ValueError, "would begin before its base 20", mask=two)
    cos, sin = page_tables(*angles(16, 8))
    refuse(ValueError, "sees position 19, but cos has angles of 16", rope=(cos, sin))
    refuse(ValueError, r"sin has shape \[1, 4, 16\]", rope=(cos, sin[:, :4].contiguous()))
    wide = page_tables(*angles(32, 9))
    refuse(ValueError, "rotates 18 of 16 dimensions", rope=wide)
    refuse(TypeError, "k_pages is float16, not float32, bfloat16 or int8", k_pages=cache.k.half())
    codes = torch.zeros(len(cache.k), 2, 7, PAGE, dtype=torch.int8)
    refuse(ValueError, "no room for 8 rows of scales", k_pages=codes)
    missing = cache.table.clone()
    for page in (-1, len(cache.k)):
        missing[0, 0, 1] = page
        refuse(ValueError, "block 1 of table 0", table=missing)
        refuse(ValueError, "no valid page", table=missing, impl="ref")
