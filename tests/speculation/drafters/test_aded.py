"""ADED: hand-made tables, the search against a plain one, and the engine's output unchanged."""

from __future__ import annotations

import dataclasses
import math
import random
import zlib
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hasten import _native
from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine, EngineConfig
from hasten.engine.request import Request
from hasten.models.base import Decoder
from hasten.speculation.base import Outcome
from hasten.speculation.drafters.aded import Aded, AdedDrafting
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack
from tests.engine.world import World, params_of, prompt_of

PAPER = Aded(prompt=False, backoff=0.0, logits=0, decay=1.0)
Row = dict[int, float]


def at_work(method: Aded = PAPER, corpus: dict[tuple[int, int], Row] | None = None) -> AdedDrafting:
    return AdedDrafting(method, None if corpus is None else corpus_of(corpus))


def corpus_of(rows: dict[tuple[int, int], Row]) -> _native.TrigramCorpus:
    pairs = sorted(rows)
    ordered = [sorted(rows[p].items(), key=lambda item: (-item[1], item[0])) for p in pairs]
    return _native.TrigramCorpus(
        torch.tensor([(a << 32) | b for a, b in pairs], dtype=torch.int64),
        torch.tensor([0, *np.cumsum([len(row) for row in ordered])], dtype=torch.int64),
        torch.tensor([t for row in ordered for t, _ in row], dtype=torch.int32),
        torch.tensor([w for row in ordered for _, w in row], dtype=torch.float32),
    )


def sequence(drafting: AdedDrafting, tokens: list[int], tenant: str = "") -> Any:
    made = SimpleNamespace(tokens=list(tokens), tenant=tenant, draft_state=None)
    made.draft_state = drafting.open(made)
    return made


def draft(drafting: AdedDrafting, tokens: list[int], budget: int = 64) -> TokenTree:
    return drafting.propose([sequence(drafting, tokens)], [budget])[0]


def paths(tree: TokenTree) -> set[tuple[int, ...]]:
    return {tuple(tree.path(node)) for node in range(1, len(tree))}


# ---- the table --------------------------------------------------------------------------------


def test_boosts_reach_the_cap_and_stay() -> None:
    table = at_work().tables[""]
    for count in range(1, 100):
        table.absorb([1, 2, 3])
        assert table.successors(1, 2) == [(3, pytest.approx(min(3.0, 0.04 * count), abs=1e-5))]
    assert table.successors(1, 2) == [(3, 3.0)]


def test_a_trigram_is_boosted_while_it_is_in_the_window() -> None:
    drafting = at_work()
    text = list(range(40))
    mine = sequence(drafting, text[:4])
    for end in range(4, 40):
        mine.tokens = text[:end]
        drafting.propose([mine], [4])
    table = drafting.tables[""]
    assert table.successors(4, 5) == [(6, pytest.approx(14 * 0.04))]  # ends 7 to 20
    assert table.successors(36, 37) == [(38, pytest.approx(0.04))]


def test_the_prompt_counts_once() -> None:
    text = list(range(40))
    drafting = at_work(Aded(backoff=0.0))
    mine = sequence(drafting, text)
    drafting.propose([mine], [4])
    table = drafting.tables[""]
    assert table.successors(0, 1) == [(2, pytest.approx(0.04))]
    drafting.close(mine)  # preempted, and back
    drafting.propose([mine], [4])
    assert table.successors(0, 1) == [(2, pytest.approx(0.04))]
    assert table.successors(37, 38) == [(39, pytest.approx(0.08))]
    plain = at_work()
    draft(plain, text)
    assert plain.tables[""].successors(22, 23) == []
    assert plain.tables[""].successors(24, 25) == [(26, pytest.approx(0.04))]


def test_what_came_without_a_draft_is_seen_later() -> None:
    drafting = at_work()
    mine = sequence(drafting, [1, 2])
    drafting.propose([mine], [4])
    mine.tokens = [1, 2, *range(3, 60)]
    drafting.propose([mine], [4])
    table = drafting.tables[""]
    assert table.successors(1, 2) == [(3, pytest.approx(0.04))]
    assert table.successors(57, 58) == [(59, pytest.approx(0.04))]


