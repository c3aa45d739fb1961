"""Scripted candidates: the shape of the tree within any budget."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.speculation.drafters.scripted import ScriptedDraft


@given(k=st.integers(1, 6), width=st.integers(1, 4), budget=st.integers(0, 30))
def test_shape(k: int, width: int, budget: int) -> None:
    sequence: Any = SimpleNamespace(tokens=[3])
    (tree,) = ScriptedDraft(k, width).propose([sequence], [budget])
    assert len(tree) - 1 == min(budget, k * width)
    if budget >= k * width:
        assert tree.depth[-1] == k
        assert len(tree.children(0)) == width
    for node in range(len(tree)):
        children = [tree.token[c] for c in tree.children(node)]
        assert len(set(children)) == len(children)
        assert len(children) <= (width if node == 0 else 1)


@pytest.mark.parametrize("bad", [{"k": 0}, {"width": 0}])
def test_bad_parameters(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        ScriptedDraft(**bad)
