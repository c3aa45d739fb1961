"""RSD: siblings and sequences without replacement."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hasten.decoding.sampling import gumbel
from hasten.methods import MethodError
from hasten.models.base import Decoder
from hasten.speculation.drafters.rsd import shift_maximum
from hasten.stack import Stack
from tests.speculation.examples import tiny_draft, tiny_target
from tests.speculation.tree_checks import check_trees, same_as_alone, trees_of


@pytest.mark.parametrize("tree", ["beam", "constant", "independent"])
@pytest.mark.parametrize(("verify", "drawn"), [("sample-match", False), ("recursive", True)])
def test_trees(tmp_path: Path, tree: str, verify: str, drawn: bool) -> None:
    draft = f"rsd(path={tiny_draft(tmp_path)},tree={tree},width=3,depth=3)"
    seen = trees_of(tmp_path, draft, verify, temperature=1.0, budget=9)
    check_trees(seen, drawn=drawn)
    assert all(len(t.children(0)) <= 3 and max(t.depth) <= 3 for _, t, _ in seen)
    assert any(len(t.children(0)) == 3 for _, t, _ in seen)
    if tree == "constant":
        assert all(len(t.children(n)) <= 1 for _, t, _ in seen for n in range(1, len(t)))


@pytest.mark.parametrize("tree", ["beam", "constant", "independent"])
def test_the_same_as_alone(tiny: Callable[..., Decoder], tmp_path: Path, tree: str) -> None:
    draft = f"rsd(path={tiny_draft(tmp_path)},tree={tree},width=3,depth=3)"
    same_as_alone(tiny_target(tiny), draft, seed=5)


def test_conditional_noise_has_the_given_maximum_and_the_right_law() -> None:
    """Against the definition: noise drawn until its maximum falls close to the given value."""
    rng = np.random.default_rng(0)
    scores = np.log([0.5, 0.3, 0.2])
    shifted = np.array([shift_maximum(scores + gumbel(rng, 3), 0.7) for _ in range(20_000)])
    assert np.allclose(shifted.max(axis=1), 0.7, atol=1e-12)
    raw = scores + np.array([gumbel(rng, 3) for _ in range(400_000)])
    near = raw[np.abs(raw.max(axis=1) - 0.7) < 0.05]
    assert len(near) > 4000
    for token in range(3):
        assert np.isclose((shifted.argmax(1) == token).mean(), np.exp(scores[token]), atol=0.015)
        for q in (0.1, 0.5, 0.9):
            assert np.isclose(
                np.quantile(shifted[:, token], q), np.quantile(near[:, token], q), atol=0.12
            )


def test_siblings_come_in_the_order_of_draws_without_replacement() -> None:
    """The top two of log q + Gumbel are a draw without replacement, in order."""
    rng = np.random.default_rng(1)
    q = np.array([0.1, 0.3, 0.2, 0.4])
    seen = Counter(
        tuple(np.argsort(-(np.log(q) + gumbel(rng, 4)))[:2].tolist()) for _ in range(40_000)
    )
    for first, second in itertools.permutations(range(4), 2):
        expected = q[first] * q[second] / (1 - q[first])
        assert np.isclose(seen[first, second] / 40_000, expected, atol=0.01)


def test_values_are_checked() -> None:
    with pytest.raises(MethodError, match="expected beam, constant or independent"):
        Stack.parse("draft=rsd(tree=star)")
    with pytest.raises(MethodError, match="at least 1"):
        Stack.parse("draft=rsd(width=0)")