def test_a_boost_starts_from_the_corpus() -> None:
    drafting = at_work(corpus={(1, 2): {5: 0.5, 6: 0.3, 7: 0.2}})
    table = drafting.tables[""]
    table.absorb([1, 2, 7])
    assert table.successors(1, 2) == [
        (5, 0.5),
        (6, pytest.approx(0.3)),
        (7, pytest.approx(0.24)),
    ]
    assert drafting.tables["other"].successors(1, 2)[2] == (7, pytest.approx(0.2))


def test_equal_weights_go_by_id() -> None:
    table = at_work().tables[""]
    for token in (9, 3, 7):
        table.absorb([1, 2, token])
    assert [t for t, _ in table.successors(1, 2)] == [3, 7, 9]


def test_a_full_row_gives_its_lightest_place_to_the_new() -> None:
    table = at_work().tables[""]
    for token in range(3, 19):
        for _ in range(20 - token):
            table.absorb([1, 2, token])
    assert [t for t, _ in table.successors(1, 2)] == list(range(3, 15))
    for _ in range(30):
        table.absorb([1, 2, 99])
    assert [t for t, _ in table.successors(1, 2)] == [99, *range(3, 14)]


def test_decay_weakens_the_others() -> None:
    table = at_work(Aded(decay=0.5, backoff=0.0)).tables[""]
    table.absorb([1, 2, 3])
    table.absorb([1, 2, 4])
    assert table.successors(1, 2) == [(4, pytest.approx(0.04)), (3, pytest.approx(0.02))]


def test_backoff_reads_the_last_token_alone() -> None:
    drafting = at_work(Aded(prompt=True, backoff=0.4, decay=1.0))
    tree = draft(drafting, [5, 6, 7, 8, 9, 6])
    assert tree.path(1) == [7]  # (9, 6) is unknown; after 6 came 7
    assert drafting.tables[""].successors(9, 6) == [(7, pytest.approx(0.4 * 0.04))]
    assert draft(drafting, [6]).token[:2] == [6, 7]
    assert len(draft(at_work(), [5, 6, 7, 8, 9, 6])) == 1


def test_memory_is_bounded() -> None:
    method = dataclasses.replace(PAPER, pairs=1000)
    table = at_work(method).tables[""]
    rng = random.Random(1)
    for _ in range(40):
        table.absorb([1, 2, 3])  # heavy, but old in the end
    for round in range(30):
        table.absorb([rng.randrange(5000) + 10 for _ in range(300)])
        table.absorb([round + 6000, 4, 5])
        assert table.successors(round + 6000, 4) == [(5, pytest.approx(0.04))]
        assert len(table) <= 1000
        assert table.nbytes <= 1024 * 152 + 2048 * 16
    assert len(table.successors(1, 2)) == 1  # lighter pairs went first
    fresh = at_work().tables[""]
    fresh.absorb([rng.randrange(10**6) for _ in range(200_000)])
    assert len(fresh) <= 32768 and fresh.nbytes <= 6.3e6


def test_the_only_pair_is_replaced() -> None:
    table = at_work(dataclasses.replace(PAPER, pairs=1)).tables[""]
    table.absorb([1, 2, 3, 4])
    assert len(table) == 1 and table.successors(2, 3) and not table.successors(1, 2)


# ---- the search -------------------------------------------------------------------------------


def test_one_successor_a_pair_gives_a_chain() -> None:
    corpus = {(i, i + 1): {i + 2: 1.0} for i in range(1, 20)}
    tree = draft(at_work(dataclasses.replace(PAPER, adapt=False), corpus), [1, 2])
    assert tree == TokenTree.chain([2, 3, 4, 5, 6])


def test_no_successors_no_draft() -> None:
    assert draft(at_work(), [1, 2]) == TokenTree.root(2)
    assert draft(at_work(), [1]) == TokenTree.root(1)


