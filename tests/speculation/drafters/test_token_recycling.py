"""Token Recycling: the template, the table's updates, and the engine's output unchanged."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine, EngineConfig
from hasten.models.base import Decoder
from hasten.speculation.base import Outcome
from hasten.speculation.drafters.token_recycling import (
    CHILDREN,
    TEMPLATE,
    TokenRecycling,
    TokenRecyclingDrafting,
    levels_of,
)
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack
from tests.engine.world import World, params_of, prompt_of

VOCAB = 50
NODES = len(TEMPLATE)


def at_work(**parameters: Any) -> TokenRecyclingDrafting:
    return TokenRecyclingDrafting(TokenRecycling(**parameters), VOCAB)


def sequence(drafting: TokenRecyclingDrafting, tokens: list[int], tenant: str = "") -> Any:
    made = SimpleNamespace(tokens=list(tokens), tenant=tenant, draft_state=None)
    made.draft_state = drafting.open(made)
    return made


def draft(drafting: TokenRecyclingDrafting, mine: Any, budget: int = NODES) -> TokenTree:
    return drafting.propose([mine], [budget])[0]


def logits(*rows: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows whose likeliest tokens are these, in order."""
    made = np.full((len(rows), VOCAB), -10.0, np.float32)
    for row, best in zip(made, rows, strict=True):
        row[best] = -np.arange(len(best))
    return made


def names(budget: int) -> list[str]:
    above, found = [""], []
    for level in levels_of(TEMPLATE, budget):
        above = [
            above[parent] + str(rank) for parent, rank in zip(level.parent, level.rank, strict=True)
        ]
        found += above
    return found


def test_the_template_is_the_paper_s() -> None:
    assert NODES == 80
    assert Counter(map(len, names(NODES))) == {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}
    found = names(NODES)
    for name in ["", *found]:
        children = [other for other in found if other[:-1] == name and other]
        assert children == [name + str(rank) for rank in range(CHILDREN.get(name, 0))]


@pytest.mark.parametrize("budget", range(NODES + 1))
def test_a_cut_template_keeps_parents_and_low_ranks(budget: int) -> None:
    found = names(budget)
    assert len(found) == budget and set(found) <= set(names(min(budget + 1, NODES)))
    for name in found:
        assert name[:-1] in ["", *found]
        assert name[-1] == "0" or name[:-1] + str(int(name[-1]) - 1) in found


def test_another_tree() -> None:
    """Ranks need not be next to each other, and the first nodes are those that a budget takes."""
    nodes = ((1,), (1, 3), (0,), (1, 3, 0))
    drafting = TokenRecyclingDrafting(TokenRecycling(), VOCAB, nodes)
    table = drafting.tables[""]
    table[:] = (np.arange(VOCAB)[:, None] * 3 + np.arange(8)) % VOCAB
    mine = sequence(drafting, [2])
    # 2 -> 6 7 ..., 7 -> 21 22 23 24 ..., 24 -> 72 % 50 ...
    paths = [[7], [7, 24], [6], [7, 24, 22]]
    for budget in range(6):
        tree = draft(drafting, mine, budget)
        found = [tree.path(node) for node in range(1, len(tree))]
        assert sorted(found) == sorted(paths[:budget])


def test_nothing_known_nothing_drafted() -> None:
    drafting = at_work()
    assert draft(drafting, sequence(drafting, [0])) == TokenTree.root(0)
    drafting.tables[""][3] = [4, 5, -1, -1, -1, -1, -1, -1]
    drafting.tables[""][5] = [3, *[-1] * 7]
    tree = draft(drafting, sequence(drafting, [3]))
    # ranks 0 and 1 of 3; 4 is unknown; below 5 the template has 3 ranks, of which one is known
    assert [tree.path(node) for node in range(1, 5)] == [[4], [5], [5, 3], [5, 3, 4]]
    assert 0 not in tree.token and -1 not in tree.token


@pytest.mark.parametrize("seed", range(5))
def test_the_tree_against_one_by_rank_paths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drafting = at_work()
    for token in range(VOCAB):
        if rng.random() < 0.8:
            known = rng.integers(1, 9)
            drafting.tables[""][token, :known] = rng.permutation(VOCAB)[:known]
    table = drafting.tables[""]
    for budget in (0, 1, 2, 9, 40, 79, 80, 200):
        root = int(rng.integers(VOCAB))
        expected = []
        for name in names(min(budget, NODES)):
            token, path = root, []
            for rank in name:
                token = int(table[token, int(rank)]) if token >= 0 else -1
                path.append(token)
            if -1 not in path:
                expected.append(path)
        tree = draft(drafting, sequence(drafting, [root]), budget)
        assert [tree.path(node) for node in range(1, len(tree))] == expected
        assert len(tree) - 1 <= budget


