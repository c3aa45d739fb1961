"""CopySpec against a search by hand, and the traps of copying."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.decoding.params import SamplingParams
from hasten.models.base import Decoder
from hasten.speculation.base import Outcome
from hasten.speculation.drafters import copyspec
from hasten.speculation.drafters.copyspec import LOOKS, CopySpec
from hasten.speculation.tree import TokenTree
from tests.engine.world import World

texts = st.lists(st.integers(0, 2), min_size=1, max_size=60)


def sequence(drafter: CopySpec, tokens: list[int]) -> Any:
    return SimpleNamespace(tokens=tokens, draft_state=drafter.open(None))  # type: ignore[arg-type]


def by_hand(tokens: list[int], gamma: int) -> list[int]:
    """The ends of earlier occurrences of the last gram, latest first."""
    gram = tokens[len(tokens) - gamma :]
    if len(tokens) < gamma:
        return []
    return [e for e in range(len(tokens) - 1, gamma - 1, -1) if tokens[e - gamma : e] == gram]


def continued(tokens: list[int], end: int, count: int) -> list[int]:
    text = list(tokens)
    for i in range(count):
        text.append(text[end + i])
    return text[len(tokens) :]


@given(texts, st.integers(1, 5), st.integers(1, 9), st.integers(0, 12))
def test_the_latest_occurrence_is_copied(
    tokens: list[int], gamma: int, k: int, budget: int
) -> None:
    drafter = CopySpec(gamma, k)
    (tree,) = drafter.propose([sequence(drafter, tokens)], [budget])
    ends = by_hand(tokens, gamma)
    copy = continued(tokens, ends[0], min(k, budget)) if ends else []
    assert tree == TokenTree.chain([tokens[-1], *copy])


@given(texts, st.integers(1, 5))
def test_a_grade_counts_how_far_back_the_match_goes(tokens: list[int], gamma: int) -> None:
    drafter = CopySpec(gamma)
    expected = 0
    if ends := by_hand(tokens, gamma):
        same = gamma
        while same < ends[0] and tokens[: ends[0]][-same - 1 :] == tokens[-same - 1 :]:
            same += 1
        expected = 1 if same == 1 else 2 if same < 4 else 3 if same < 8 else 4
    assert drafter.grade(sequence(drafter, tokens)) == expected


@given(texts, st.integers(1, 3), st.integers(2, 4), st.integers(0, 12))
def test_branches_are_the_latest_different_continuations(
    tokens: list[int], gamma: int, branches: int, budget: int
) -> None:
    drafter = CopySpec(gamma, k=4, branches=branches)
    (tree,) = drafter.propose([sequence(drafter, tokens)], [budget])
    assert len(tree) - 1 <= budget
    wanted: list[list[int]] = []
    for end in by_hand(tokens, gamma)[:LOOKS]:
        copy = continued(tokens, end, min(4, budget))
        if copy not in wanted and len(wanted) < branches:
            wanted.append(copy)
    paths = [tree.path(node) for node in range(len(tree))]
    assert all(any(w[: len(p)] == p for w in wanted) for p in paths[1:])
    pairs = list(zip(tree.parent, tree.token, strict=True))
    assert len(set(pairs)) == len(pairs), "equal siblings are one node"
    if budget >= 4 * branches:
        assert all(w in paths for w in wanted)
    if wanted and budget:
        assert paths[tree.children(0)[0]] == wanted[0][:1], "the latest is tried first"


@given(texts, st.lists(st.integers(1, 7), max_size=12), st.integers(1, 4))
def test_the_growing_index_equals_a_fresh_one(
    tokens: list[int], growth: list[int], gamma: int
) -> None:
    drafter = CopySpec(gamma)
    growing = sequence(drafter, tokens[:1])
    for count in growth:
        growing.tokens += tokens[len(growing.tokens) : len(growing.tokens) + count]
        fresh = sequence(drafter, list(growing.tokens))
        assert drafter.propose([growing], [8]) == drafter.propose([fresh], [8])
        assert growing.draft_state == fresh.draft_state


def test_each_token_is_read_once() -> None:
    drafter = CopySpec()
    seen = sequence(drafter, [1, 2, 3])

    class Counting(list):  # type: ignore[type-arg]
        reads = 0

        def __getitem__(self, at: Any) -> Any:
            Counting.reads += isinstance(at, int)
            return super().__getitem__(at)

    seen.tokens = Counting(range(2000))
    drafter.propose([seen], [8])
    before = Counting.reads
    assert before <= 2 * 2000 + 3
    seen.tokens.append(7)
    drafter.propose([seen], [8])
    assert Counting.reads - before <= 4


def test_tokens_are_compared_and_not_only_their_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copyspec, "PRIME", 2)  # nearly every gram collides
    drafter = CopySpec(gamma=2, k=3)
    rng = random.Random(0)
    copies = 0
    for _ in range(300):
        tokens = [rng.randrange(4) for _ in range(rng.randrange(1, 30))]
        (tree,) = drafter.propose([sequence(drafter, tokens)], [3])
        ends = by_hand(tokens, 2)
        expected = continued(tokens, ends[0], 3) if ends else []
        assert tree.token[1:] == expected
        copies += bool(expected)
    assert copies > 100


def test_the_end_is_not_its_own_occurrence() -> None:
    drafter = CopySpec(gamma=2)
    assert len(drafter.propose([sequence(drafter, [5, 6, 7, 8])], [9])[0]) == 1
    one = sequence(drafter, [4, 4])
    assert len(drafter.propose([one], [9])[0]) == 1
    one.tokens.append(4)
    assert drafter.propose([one], [3])[0].token == [4, 4, 4, 4]


def test_looking_is_bounded() -> None:
    drafter = CopySpec(gamma=1, branches=3)
    same = sequence(drafter, [1] * 5000)
    drafter.propose([same], [9])
    assert sum(1 for _ in same.draft_state.occurrences(same.tokens)) == LOOKS


@pytest.mark.parametrize(("accepted", "length"), [(0, 1), (1, 3), (4, 9), (10, 21), (70, 100)])
def test_adapted_lengths(accepted: int, length: int) -> None:
    drafter = CopySpec(adapt=True)
    one = sequence(drafter, [1, 2, 3] * 90)
    tree = TokenTree.chain(range(80))
    seen = Outcome(one, 9, tree, list(range(accepted + 1)), [1], None)  # type: ignore[arg-type]
    plain = Outcome(one, 9, TokenTree.root(1), [0], [1], None)  # type: ignore[arg-type]
    drafter.observe([seen, plain])
    assert len(drafter.propose([one], [200])[0]) - 1 == length
    CopySpec().observe([seen])
    assert one.draft_state.length == length, "without adapt nothing is learned"


def test_rollback_forgets_what_was_cut_off() -> None:
    drafter = CopySpec(gamma=2)
    one = sequence(drafter, [1, 2, 3, 4, 1, 2, 9, 1, 2])
    assert drafter.propose([one], [1])[0].token == [2, 9]
    one.tokens = one.tokens[:6]
    drafter.rollback(one, 6)
    assert drafter.propose([one], [1])[0].token == [2, 3]


@pytest.mark.parametrize("bad", [{"k": 0}, {"gamma": 0}, {"branches": 0}])
def test_bad_parameters(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        CopySpec(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", ["gamma=2", "gamma=1,branches=3,k=6", "gamma=1,adapt=true"])
@pytest.mark.parametrize("temperature", [0.0, 0.4])
def test_the_same_text_in_fewer_passes(
    tiny: Callable[..., Decoder], settings: str, temperature: float
) -> None:
    """Also where only the last candidate is wrong, which must not earn the token behind it."""
    choices = f"draft=copyspec({settings})"
    world = World(tiny("llama"), drafts=None, choices=choices, blocks=40, budget=64)
    rng = random.Random(5)
    for seed in range(6):
        prompt = [rng.randrange(2, 61) for _ in range(12)] * 2
        params = SamplingParams(
            max_tokens=50, ignore_eos=True, seed=seed, temperature=temperature, n=1 + seed % 2
        )
        world.add(prompt, params)
    world.drain()
    statistics = world.engine.stats.speculation
    assert world.checked >= 6 and statistics.tokens > statistics.passes
    assert statistics.accepted < statistics.drafted