def test_the_value_is_the_weight_of_the_path() -> None:
    """Two first tokens of equal weight; behind 4 the path is heavy, behind 3 it is light. A search
    that valued anything but the sum along the path could not tell them apart."""
    corpus = {
        (1, 2): {3: 0.5, 4: 0.5},
        **{(2, 3): {10: 0.01, 11: 0.01}, (3, 10): {12: 0.01}, (3, 11): {12: 0.01}},
        **{(2, 4): {20: 0.9, 21: 0.9}, (4, 20): {22: 0.9}, (4, 21): {22: 0.9}},
    }
    method = dataclasses.replace(PAPER, adapt=False, c1=0.5, prefixes=6)
    found = paths(draft(at_work(method, corpus), [1, 2], 5))
    assert {path for path in found if path[0] == 3} == {(3,)}  # extends the empty prefix
    assert len(found) == 5
    swapped = {**corpus, (2, 3): corpus[2, 4], (2, 4): corpus[2, 3]}
    swapped |= {(3, t): {22: 0.9} for t in (20, 21)} | {(4, t): {12: 0.01} for t in (10, 11)}
    assert {path[0] for path in paths(draft(at_work(method, swapped), [1, 2], 5))} == {3}


def score(m: Aded, parent_visits: int, visits: int, value: float, w: float) -> float:
    explore = (m.c1 + math.log((parent_visits + m.c2 + 1) / m.c2)) * math.sqrt(parent_visits)
    return value / visits + explore * (w / (1 + visits))


def test_the_score() -> None:
    assert score(PAPER, 10, 3, 6.0, 0.4) == pytest.approx(12.393, abs=5e-4)


