"""One candidate a position: how often it is accepted. Its law: test_losslessness.py."""

from __future__ import annotations

import pytest

from hasten.speculation.verifiers.chain import Chain
from tests.speculation.verifiers.harness import Markov, acceptance, groups, siblings

P, Q = Markov.constant([0.5, 0.3, 0.15, 0.05]), Markov.constant([0.1, 0.3, 0.2, 0.4])
HISTORY = [0, 0]


def test_acceptance_is_what_the_laws_share() -> None:
    assert acceptance(Chain().verify, siblings(Q, [1]), P, HISTORY) == pytest.approx(0.6, abs=1e-12)


def test_only_the_first_sibling_is_looked_at() -> None:
    for draft in (siblings(Q, [3]), groups(Q, [3])):
        assert acceptance(Chain().verify, draft, P, HISTORY) == pytest.approx(0.6, abs=1e-12)
