"""Fusion: one tree of all candidates, every part told about its own, and exact for every law."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.decoding.params import SamplingParams
from hasten.methods import MethodError
from hasten.models.base import Decoder
from hasten.speculation.base import DraftProgress, Outcome
from hasten.speculation.drafters.fuse import Fuse, share
from hasten.speculation.parts import PartView, Union
from hasten.speculation.tree import TokenTree, TreeBuilder
from hasten.speculation.verifiers.sample_match import SampleMatch
from hasten.stack import Stack
from tests.engine.world import World
from tests.speculation.drafters.parts import Said, context, opened, rows
from tests.speculation.verifiers.harness import Branches, Markov, total_variation

paths = st.lists(st.lists(st.integers(0, 2), max_size=4), max_size=4)


def proposed(tree: TokenTree) -> set[tuple[int, ...]]:
    return {tuple(tree.path(node)) for node in range(1, len(tree))}


@given(paths, paths, paths, st.integers(0, 12))
def test_the_union_of_what_the_parts_propose(
    one: list[list[int]], two: list[list[int]], three: list[list[int]], budget: int
) -> None:
    parts = [Said({9: said}) for said in (one, two, three)]
    drafting = Fuse(tuple(parts)).start(context())
    (sequence,) = opened(drafting, 9)
    (tree,) = drafting.propose([sequence], [budget])
    assert len(tree) - 1 <= budget and tree.token[0] == 9
    everything = {
        tuple(p[: i + 1]) for said in (one, two, three) for p in said for i in range(len(p))
    }
    found = [tuple(tree.path(node)) for node in range(1, len(tree))]
    assert len(set(found)) == len(found), "equal siblings are one node"
    assert set(found) <= everything
    if 3 * len(everything) <= budget:
        assert set(found) == everything
    # each part finds its own tree again, with its own rows, whatever was accepted
    path = [0]
    while children := tree.children(path[-1]):
        path.append(children[-1])
    tokens = [*tree.path(path[-1]), 2]
    drafting.observe([Outcome(sequence, 0, tree, path, tokens, rows(tree))])
    for i, part in enumerate(parts):
        (seen,) = part.seen
        view: PartView = sequence.draft_state.views[i]
        assert seen.sequence is view and seen.tokens == tokens
        assert view.tree is not None and proposed(seen.tree) <= proposed(view.tree)
        for node in range(len(seen.tree)):
            joined = int(seen.logits[node, 0])
            assert tree.path(joined) == seen.tree.path(node)
            assert node == 0 or tree.source[joined] >> i & 1
        accepted = [seen.tree.token[node] for node in seen.path[1:]]
        assert accepted == tokens[: len(accepted)]
        longer = tuple(tokens[: len(accepted) + 1])
        assert longer not in proposed(seen.tree) or longer == tuple(tokens), "the path stops early"


def test_shared_candidates_take_one_row_and_both_names() -> None:
    drafting = Fuse((Said({1: [[2, 3], [4]]}), Said({1: [[2, 5]]}))).start(context())
    (sequence,) = opened(drafting, 1)
    (tree,) = drafting.propose([sequence], [9])
    assert tree == TokenTree([1, 2, 4, 3, 5], [-1, 0, 0, 1, 1], source=tree.source)
    assert tree.source[1:] == [3, 1, 1, 2]


def test_the_budget_follows_success() -> None:
    assert [share([1.0, 1.0], room) for room in (0, 1, 2, 9)] == [0, 1, 1, 5]
    assert share([0.0, 3.0], 31) == 1 and share([3.0, 0.0], 31) == 30 and share([0.0], 7) == 7
    right, wrong = Said({1: [[2] * 8]}), Said({1: [[3] * 8]})
    drafting = Fuse((wrong, right)).start(context())
    (sequence,) = opened(drafting, 1)
    for _ in range(30):
        (tree,) = drafting.propose([sequence], [8])
        assert len(tree) - 1 == 8
        path = [0]
        while node := next((c for c in tree.children(path[-1]) if tree.token[c] == 2), None):
            path.append(node)
        outcome = Outcome(sequence, 0, tree, path, [2] * (len(path) - 1) + [9], rows(tree))
        drafting.observe([outcome])
    assert wrong.log[-1][-1] == [1] and right.log[-1][-1] == [7]


def test_a_tree_that_was_not_verified_is_none_of_the_parts() -> None:
    """Without pages for candidates the step verifies the root alone."""
    part = Said({1: [[2, 3]]})
    drafting = Fuse((part, Said({1: [[4]]}))).start(context())
    (sequence,) = opened(drafting, 1)
    drafting.propose([sequence], [9])
    root = TokenTree.root(1)
    drafting.observe([Outcome(sequence, 0, root, [0], [5], rows(root))])
    assert part.seen[0].tree == root and part.seen[0].path == [0]


def test_calls_reach_every_part_with_its_own_state() -> None:
    one, two = Said({}), Said({})
    drafting = Fuse((one, two)).start(context())
    (sequence,) = opened(drafting, 1)
    drafting.close(sequence)
    drafting.propose([sequence], [3])  # after a preemption
    drafting.rollback(sequence, 1)
    drafting.close(sequence)
    for part in (one, two):
        assert [entry[0] for entry in part.log] == ["open", "close", "propose", "rollback", "close"]
        assert part.log[1] == ("close", "state")
    sequence.draft_state = None
    drafting.close(sequence)


def test_controllers_see_the_whole_sequence() -> None:
    asked: list[Any] = []

    class Asking(Said):
        def start(self, context: Any) -> Any:
            asked.append(context)
            return self

    Asking.card = Said.card  # type: ignore[attr-defined]
    drafting = Fuse((Asking({}), Asking({1: []}))).start(context(drawn=True))
    assert [c.drawn for c in asked] == [True, False], "the first part alone may draw"
    (sequence,) = opened(drafting, 1)
    view = sequence.draft_state.views[1]
    assert not asked[1].should_stop(DraftProgress(view, 1, 0.5))
    assert asked[1].should_stop(DraftProgress(view, 2, 0.5))


def joined_with_drawn(
    rng: random.Random, vocab: int, law_of: Callable[[list[int]], Any], replaced: bool
) -> Callable[[list[int], Branches], TokenTree]:
    """A drafter that draws children (two at the root, one below the first of them), joined with
    chosen paths."""
    said = [[rng.randrange(vocab) for _ in range(rng.randint(1, 3))] for _ in range(3)]

    def draft(history: list[int], branches: Branches) -> TokenTree:
        q = law_of(history)
        builder = TreeBuilder(history[-1])
        builder.law[0], left, nodes = q, q, []
        for _ in range(2):
            token = branches.pick(left)
            nodes.append(builder.add_drawn(0, token))
            if not replaced:
                left = np.where(np.arange(vocab) == token, 0, left)
                left = left / left.sum()
        below = law_of([*history, builder.token[nodes[0]]])
        builder.law[nodes[0]] = below
        builder.add_drawn(nodes[0], branches.pick(below))
        drawn, _ = builder.build(independent=replaced)
        union = Union(history[-1])
        union.add_whole(PartView(None, [], tree=drawn), [0] + [1] * 3)  # type: ignore[arg-type]
        other = TreeBuilder(history[-1])
        for path in said:
            node = 0
            for token in path:
                node = other.add(node, token)
        chosen, _ = other.build()
        union.add(PartView(None, [], tree=chosen), [2] * len(chosen), 9)  # type: ignore[arg-type]
        return union.build()

    return draft


class Recursive:
    """Recursive rejection over siblings (sheet, section 4), as plainly as it can be written."""

    def __init__(self, planted: bool = False) -> None:
        self.planted = planted  # judge chosen candidates as if they had been drawn

    def verify(self, tree: TokenTree, walk: Any) -> list[int]:
        path = [0]
        while True:
            v = path[-1]
            p, proposal = walk.law(v), tree.proposal(v)
            q = tree.law.get(v)
            taken = None
            for child in tree.children(v):
                x = tree.token[child]
                if proposal == "delta" or q is None:
                    q_child = np.zeros_like(p)
                    q_child[x] = 1.0
                else:
                    q_child = q
                if walk.accept(p[x] / q_child[x] if q_child[x] else 0.0):
                    taken = child
                    break
                p = np.maximum(p - q_child, 0)
                p = p / p.sum()
                if proposal == "wor" and q is not None:
                    q = np.where(np.arange(len(q)) == x, 0, q)
                    q = q / q.sum() if q.sum() else q
            y = walk.draw(p) if taken is None else tree.token[taken]
            walk.emit(v, y)
            if taken is None:
                return path
            path.append(taken)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_fused_trees_keep_the_law(seed: int, replaced: bool) -> None:
    target, draft = Markov(3, seed), Markov(3, seed + 50)
    joined = joined_with_drawn(random.Random(seed), 3, draft.law, replaced)
    for verifier in (SampleMatch(), Recursive()):
        assert total_variation(verifier.verify, joined, target, [0, 1]) < 1e-12


def test_a_chosen_sibling_of_drawn_ones_would_change_the_law() -> None:
    """The planted mistake: without the rule of ``Union``, the same check must fail."""
    target, draft = Markov(3, 1), Markov(3, 51)

    def mixed(history: list[int], branches: Branches) -> TokenTree:
        q = draft.law(history)
        token = branches.pick(q)
        tree = TokenTree(
            [history[-1], 0, token] if token else [history[-1], 0], [-1, 0, 0][: 2 + (token > 0)]
        )
        tree.law = {0: q}
        return tree

    assert total_variation(Recursive().verify, mixed, target, [0, 1]) > 1e-3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fuse(of=copyspec)", "of names one drafter; fuse needs at least two"),
        ("fuse(of=copyspec|copyspec)", "copyspec is named twice"),
        ("fuse(of=copyspec|none)", "none proposes nothing"),
        ("fuse(of=)", "cannot read ''"),
    ],
)
def test_bad_parts(text: str, words: str) -> None:
    with pytest.raises(MethodError) as error:
        Stack.parse(f"draft={text}")
    assert words in str(error.value)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_under_load(tiny: Callable[..., Decoder], temperature: float) -> None:
    inner = "fallback(first=copyspec(gamma=4),then=copyspec(gamma=2,branches=2))"
    choices = f"draft=fuse(of={inner}|prompt-lookup(max_ngram=1))"
    world = World(tiny("llama"), drafts=None, choices=choices, blocks=9)
    rng = random.Random(3)
    for seed in range(8):
        prompt = [rng.randrange(2, 61) for _ in range(9)] * 2
        params = SamplingParams(
            max_tokens=30, seed=seed, temperature=temperature, n=1 + seed % 2, ignore_eos=True
        )
        world.add(prompt, params)
    world.drain()
    assert world.checked >= 8
    by = world.engine.stats.speculation.proposed_by
    assert all(any(bits >> i & 1 for bits in by) for i in range(3)), "each part had its say"
    assert any(bits & 4 and bits & 3 for bits in by), "some candidates had several sources"
