"""Independent drafts as a group: rho, acceptance, multiplicity. Its law: test_losslessness.py."""

from __future__ import annotations

import numpy as np
import pytest

from hasten.speculation.tree import TokenTree
from hasten.speculation.verifiers import k_seq
from hasten.speculation.verifiers.k_seq import KSeq, leftover, smallest_rho
from hasten.speculation.verifiers.recursive import Recursive
from tests.speculation.verifiers.harness import (
    EnumeratedWalk,
    Markov,
    acceptance,
    groups,
    siblings,
)

P, Q = Markov.constant([0.5, 0.3, 0.15, 0.05]), Markov.constant([0.1, 0.3, 0.2, 0.4])
HISTORY = [0, 0]


def accepted(p: np.ndarray, q: np.ndarray, k: int, rho: float) -> float:
    return float(1 - (1 - np.minimum(q, p / rho).sum()) ** k)


@pytest.mark.parametrize(
    ("k", "expected", "rho"), [(1, 0.6, 1), (2, 0.658, 1.58), (4, 0.755, 2.55), (8, 0.879, 3.79)]
)
def test_acceptance(k: int, expected: float, rho: float) -> None:
    p, q = P.law(HISTORY), Q.law(HISTORY)
    found = smallest_rho(p, q, k)
    assert found == pytest.approx(rho, abs=5e-3)
    assert accepted(p, q, k, found) == pytest.approx(expected, abs=5e-4)
    assert expected <= np.minimum(p, 1 - (1 - q) ** k).sum() + 5e-4, "the best coupling"
    if k <= 4:
        by_verifier = acceptance(KSeq().verify, groups(Q, [k]), P, HISTORY)
        assert by_verifier == pytest.approx(accepted(p, q, k, found), abs=1e-12)


def test_rho_and_what_is_left_for_random_laws() -> None:
    """Nothing is taken beyond p, and taken and left make up p, however coarse rho is."""
    rng = np.random.default_rng()
    for _ in range(300):
        size, k = int(rng.integers(2, 40)), int(rng.integers(1, 9))
        p, q = rng.dirichlet(np.full(size, 0.3)), rng.dirichlet(np.full(size, 0.3))
        p[rng.random(size) < 0.2] = 0
        p[0] += 1 - p.sum()
        rho = smallest_rho(p, q, k)
        assert 1 <= rho <= k
        for used in (rho, (rho + k) / 2, float(k)):
            taken = np.minimum(q, p / used)
            beta, share = taken.sum(), accepted(p, q, k, used)
            assert (p - taken * share / beta > -1e-12).all()
            made = taken * share / beta + (1 - share) * leftover(p, q, k, used)
            assert np.abs(made - p).max() < 1e-10
        assert (
            accepted(p, q, k, rho) >= (1 - 1 / np.e) * np.minimum(p, 1 - (1 - q) ** k).sum() - 1e-6
        )


def test_laws_without_a_common_token() -> None:
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.0, 1.0])
    assert np.array_equal(leftover(p, q, 3, smallest_rho(p, q, 3)), p)


def test_a_draft_that_occurs_twice_counts_twice() -> None:
    """And below it, what was drawn after either is a candidate: three sequences, then two."""
    asked: list[int] = []
    tree = TokenTree(
        [0, 1, 1, 2, 2, 0, 1],
        [-1, 0, 0, 0, 1, 2, 3],
        law=dict.fromkeys(range(4), Q.law(HISTORY)),
        independent=True,
    )
    whole = k_seq.smallest_rho

    class Accepting(EnumeratedWalk):
        """Takes token 1 at the root, and below it the second candidate."""

        calls = 0

        def accept(self, probability: float) -> bool:
            self.calls += 1
            return self.calls in (1, 3)

        def choose(self, node: int) -> int:
            return 3

    def noted(p: np.ndarray, q: np.ndarray, k: int) -> float:
        asked.append(k)
        return whole(p, q, k)

    walk = Accepting(P, tree, HISTORY, None)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(k_seq, "smallest_rho", noted)
        assert KSeq().verify(tree, walk) == [0, 2, 5]
    assert asked == [3, 2], "k shrinks to the sequences that agree with the text"
    assert walk.tokens == [0, 0, 1, 0, 3]


def test_siblings_without_replacement_are_judged_in_turn() -> None:
    draft = siblings(Q, [2])
    assert acceptance(KSeq().verify, draft, P, HISTORY) == pytest.approx(
        acceptance(Recursive().verify, draft, P, HISTORY), abs=1e-15
    )