def uniform(key: int, count: int) -> float:
    """SplitMix64."""
    z = (key + (count + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2**64
    return ((z ^ z >> 31) >> 11) * 2.0**-53


class Plain:
    """The same search over dictionaries: nodes by their path."""

    def __init__(self, m: Aded, find: Callable[[int, int], list[tuple[int, float]]]) -> None:
        self.m = m
        self.find = find

    def tree(self, a: int, b: int, budget: int, key: int) -> tuple[list[int], list[int]]:
        m, find = self.m, self.find
        children: dict[tuple[int, ...], list[tuple[int, float]]] = {}
        visits: dict[tuple[int, ...], int] = {}
        value: dict[tuple[int, ...], float] = {}
        born: dict[tuple[int, ...], int] = {(): 0}

        def pair(path: tuple[int, ...]) -> tuple[int, int]:
            return (a, b, *path)[-2:]  # type: ignore[return-value]

        if not find(a, b):
            return [b], [-1]
        for iteration in range(m.iterations):
            path: tuple[int, ...] = ()
            weights: list[float] = []
            while len(path) < m.depth and children.get(path):
                best, most = None, -1.0
                for token, w in children[path]:
                    child = (*path, token)
                    n = visits.get(child, 0)
                    s = score(m, visits[path], n, value[child], w) if n else math.inf
                    if s > most:
                        best, most = (token, w), s
                assert best is not None
                path, weights = (*path, best[0]), [*weights, best[1]]
            if len(path) < m.depth:
                if path not in children:
                    children[path] = find(*pair(path))
                    for token, _ in children[path]:
                        born[*path, token] = len(born)
                if children[path]:
                    token, w = children[path][0]
                    path, weights = (*path, token), [*weights, w]
            rolled = 0.0
            far = path
            for depth in range(len(path), m.depth):
                found = find(*pair(far))
                if not found:
                    break
                total = sum(w for _, w in found)
                left = total * uniform(key, iteration * m.depth + depth)
                at = 0
                for at, (_, w) in enumerate(found):  # noqa: B007
                    left -= w
                    if left < 0:
                        break
                rolled += found[at][1]
                far = (*far, found[at][0])
            got = 1.0 + sum(reversed(weights)) + rolled
            for end in range(len(path) + 1):
                node = path[:end]
                visits[node] = visits.get(node, 0) + 1
                value[node] = value.get(node, 0.0) + got
        ranked = sorted(visits, key=lambda p: (-visits[p], -value[p] / visits[p], born[p]))
        drafted: dict[tuple[int, ...], None] = {}
        for prefix in ranked[: m.prefixes]:
            for wanted in (prefix, (*prefix, *(t for t, _ in find(*pair(prefix))[:1]))):
                if wanted and len(drafted) < budget:
                    drafted.setdefault(wanted)
        order = [(), *sorted(drafted, key=len)]
        return [b, *(p[-1] for p in order[1:])], [-1, *(order.index(p[:-1]) for p in order[1:])]


@pytest.mark.parametrize("seed", range(12))
def test_the_native_search_against_a_plain_one(seed: int) -> None:
    """Weights are multiples of 1/64, so that sums are exact in any order."""
    rng = random.Random(seed)
    m = dataclasses.replace(
        PAPER,
        adapt=False,
        iterations=rng.choice([1, 20, 150]),
        depth=rng.choice([1, 2, 3, 5]),
        prefixes=rng.choice([1, 5, 24]),
        c1=rng.choice([1.814, 32.0]),
        successors=rng.choice([3, 12]),
    )
    tokens = range(2, 2 + rng.choice([3, 6, 14]))
    corpus = {
        (a, b): {c: rng.randint(1, 128) / 64 for c in rng.sample(tokens, rng.randint(1, 3))}
        for a in tokens
        for b in tokens
        if rng.random() < 0.9
    }
    drafting = at_work(m, corpus)
    table = drafting.tables[""]
    plain = Plain(m, table.successors)
    for a in tokens:
        text = [a, rng.choice(tokens)]
        key = zlib.crc32(array("i", text).tobytes(), 2)
        for budget in (1, 7, 64):
            tree = draft(drafting, text, budget)
            assert (tree.token, tree.parent) == plain.tree(*text, budget, key)
            assert len(tree) - 1 <= budget


def test_the_beam_takes_the_likeliest_paths() -> None:
    rng = random.Random(3)
    tokens = range(2, 7)
    corpus = {
        (a, b): {c: rng.random() + 0.01 for c in rng.sample(tokens, 3)}
        for a in tokens
        for b in tokens
    }
    drafting = at_work(dataclasses.replace(PAPER, adapt=False, search="beam"), corpus)
    table = drafting.tables[""]
    shares: dict[tuple[int, ...], float] = {(2, 3): 1.0}
    for path in shares_of(shares, table, 4):
        shares[path[0]] = path[1]
    del shares[2, 3]
    best = sorted(shares, key=lambda path: -shares[path])
    for budget in (1, 5, 30, 64):
        assert paths(draft(drafting, [2, 3], budget)) == {path[2:] for path in best[:budget]}


def shares_of(
    start: dict[tuple[int, ...], float], table: _native.Trigrams, depth: int
) -> list[tuple[tuple[int, ...], float]]:
    """All paths of up to ``depth`` tokens with the product of the shares of their weights."""
    level, found = list(start.items()), []
    for _ in range(depth):
        level = [
            ((*path, token), share * w / sum(x for _, x in row))
            for path, share in level
            for row in [table.successors(path[-2], path[-1])]
            for token, w in row
        ]
        found += level
    return found


# ---- sequences --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Aded(), PAPER, Aded(search="beam")])
def test_runs_repeat_and_keep_to_their_budget(method: Aded) -> None:
    def run() -> list[TokenTree]:
        rng = random.Random(8)
        drafting = at_work(method)
        text = [min(int(rng.paretovariate(0.8)), 50) for _ in range(300)]
        mine = sequence(drafting, text[:1])
        trees = []
        for end in range(1, 300):
            mine.tokens = text[:end]
            budget = rng.choice([0, 1, 2, 16, 100])
            (tree,) = drafting.propose([mine], [budget])
            assert tree.token[0] == text[end - 1] and len(tree) - 1 <= min(budget, 64)
            for node in range(len(tree)):
                children = [tree.token[child] for child in tree.children(node)]
                assert len(set(children)) == len(children)
            trees.append(tree)
        return trees

    first = run()
    assert first == run() and max(map(len, first)) > 17


def test_tenants_learn_apart() -> None:
    drafting = at_work()
    text = [1, 2, 3, 4, 1, 2]
    mine, other = sequence(drafting, text, "a"), sequence(drafting, text[-2:], "b")
    trees = drafting.propose([mine, other], [8, 8])
    assert trees[0].path(1) == [3] and trees[1] == TokenTree.root(2)
    later = sequence(drafting, text[-2:], "a")
    assert drafting.propose([later], [8])[0].path(1) == [3]


def test_a_frozen_table_learns_nothing() -> None:
    drafting = at_work(Aded(adapt=False))
    draft(drafting, [1, 2, 3, 1, 2])
    assert len(drafting.tables[""]) == 0


def test_rollback_keeps_the_count_right() -> None:
    drafting = at_work()
    mine = sequence(drafting, list(range(30)))
    drafting.propose([mine], [4])
    mine.tokens = mine.tokens[:10]
    drafting.rollback(mine, 10)
    assert mine.draft_state.seen == 10
    mine.tokens += [50, 51]
    drafting.propose([mine], [4])
    assert drafting.tables[""].successors(9, 50) == [(51, pytest.approx(0.04))]


def test_likely_tokens_of_verified_rows_are_boosted() -> None:
    drafting = at_work(dataclasses.replace(PAPER, logits=2, logit_boost=0.1))
    mine = sequence(drafting, [7, 5, 6])
    tree = TokenTree([5, 8], [-1, 0])
    shares = np.array([[0.1] * 5 + [0.1, 0.3, 0.0, 0.1], [0.05] * 5 + [0.5, 0.25, 0, 0]])
    logits = np.log(shares / shares.sum(1, keepdims=True) + 1e-9).astype(np.float32)
    drafting.observe([Outcome(mine, 1, tree, [0], [6], logits)])
    table = drafting.tables[""]
    shares /= shares.sum(1, keepdims=True)
    assert table.successors(7, 5) == [
        (6, pytest.approx(0.1 * shares[0, 6], rel=1e-4)),
        (0, pytest.approx(0.1 * shares[0, 0], rel=1e-4)),
    ]
    assert [t for t, _ in table.successors(5, 8)] == [5, 6]


@pytest.mark.parametrize(
    "bad",
    [
        {"search": "dfs"},
        {"window": 2},
        {"iterations": 0},
        {"depth": 0},
        {"prefixes": 0},
        {"nodes": 0},
        {"pairs": 0},
        {"tenants": 0},
        {"iterations": 1_000_000_000},
        {"depth": 65},
        {"prefixes": 100_001},
        {"pairs": (1 << 24) + 1},
        {"successors": 16},
        {"successors": 0},
        {"boost": 0.0},
        {"boost": 4.0},
        {"cap": float("nan")},
        {"c1": -1.0},
        {"c2": 0.0},
        {"backoff": 1.5},
        {"decay": 0.0},
        {"logits": -1},
        {"logit_boost": 0.0},
    ],
)
def test_bad_parameters(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Aded(**bad)


# ---- the engine -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice",
    [
        "aded",
        "aded(search=beam,logits=9)",
        "aded(pairs=40,tenants=1)",
        "aded(prompt=false,backoff=0,logits=0,decay=1)",
    ],
)
def test_the_same_output_for_every_kind_of_request(
    tiny: Callable[..., Decoder], choice: str
) -> None:
    model = tiny("llama")
    world = World(model, drafts=None, choices=f"draft={choice},control=fixed(k=7)", seed=4)
    rng = random.Random(11)
    for number in range(14):
        prompt = prompt_of(rng, 61, rng.randint(1, 9))
        world.add(prompt, params_of(rng, 61), tenant=str(number % 2))
        world.step()
    world.drain()
    assert world.engine.stats.speculation.accepted > 0


def test_a_stream_of_requests_takes_fewer_steps(tiny: Callable[..., Decoder]) -> None:
    model = tiny("llama")
    engine = Engine(model, Stack.parse("draft=aded"), EngineConfig(max_sequences=2))
    steps = []
    for _ in range(3):
        before = engine.stats.steps
        request: Request = engine.add([5, 6, 7], SamplingParams(max_tokens=60, ignore_eos=True))
        while engine.has_work:
            engine.step()
        steps.append(engine.stats.steps - before)
        assert len(request.sequences[0].tokens) == 63
    assert steps[2] < steps[0] <= 60
