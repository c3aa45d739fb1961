"""Paged attention in Triton: against the reference, and the promises about bits."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from hasten.kernels.attention import paged_attention

from .common import assert_close, assert_same_bits
from .paged import Cache, Rows, paths, random_tree
from .triton_device import DEVICE

TOLERANCE = 4e-6
"""Keys and values are exact in both types, so outputs differ by roundings of the sums only."""


@pytest.fixture(autouse=True)
def python_seed(seed: int) -> None:
    random.seed(seed)


def small_mix(
    kv_heads: int, dim: int, groups: int, dtype: torch.dtype, value_dim: int, in_keys: bool
) -> tuple[Cache, Rows]:
    """A token after 130, a chunk over a page's end, a prompt's first rows, trees over the end of a
    chunk, one with more nodes than a word of a mask has bits."""
    cache = Cache(5, 9, kv_heads, dim, groups, dtype, value_dim, in_keys)
    rows = Rows()

    def write(table: int, slots: range) -> None:
        for slot in slots:
            cache.write(table, slot, torch.randn(kv_heads, dim), torch.randn(kv_heads, value_dim))

    write(0, range(131))
    rows.add(0, 130, 130, 131)
    write(1, range(70))
    for position in (63, 64):
        rows.add(1, position, position, position + 1)
    write(2, range(2))
    for position in range(2):
        rows.add(2, position, position, position + 1)
    for table, root, nodes in ((3, 57, 80), (4, 0, 9)):
        parent = random_tree(nodes)
        write(table, range(root + nodes))
        walks = list(enumerate(paths(parent)))
        for node, path in random.sample(walks, 2) + walks[-1:]:
            bits = sum(1 << (ancestor - 1) for ancestor in path)
            rows.add(table, root + len(path), root + node, root + 1, bits)
    rows.add(4, 0, 0, 0)  # sees nothing
    return cache, rows


def attend(
    cache: Cache, rows: Rows, q: Tensor, index: Tensor | None = None, **kwargs: object
) -> tuple[Tensor, Tensor]:
    """The Triton kernel on the device, its results on the CPU."""
    if index is not None:
        q = q[index]
    tensors = [q, cache.k, cache.v, cache.table, *rows.tensors(index)]
    out, lse = paged_attention(
        *(t.to(DEVICE) for t in tensors),
        cache.dim**-0.5,
        return_lse=True,
        value_dim=cache.value_dim,
        impl="triton",
        **kwargs,
    )
    return out.cpu(), lse.cpu()


def reference(cache: Cache, rows: Rows, q: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
    out, lse = paged_attention(
        q.double(),
        cache.k,
        cache.v,
        cache.table,
        *rows.tensors(),
        cache.dim**-0.5,
        return_lse=True,
        value_dim=cache.value_dim,
        impl="ref",
        **kwargs,
    )
    return out, lse


SETTINGS = [
    {"window": None, "sinks": 0, "softcap": None},
    {"window": 20, "sinks": 4, "softcap": None},
    {"window": 70, "sinks": 0, "softcap": 5.0},
    {"window": 1, "sinks": 65, "softcap": 30.0},
]

SHAPES = [
    # query heads, KV heads, dim, head groups, dim of a value, values in keys
    (4, 2, 16, 1, 16, False),
    (6, 2, 20, 2, 35, False),
    (3, 1, 33, 1, 18, True),
    (3, 3, 8, 3, 8, False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: tuple[int, int, int, int, int, bool], dtype: torch.dtype) -> None:
    q_heads, kv_heads, dim, groups, value_dim, in_keys = shape
    cache, rows = small_mix(kv_heads, dim, groups, dtype, value_dim, in_keys)
    q = torch.randn(len(rows), q_heads, dim)
    kwargs = random.choice(SETTINGS)
    out, lse = attend(cache, rows, q, **kwargs)
    expected = reference(cache, rows, q, **kwargs)
    assert_close(out, expected[0], TOLERANCE, f"{kwargs}")
    assert_close(lse, expected[1], TOLERANCE, f"lse {kwargs}")


@pytest.mark.parametrize("setting", SETTINGS)
def test_rows_are_independent(setting: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits alone, in any batch and order, and however the rows are cut into slices."""
    from hasten.kernels.attention import triton as kernel

    dtype = random.choice([torch.float32, torch.bfloat16])
    cache, rows = small_mix(1, 12, 1, dtype, 12, False)
    q = torch.randn(len(rows), 2, 12)
    alone = [attend(cache, rows, q, torch.tensor([i]), **setting) for i in range(len(rows))]
    expected = torch.cat([a[0] for a in alone]), torch.cat([a[1] for a in alone])
    index = torch.randperm(len(rows))
    for got, want in zip(attend(cache, rows, q, index, **setting), expected, strict=True):
        assert_same_bits(got, want[index], "shuffled")
    monkeypatch.setattr(kernel, "WORKSPACE", 3 * 2 * 3 * (12 + 2) * 4)  # three rows at a time
    for got, want in zip(attend(cache, rows, q, **setting), expected, strict=True):
        assert_same_bits(got, want, "in slices")


def test_a_wider_table_changes_no_bit() -> None:
    """A step's graph is made for more blocks than a sequence has."""
    cache, rows = small_mix(1, 16, 1, torch.float32, 16, False)
    q = torch.randn(len(rows), 2, 16)
    expected = attend(cache, rows, q)
    cache.table = torch.nn.functional.pad(cache.table, (0, 21), value=-1)
    for got, want in zip(attend(cache, rows, q), expected, strict=True):
        assert_same_bits(got, want)


def test_tree_nodes_have_the_bits_of_a_chain() -> None:
    """A path read through an ancestor mask gives what the same keys give as committed ones."""
    cache = Cache(2, 8, 1, 16)
    written = [(torch.randn(1, 16), torch.randn(1, 16)) for _ in range(75)]
    parent = random_tree(12)
    root = 57
    path = max(paths(parent), key=len)
    nodes = {node: root + i + 1 for i, node in enumerate(path)}  # node -> position
    for slot in range(root + 1):
        cache.write(0, slot, *written[slot])
        cache.write(1, slot, *written[slot])
    for node in range(1, 12):
        key = written[nodes[node]] if node in nodes else (torch.randn(1, 16), torch.randn(1, 16))
        cache.write(0, root + node, *key)
    for node, position in nodes.items():
        cache.write(1, position, *written[nodes[node]])
    last = root + len(path)
    rows = Rows()
    rows.add(0, last, root + path[-1], root + 1, sum(1 << (node - 1) for node in path))
    rows.add(1, last, last, last + 1)
    out, lse = attend(cache, rows, torch.randn(1, 3, 16).expand(2, 3, 16).contiguous())
    assert_same_bits(out[0], out[1])
    assert_same_bits(lse[0], lse[1])


def test_a_missing_page_shows() -> None:
    cache, rows = small_mix(1, 16, 1, torch.float32, 16, False)
    cache.table[0, 0, 4] = -1
    out, lse = attend(cache, rows, torch.randn(len(rows), 1, 16))
    assert out[0].isnan().all()
    assert lse[0].isnan().all()
    assert out[1:].isfinite().all()


def test_bad_settings_are_refused() -> None:
    cache, rows = small_mix(1, 16, 1, torch.float32, 16, False)
    q = torch.randn(len(rows), 1, 16)
    with pytest.raises(ValueError, match="window"):
        attend(cache, rows, q, window=0)
    with pytest.raises(ValueError, match="soft cap"):
        attend(cache, rows, q, softcap=-1.0)
    with pytest.raises(ValueError, match="do not fit"):
        attend(cache, rows, q[..., :8].contiguous())
