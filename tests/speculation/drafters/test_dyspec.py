"""DySpec: trees by value."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hasten.methods import MethodError
from hasten.models.base import Decoder
from hasten.speculation.draft_model import DraftModel
from hasten.speculation.draft_trees import tempered_law
from hasten.speculation.drafters.dyspec import DySpec, DySpecDrafting
from hasten.stack import Stack
from tests.speculation.examples import tiny_draft, tiny_target
from tests.speculation.test_draft_model import alone, context, sequence
from tests.speculation.tree_checks import check_trees, same_as_alone, trees_of


@pytest.mark.parametrize(("verify", "drawn"), [("sample-match", False), ("recursive", True)])
def test_trees(tmp_path: Path, verify: str, drawn: bool) -> None:
    draft = f"dyspec(path={tiny_draft(tmp_path)},n=9)"
    seen = trees_of(tmp_path, draft, verify, temperature=0.9, budget=9)
    check_trees(seen, drawn=drawn)
    assert any(len(tree.children(0)) > 1 for _, tree, _ in seen)
    assert any(max(tree.depth) > 1 for _, tree, _ in seen)


def test_the_same_as_alone(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    same_as_alone(tiny_target(tiny), f"dyspec(path={tiny_draft(tmp_path)},n=7)", seed=2)


def greedy_tree(model: Decoder, tokens: list[int], size: int, temperature: float) -> set:
    """The paper's algorithm as it is written: a heap of places, one law for each node."""

    def law(path: tuple[int, ...]) -> np.ndarray:
        z = alone(model, tokens + list(path)).astype(float) / temperature
        return np.exp(z - z.max()) / np.exp(z - z.max()).sum()

    count, nodes = 0, set()
    heap = [(-1.0, count, (), law(()))]
    while len(nodes) < size:
        value, _, path, left = heapq.heappop(heap)
        token = int(np.argmax(left))
        share, child = left[token], (*path, token)
        nodes.add(child)
        left = left.copy()
        left[token] = 0
        left /= left.sum()
        count += 2
        heapq.heappush(heap, (value * share, count, child, law(child)))
        heapq.heappush(heap, (value * (1 - share), count + 1, path, left))
    return nodes


def test_level_by_level_fills_the_places_that_a_heap_fills(tiny: Callable[..., Decoder]) -> None:
    model = tiny("llama", seed=3)
    runtime = DraftModel(model, context(model), 64)
    s = sequence([4, 8, 15, 16])
    drafting = DySpecDrafting(runtime, False, DySpec(n=40, depth=30, temperature=0.6))
    drafting.thresholds[40] = 0.1
    s.draft_state = drafting.open(s)
    (tree,) = drafting.propose([s], [40])
    nodes = {tuple(tree.path(node)) for node in range(1, len(tree))}
    assert 10 < len(nodes) < 40, "the threshold decides, not the budget"
    assert nodes == greedy_tree(model, s.tokens, len(nodes), 0.6)


def test_the_threshold_follows_the_budget(tiny: Callable[..., Decoder]) -> None:
    """From far too high and far too low a threshold."""
    model = tiny("llama", seed=3)
    for start in (0.5, 1e-4):
        runtime = DraftModel(model, context(model, max_batch_tokens=128), 64)
        drafting = DySpecDrafting(runtime, False, DySpec(n=40))
        drafting.thresholds[40] = start
        s = sequence([4, 8, 15, 16])
        s.draft_state = drafting.open(s)
        sizes = [len(drafting.propose([s], [40])[0]) - 1 for _ in range(60)]
        assert all(30 <= size <= 40 for size in sizes[-5:]), sizes
        assert 1e-4 < drafting.thresholds[40] < 0.5


def test_values_are_checked(tiny: Callable[..., Decoder]) -> None:
    with pytest.raises(MethodError, match="at least 1"):
        Stack.parse("draft=dyspec(n=0)")
    with pytest.raises(MethodError, match="above 0"):
        Stack.parse("draft=dyspec(temperature=0)")


def test_laws_are_those_of_the_draft_temperature(tiny: Callable[..., Decoder]) -> None:
    model = tiny("llama")
    runtime = DraftModel(model, context(model), 8)
    state = runtime.open(sequence([1, 2, 3]))
    _, rows = runtime.begin([state])
    assert rows is not None
    z = rows.logits[0].astype(float) / 0.6
    expected = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    assert np.allclose(tempered_law(rows, 0, 0.6), expected, rtol=1e-12)
