"""Siblings in turn: how often one is accepted. Its law: test_losslessness.py."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from hasten.speculation.tree import TokenTree
from hasten.speculation.verifiers.recursive import Recursive, without
from hasten.speculation.verifiers.sample_match import SampleMatch
from tests.speculation.verifiers.harness import Markov, acceptance, groups, siblings

P, Q = Markov.constant([0.5, 0.3, 0.15, 0.05]), Markov.constant([0.1, 0.3, 0.2, 0.4])
HISTORY = [0, 0]


@pytest.mark.parametrize(("k", "expected"), [(1, 0.6), (2, 0.665), (3, 0.762), (4, 1.0)])
def test_siblings_without_replacement(k: int, expected: float) -> None:
    found = acceptance(Recursive().verify, siblings(Q, [k]), P, HISTORY)
    assert found == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("k", "expected"), [(1, 0.6), (2, 0.640), (4, 0.708)])
def test_independent_siblings(k: int, expected: float) -> None:
    found = acceptance(Recursive().verify, groups(Q, [k]), P, HISTORY)
    bound = np.minimum(P.law(HISTORY), 1 - (1 - Q.law(HISTORY)) ** k).sum()
    assert found == pytest.approx(expected, abs=5e-4) and found <= bound + 1e-12


def test_chosen_candidates_are_matched() -> None:
    tree = TokenTree([0, 3, 1], [-1, 0, 0])
    for verifier in (Recursive(), SampleMatch()):
        found = acceptance(verifier.verify, lambda _, __: tree, P, HISTORY)
        assert found == pytest.approx(0.35, abs=1e-12)


@pytest.mark.parametrize("tokens", [[3], [1, 1]], ids=["outside of the law", "drawn twice"])
def test_a_candidate_that_cannot_have_been_drawn(tokens: list[int]) -> None:
    law = np.array([0.5, 0.5, 0.0, 0.0])
    tree = TokenTree([0, *tokens], [-1] + [0] * len(tokens), law={0: law})
    walk = SimpleNamespace(greedy=False, law=lambda _: np.full(4, 0.25), accept=lambda r: r >= 1)
    with pytest.raises(ValueError, match="must declare the law that it draws from"):
        Recursive().verify(tree, walk)  # type: ignore[arg-type]


def test_small_laws_stay_laws() -> None:
    """What is left is summed anew, not computed as 1 less what was taken."""
    law = np.array([1 - 1e-17, 1e-17, 1e-30])
    law = without(law, 0)
    assert law.sum() == pytest.approx(1, abs=1e-15) and law[1] > 0.9
    assert without(without(law, 1), 2).sum() == 0
