"""Chains of a draft model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hasten.models.base import Decoder
from hasten.speculation.draft_trees import draw
from tests.speculation.examples import tiny_draft, tiny_target
from tests.speculation.tree_checks import check_trees, same_as_alone, trees_of


@pytest.mark.parametrize("budget", [1, 4])
@pytest.mark.parametrize("verify", ["sample-match", "chain"])
def test_chains(tmp_path: Path, verify: str, budget: int) -> None:
    draft = f"model(path={tiny_draft(tmp_path)},k=4)"
    seen = trees_of(tmp_path, draft, verify, temperature=0.8, budget=max(budget, 2))
    check_trees(seen, drawn=verify == "chain")
    assert all(tree.is_chain for _, tree, _ in seen)


def test_greedy_requests_are_never_drawn(tmp_path: Path) -> None:
    draft = f"model(path={tiny_draft(tmp_path)},k=4)"
    check_trees(trees_of(tmp_path, draft, "chain", temperature=0.0, budget=4), drawn=False)


def test_the_same_as_alone(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    same_as_alone(tiny_target(tiny), f"model(path={tiny_draft(tmp_path)},k=3)", seed=1)


def test_draws_follow_the_law_and_its_ends() -> None:
    law = np.array([0.0, 0.25, 0.0, 0.75, 0.0])
    assert [draw(law, u) for u in (0.0, 0.2499, 0.25, 0.9999999)] == [1, 1, 3, 3]
    assert draw(law * 7, 1 - 2**-53) == 3, "never a token without weight"
