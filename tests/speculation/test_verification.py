"""The way down a tree where several nodes stand for one place, and residuals at their ends."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from hasten.speculation.tree import TokenTree
from hasten.speculation.verification import descend, line, match, residual, to_weigh


def test_independent_siblings_with_one_token_are_one_place() -> None:
    tokens, parents = [9, 1, 1, 2, 3], [-1, 0, 0, 1, 2]
    chosen = {0: 1, 1: 3, 2: 3, 4: 7}
    for independent, path in ((True, [0, 2, 4]), (False, [0, 1])):
        tree = TokenTree(tokens, parents, independent=independent)
        walk = SimpleNamespace(choose=chosen.__getitem__, emit=lambda node, token: False)
        assert descend(tree, walk, match) == path  # type: ignore[arg-type]
    assert line(tree, 4) == [0, 2, 4] and line(tree, 0) == [0]


def test_auxiliary_nodes_are_no_candidates() -> None:
    tree = TokenTree([9, 1, 1], [-1, 0, 0], auxiliary=frozenset({1}))
    walk = SimpleNamespace(choose=lambda node: 1, emit=lambda node, token: False)
    assert descend(tree, walk, match) == [0, 2]  # type: ignore[arg-type]


def test_what_is_weighed() -> None:
    law = np.array([0.5, 0.5])
    tree = TokenTree([0, 1, 1, 0], [-1, 0, 1, 2], law={0: law, 1: law})
    samples, greedy = SimpleNamespace(greedy=False), SimpleNamespace(greedy=True)
    assert to_weigh(tree, samples, [1]) and to_weigh(tree, samples, [2])  # type: ignore[arg-type]
    assert not to_weigh(tree, samples, [3])  # type: ignore[arg-type]
    assert not to_weigh(tree, samples, [2, 3])  # type: ignore[arg-type]
    assert not to_weigh(tree, samples, [])  # type: ignore[arg-type]
    assert not to_weigh(tree, greedy, [1])  # type: ignore[arg-type]


def test_a_residual_is_a_law() -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    assert np.allclose(residual(p, q), [0.75, 0.25, 0])
    assert np.array_equal(residual(p, p), p), "nothing is left only by rounding"
