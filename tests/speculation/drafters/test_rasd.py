"""RASD: what the draft model finds implausible is pruned, and the rest is joined."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.decoding.params import SamplingParams
from hasten.methods import Card, MethodError
from hasten.models.base import Decoder
from hasten.speculation.base import Outcome
from hasten.speculation.drafters.rasd import RASD
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack
from tests.engine.world import World
from tests.speculation.drafters.parts import Said, context, opened, rows
from tests.speculation.examples import tiny_datastore, tiny_draft, tiny_target

LAW = np.array([0.4, 0.3, 0.15, 0.1, 0.03, 0.02], np.float32)


class Base(Said):
    """A draft model that expects ``LAW`` after the root."""

    def start(self, context: Any) -> Any:
        assert context.root_law
        return self

    def propose(self, sequences: Sequence[Any], budgets: Sequence[int]) -> list[TokenTree]:
        trees = super().propose(sequences, budgets)
        for tree in trees:
            tree.root_law = LAW if len(tree) > 1 else None
        return trees


Base.card = Card(  # type: ignore[attr-defined]
    *("base", ("draft",), Base, "", "bitwise", "none"),
    frozenset(),
    frozenset({"proposes-tokens", "tells-root-law"}),
)
RETRIEVED = [[0, 4, 4, 4], [5, 1, 1], [3, 2, 2], [4, 0]]


def joined(top: int, floor: float, budget: int, said: list[list[int]]) -> list[list[int]]:
    base, retriever = Base({9: said}), Said({9: RETRIEVED})
    drafting = RASD(base, (retriever,), top, floor).start(context())
    (sequence,) = opened(drafting, 9)
    (tree,) = drafting.propose([sequence], [budget])
    assert len(tree) - 1 <= budget
    path = [0]
    while children := tree.children(path[-1]):
        path.append(children[-1])
    tokens = [*tree.path(path[-1]), 2]
    drafting.observe([Outcome(sequence, 0, tree, path, tokens, rows(tree))])
    (seen,) = retriever.seen
    for node in range(len(seen.tree)):
        assert tree.path(int(seen.logits[node, 0])) == seen.tree.path(node)
    leaves = set(range(len(tree))) - set(tree.parent)
    return sorted(tree.path(leaf) for leaf in leaves)


def test_implausible_first_tokens_are_pruned() -> None:
    everything = [[0, 1], [0, 4, 4, 4], [3, 2, 2], [4, 0], [5, 1, 1]]
    assert joined(6, 1.0, 50, [[0, 1]]) == everything
    assert joined(4, 1.0, 50, [[0, 1]]) == everything[:3], "among the top 4"
    assert joined(1, 0.05, 50, [[0, 1]]) == everything[:3], "or at least 5 %"
    assert joined(1, 0.2, 50, [[0, 1]]) == everything[:2]


def test_the_likelier_continuation_has_the_rows() -> None:
    assert joined(6, 1.0, 4, [[0, 1]]) == [[0, 1], [0, 4, 4]], "0 is shared and takes one row"
    assert joined(6, 1.0, 7, [[0, 1]]) == [[0, 1], [0, 4, 4, 4], [3, 2]]
    assert joined(6, 1.0, 2, [[0, 1]]) == [[0, 1]], "the base comes before all"


def test_without_an_opinion_all_is_joined() -> None:
    assert joined(1, 1.0, 50, []) == sorted(RETRIEVED)


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        ("base=copyspec", "base=copyspec cannot tell which tokens it expects"),
        ("of=dyspec", "of=dyspec runs a draft model; only base may"),
        ("of=copyspec|copyspec", "copyspec is named twice"),
        ("top=0", "top=0 must be at least 1"),
        ("floor=0", "floor=0.0 must be above 0"),
    ],
)
def test_bad_parameters(inside: str, words: str) -> None:
    with pytest.raises(MethodError) as error:
        Stack.parse(f"draft=rasd({inside})")
    assert words in str(error.value)


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_under_load(tiny: Callable[..., Decoder], tmp_path: Path, temperature: float) -> None:
    choices = (
        f"draft=rasd(base=model(path={tiny_draft(tmp_path)},k=3),top=20,"
        f"of=retrieval(file={tiny_datastore(tmp_path)},shortest=1)|copyspec(gamma=1))"
    )
    world = World(tiny_target(tiny), drafts=None, choices=choices, blocks=9)
    rng = random.Random(4)
    for seed in range(8):
        prompt = [rng.randrange(2, 61) for _ in range(9)] * 2
        params = SamplingParams(
            max_tokens=30, seed=seed, temperature=temperature, n=1 + seed % 2, ignore_eos=True
        )
        world.add(prompt, params)
    world.drain()
    by = world.engine.stats.speculation.accepted_by
    assert world.checked >= 8
    assert all(any(bits >> i & 1 for bits in by) for i in range(3)), "each part was right at times"
