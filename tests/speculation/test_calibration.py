"""Calibrated trees: counts, the best tree against all trees, and files that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.methods import MethodError
from hasten.speculation.calibration import (
    RankCounts,
    Ranks,
    best_tree,
    expected_gain,
    load_tree,
    save_tree,
)
from hasten.speculation.drafters.token_recycling import TEMPLATE, WIDTH
from hasten.stack import Stack


def test_counts_are_conditional_on_the_path() -> None:
    counts = RankCounts(3, 4)
    for ranks in ([0, 2, None], [0, None], [None], [1, 2, 0], [0]):
        counts.add(ranks)
    assert counts.reached.tolist() == [5, 3, 2]
    assert counts.accuracy.tolist() == [[3 / 5, 1 / 5, 0, 0], [0, 0, 2 / 3, 0], [1 / 2, 0, 0, 0]]


def all_trees(depth: int, width: int, nodes: int) -> Iterator[frozenset[Ranks]]:
    """Every set of so many nodes that holds the parents of each."""
    every = [path for d in range(1, depth + 1) for path in product(range(width), repeat=d)]
    trees: set[frozenset[Ranks]] = {frozenset()}
    for _ in range(nodes):
        trees = {
            tree | {path}
            for tree in trees
            for path in every
            if path not in tree and (len(path) == 1 or path[:-1] in tree)
        }
    yield from trees


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("depth", "width", "nodes"), [(1, 4, 3), (3, 2, 6), (3, 3, 4), (4, 2, 5)])
def test_no_tree_gains_more(depth: int, width: int, nodes: int, seed: int) -> None:
    rng = np.random.default_rng([seed, depth, width])
    accuracy = rng.dirichlet(np.full(width + 1, 0.7), size=depth)[:, :width]
    for count in range(1, nodes + 1):
        found = best_tree(accuracy, count)
        best = max(expected_gain(accuracy, list(tree)) for tree in all_trees(depth, width, count))
        assert len(found) == count
        assert abs(expected_gain(accuracy, found) - best) < 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_any_beginning_is_a_tree_and_the_best_of_its_size(seed: int) -> None:
    accuracy = np.random.default_rng(seed).dirichlet(np.full(9, 0.4), size=6)[:, :8]
    whole = best_tree(accuracy, 200)
    assert len(set(whole)) == 200
    for place, path in enumerate(whole):
        assert path[:-1] in [(), *whole[:place]]
    for count in (1, 7, 60):
        assert best_tree(accuracy, count) == whole[:count]


def test_certain_nodes_and_useless_ones() -> None:
    chain = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert best_tree(chain, 9) == [(0,), (0, 0)], "nothing hangs below a node that is never right"
    assert best_tree(np.zeros((2, 2)), 3) == []
    assert best_tree(np.full((2, 2), 0.25), 3) == [(0,), (1,), (0, 0)], "ties: near and low first"


@pytest.mark.parametrize("seed", range(5))
def test_at_least_the_default_tree_by_the_same_table(seed: int) -> None:
    accuracy = np.random.default_rng(seed).dirichlet(np.full(WIDTH + 1, 0.5), size=7)[:, :WIDTH]
    for nodes in (1, 8, 24, 80):
        ours = expected_gain(accuracy, best_tree(accuracy, nodes))
        assert ours >= expected_gain(accuracy, TEMPLATE[:nodes]) - 1e-12


def test_gain_is_what_a_walk_through_the_tree_accepts() -> None:
    rng = np.random.default_rng(3)
    accuracy = np.array([[0.5, 0.2, 0.1], [0.6, 0.1, 0.1], [0.3, 0.3, 0.2]])
    tree = set(best_tree(accuracy, 9))
    accepted, walks = 0, 40_000
    for _ in range(walks):
        path: Ranks = ()
        while len(path) < 3:
            left = 1 - accuracy[len(path)].sum()
            path += (int(rng.choice(4, p=[*accuracy[len(path)], left])),)
            if path not in tree:
                break
            accepted += 1
    assert abs(accepted / walks - expected_gain(accuracy, list(tree))) < 0.02


def written(folder: Path, **changes: Any) -> Path:
    """A tree file with some entries changed."""
    counts = RankCounts(3, WIDTH)
    for ranks in ([0, 0, 1], [0, None], [2, 0]):
        counts.add(ranks)
    path = folder / "tree.json"
    save_tree(path, "token-recycling", best_tree(counts.accuracy, 6), counts)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def test_a_file_gives_back_the_tree(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert load_tree(path, "token-recycling", WIDTH) == (
        *((0,), (0, 0), (0, 0, 1)),
        *((2,), (2, 0), (2, 0, 1)),
    )
    assert list(tmp_path.iterdir()) == [path], "no half-written file beside it"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "other"}, "is no tree file"),
        ({"draft": "medusa"}, "was made for draft=medusa"),
        ({"nodes": []}, "it has no list of nodes"),
        ({"nodes": "[[0]]"}, "it has no list of nodes"),
        ({"nodes": [[0], [0, "1"]]}, '[0, "1"] is no list of ranks'),
        ({"nodes": [[0], [True]]}, "[true] is no list of ranks"),
        ({"nodes": [[]]}, "[] is no list of ranks"),
        ({"nodes": [[8]]}, "node [8] has a rank outside 0..7"),
        ({"nodes": [[0], [-1]]}, "node [-1] has a rank outside 0..7"),
        ({"nodes": [[0], [1], [0]]}, "node [0] is there twice"),
        ({"nodes": [[0], [1, 0], [1]]}, "node [1, 0] comes before its parent"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError) as error:
        load_tree(written(tmp_path, **changes), "token-recycling", WIDTH)
    assert words in str(error.value) and "hasten train tree" in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_not_json(tmp_path: Path) -> None:
    for content in (b"{", b"\xff\xfe", b"[1]", b""):
        (tmp_path / "t").write_bytes(content)
        with pytest.raises(MethodError, match="hasten train tree"):
            load_tree(tmp_path / "t", "token-recycling", WIDTH)
    with pytest.raises(MethodError, match="there is no such file"):
        load_tree(tmp_path / "none", "token-recycling", WIDTH)


def test_the_file_is_read_when_an_engine_starts(tmp_path: Path) -> None:
    stack = Stack.parse(f"draft=token-recycling(tree={tmp_path / 'none'})")
    with pytest.raises(MethodError, match="no such file"):
        stack["draft"].start(None)