def observe(
    drafting: TokenRecyclingDrafting, tree: TokenTree, path: list[int], *rows: list[int]
) -> None:
    mine = sequence(drafting, [9, tree.token[0]])
    drafting.observe([Outcome(mine, 1, tree, path, [], logits(*rows))])


def test_every_row_is_learned() -> None:
    drafting = at_work()
    best = [list(range(10 * i, 10 * i + 8)) for i in range(3)]
    observe(drafting, TokenTree([1, 2, 3], [-1, 0, 0]), [0, 1], *best)
    table = drafting.tables[""]
    assert [table[token].tolist() for token in (1, 2, 3)] == best
    assert (table[[0, 4, 9]] == -1).all()
    accepted = at_work(rejected=False)
    observe(accepted, TokenTree([1, 2, 3], [-1, 0, 0]), [0, 1], *best)
    assert accepted.tables[""][2].tolist() == best[1] and (accepted.tables[""][3] == -1).all()


def test_of_rows_of_one_token_the_accepted_or_else_the_last_is_kept() -> None:
    best = [list(range(i, i + 8)) for i in (0, 10, 20, 30)]
    tree = TokenTree([1, 2, 3, 2], [-1, 0, 0, 2])
    for path, kept in (([0], 3), ([0, 1], 1), ([0, 2], 3), ([0, 2, 3], 3)):
        drafting = at_work()
        observe(drafting, tree, path, *best)
        assert drafting.tables[""][2].tolist() == best[kept]


def test_a_vocabulary_of_fewer_than_eight() -> None:
    drafting = TokenRecyclingDrafting(TokenRecycling(), 3)
    mine = sequence(drafting, [0])
    outcome = Outcome(mine, 0, TokenTree.root(0), [0], [2], np.array([[1, 3, 2]], np.float32))
    drafting.observe([outcome])
    assert drafting.tables[""][0].tolist() == [1, 2, 0, -1, -1, -1, -1, -1]
    assert sorted(draft(drafting, mine).token[1:4]) == [0, 1, 2]


def test_tables_of_tenants_and_of_sequences() -> None:
    best = list(range(8))
    for hot, same_tenant in ((True, True), (False, False)):
        drafting = at_work(hot=hot)
        first = sequence(drafting, [9, 1], "a")
        drafting.observe([Outcome(first, 1, TokenTree.root(1), [0], [0], logits(best))])
        assert len(draft(drafting, first)) > 1
        assert (len(draft(drafting, sequence(drafting, [1], "a"))) > 1) == same_tenant
        assert len(draft(drafting, sequence(drafting, [1], "b"))) == 1


def test_tenants_are_bounded() -> None:
    drafting = at_work(tenants=2)
    for tenant in "abcabc":
        draft(drafting, sequence(drafting, [1], tenant))
    assert len(drafting.tables) == 2
    with pytest.raises(ValueError, match="tenants=0"):
        TokenRecycling(tenants=0)


@pytest.mark.parametrize("choice", ["token-recycling", "token-recycling(hot=false)"])
def test_the_same_output_for_every_kind_of_request(
    tiny: Callable[..., Decoder], choice: str
) -> None:
    model = tiny("llama")
    world = World(model, drafts=None, choices=f"draft={choice},control=fixed(k=7)", seed=4)
    rng = random.Random(12)
    for number in range(14):
        prompt = prompt_of(rng, 61, rng.randint(1, 9))
        world.add(prompt, params_of(rng, 61), tenant=str(number % 2))
        world.step()
    world.drain()
    assert world.engine.stats.speculation.accepted > 0


def test_raw_logits_are_learned_not_masked_ones(tiny: Callable[..., Decoder]) -> None:
    model = tiny("llama")
    engine = Engine(model, Stack.parse("draft=token-recycling"), EngineConfig(max_sequences=1))
    engine.add([5, 6, 7], SamplingParams(max_tokens=40, allowed_token_ids=[3, 4], ignore_eos=True))
    while engine.has_work:
        engine.step()
    drafting = engine.drafting
    assert isinstance(drafting, TokenRecyclingDrafting)
    learned = drafting.tables[""]
    assert set(learned[7].tolist()) - {3, 4, -1}
