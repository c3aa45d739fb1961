"""Typical acceptance: its threshold, the path it takes, and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine
from hasten.models.base import Decoder
from hasten.speculation.tree import TokenTree
from hasten.speculation.verifiers.typical import Typical
from hasten.stack import Stack


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ([1.0, 0.0], 0.09),
        ([0.5, 0.5], 0.09),
        ([0.1] * 10, 0.3 / 10),
        ([0.001] * 1000, 0.3 / 1000),
    ],
)
def test_threshold(law: list[float], expected: float) -> None:
    """min(eps, delta exp(-H)); exp(H) is the number of equally likely tokens."""
    assert Typical().threshold(np.array(law)) == pytest.approx(expected, rel=0.02)


def test_threshold_by_hand() -> None:
    law = np.array([0.5, 0.3, 0.15, 0.05])
    entropy = -sum(p * math.log(p + 1e-5) for p in law.tolist())
    found = Typical(eps=1.0, delta=0.5).threshold(law)
    assert found == pytest.approx(0.5 * math.exp(-entropy), rel=1e-12)


def walked(tree: TokenTree, laws: dict[int, list[float]], last: int | None = None) -> Any:
    out: list[int] = []

    def emit(node: int, token: int) -> bool:
        assert out == tree.path(node)
        out.append(token)
        return token == last

    def ahead(node: int, tokens: list[int]) -> np.ndarray:
        assert tokens == tree.path(node)
        return np.array(laws[node])

    walk = SimpleNamespace(greedy=False, ahead=ahead, choose=lambda node: 9, emit=emit)
    return Typical().verify(tree, walk), out  # type: ignore[arg-type]


SURE = [0.0, 0.9, 0.1, 0.0]
SPLIT = [0.0, 0.3, 0.6, 0.1]


def test_the_longest_path_wins_not_the_likelier_child() -> None:
    tree = TokenTree([0, 1, 2, 1, 1], [-1, 0, 0, 2, 3])
    laws = {0: SURE, 2: SURE, 3: SURE}
    assert walked(tree, laws) == ([0, 2, 3, 4], [2, 1, 1, 9])


def test_of_equally_long_paths_the_likelier() -> None:
    tree = TokenTree([0, 1, 2, 1, 2], [-1, 0, 0, 1, 2])
    assert walked(tree, {0: SPLIT, 1: SPLIT, 2: SPLIT}) == ([0, 2, 4], [2, 2, 9])


def test_what_is_not_likely_enough_is_rejected_with_all_below_it() -> None:
    tree = TokenTree([0, 3, 1], [-1, 0, 1])
    assert walked(tree, {0: SURE, 1: SURE}) == ([0], [9])


def test_nothing_follows_an_end() -> None:
    tree = TokenTree([0, 1, 2, 1], [-1, 0, 1, 2])
    laws = {0: SPLIT, 1: SPLIT, 2: SPLIT}
    assert walked(tree, laws, last=2) == ([0, 1, 2], [1, 2])
    assert walked(tree, laws) == ([0, 1, 2, 3], [1, 2, 1, 9])


@pytest.mark.parametrize("bad", [{"eps": -0.1}, {"eps": 1.5}, {"delta": 0.0}])
def test_bad_parameters(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="need"):
        Typical(**bad)


def test_more_is_accepted_than_the_target_would_choose(tiny: Callable[..., Decoder]) -> None:
    """Through the engine, sampling with penalties: the history of paths not taken is looked at."""
    taus = []
    for verify in ("sample-match", "typical(eps=0.02,delta=0.3)"):
        engine = Engine(tiny("llama"), Stack.parse(f"draft=prompt-lookup,verify={verify}"))
        params = SamplingParams(
            max_tokens=60, temperature=1, presence_penalty=0.2, seed=3, n=4, ignore_eos=True
        )
        request = engine.add([3, 4, 5, 6] * 6, params)
        while engine.has_work:
            engine.step()
        assert all(s.finish_reason == "length" and s.error is None for s in request.sequences)
        taus.append(engine.stats.speculation.tau or 0)
    assert taus[1] > taus[0]
