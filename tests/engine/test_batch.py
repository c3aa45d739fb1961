"""Building a batch, against one row at a time."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.engine.batch import WORD, Batch, Segment
from hasten.speculation.tree import TokenTree


def random_tree(rng: random.Random, root: int, kind: str) -> TokenTree:
    if kind == "chain":
        return TokenTree.chain([root, *(rng.randrange(50) for _ in range(rng.randint(0, 70)))])
    size = rng.choice([1, 2, 5, 20, 65, 66, 140])
    tokens, parents, depth = [root], [-1], [0]
    while len(tokens) < size:
        lowest = depth.index(max(0, depth[-1] - 1))
        parent = rng.randrange(lowest, len(tokens))
        tokens.append(rng.randrange(50))
        parents.append(parent)
        depth.append(depth[parent] + 1)
    return TokenTree(tokens, parents)


def random_segment(rng: random.Random, table_row: int) -> Segment:
    tokens = [rng.randrange(50) for _ in range(rng.choice([1, 1, 1, 2, 19]))]
    kind = rng.choice(["none", "none", "chain", "tree"])
    tree = None if kind == "none" else random_tree(rng, tokens[-1], kind)
    wanted = rng.choice(["last", "all", "none" if tree is None else "last"])
    return Segment(table_row, rng.choice([0, 5, 130]), tokens, tree, wanted)


def visible(batch: Batch, row: int) -> set[int]:
    """Slots that a row sees, read from the arrays as their description says."""
    base = int(batch.base[row])
    words = [int(word) for word in batch.mask[row]]
    bits = sum(word << (WORD * i) for i, word in enumerate(words))
    return set(range(base)) | {base + j for j in range(bits.bit_length()) if bits >> j & 1}


def by_hand(segment: Segment) -> list[dict[str, Any]]:
    """For every row what it must be."""
    rows = []
    known = len(segment.tokens)
    for i, token in enumerate(segment.tokens):
        at = segment.start + i
        sees = set(range(at + 1))
        last = segment.wanted == "all" or (segment.wanted == "last" and i == known - 1)
        rows.append({"token": token, "position": at, "slot": at, "sees": sees, "wanted": last})
    tree = segment.tree
    for node in range(1, 0 if tree is None else len(tree)):
        path, step = [], node
        while step > 0:
            path.append(step)
            step = tree.parent[step]
        root = segment.start + known - 1
        rows.append(
            {
                "token": tree.token[node],
                "position": root + len(path),
                "slot": root + node,
                "sees": set(range(root + 1)) | {root + n for n in path},
                "wanted": True,
            }
        )
    return rows


@given(st.integers(0, 10**6), st.integers(0, 6))
def test_every_row(seed: int, count: int) -> None:
    rng = random.Random(seed)
    segments = [random_segment(rng, table_row) for table_row in rng.sample(range(20), count)]
    tables = [np.zeros((20, 1, 4), np.int32)]
    batch = Batch.build(segments, tables)
    expected = [by_hand(segment) for segment in segments]
    flat = [row for rows in expected for row in rows]
    assert batch.num_rows == len(flat) == sum(s.num_rows for s in segments)
    assert batch.tokens.tolist() == [row["token"] for row in flat]
    assert batch.positions.tolist() == [row["position"] for row in flat]
    assert batch.slots.tolist() == [row["slot"] for row in flat]
    assert [visible(batch, row) for row in range(len(flat))] == [row["sees"] for row in flat]
    assert batch.wanted.tolist() == [i for i, row in enumerate(flat) if row["wanted"]]
    ends = np.cumsum([0, *(len(rows) for rows in expected)])
    assert batch.segment_rows.tolist() == ends.tolist()
    wanted = np.cumsum([0, *(sum(row["wanted"] for row in rows) for rows in expected)])
    assert batch.segment_wanted.tolist() == wanted.tolist()
    for segment, start, end in zip(segments, ends, ends[1:], strict=False):
        assert set(batch.table_row[start:end].tolist()) <= {segment.table_row}
    # the visible slots beyond the base are a path that ends at the row
    for row in range(len(flat)):
        bits = sum(int(word).bit_count() for word in batch.mask[row])
        if bits:
            first = batch.positions[row] - bits + 1
            assert first >= batch.base[row] - 1 and batch.slots[row] in visible(batch, row)
    assert batch.tables is tables


def test_types() -> None:
    tree = TokenTree([3, 4, 5], [-1, 0, 0])
    batch = Batch.build([Segment(2, 7, [3], tree)], [])
    kinds = {name: getattr(batch, name).dtype.name for name in Batch.__slots__ if name != "tables"}
    assert kinds == {
        **dict.fromkeys(["tokens", "wanted", "embedded"], "int64"),
        **dict.fromkeys(["positions", "slots", "table_row", "base"], "int32"),
        **dict.fromkeys(["segment_rows", "segment_wanted"], "int32"),
        "mask": "uint64",
    }
    assert batch.mask.shape == (3, 1)


@pytest.mark.parametrize(("nodes", "words"), [(1, 0), (2, 0), (3, 1), (65, 1), (66, 2), (130, 3)])
def test_width_of_the_mask(nodes: int, words: int) -> None:
    """All nodes are children of the root; no mask at all where nothing branches."""
    tree = TokenTree(list(range(nodes)), [-1] + [0] * (nodes - 1))
    assert Batch.build([Segment(0, 0, [0], tree)], []).mask.shape == (nodes, words)


def test_nothing() -> None:
    batch = Batch.build([], [])
    assert batch.num_rows == 0 and batch.segment_rows.tolist() == [0] and batch.mask.shape == (0, 0)
