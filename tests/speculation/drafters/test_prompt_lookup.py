"""Prompt lookup against a search by hand, and inside an engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine, EngineConfig
from hasten.models.base import Decoder
from hasten.speculation.drafters.prompt_lookup import UNDO, PromptLookup
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack

texts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def by_hand(tokens: list[int], longest: int, shortest: int, count: int) -> list[int]:
    """Longest n-gram at the end that occurs earlier; of its occurrences the latest. What follows
    it is read token by token, from the proposal itself once the text is over."""
    for n in range(longest, shortest - 1, -1):
        tail = tokens[len(tokens) - n :]
        if n >= len(tokens):
            continue
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tail:
                text = list(tokens)
                for i in range(count):
                    text.append(text[start + n + i])
                return text[len(tokens) :]
    return []


@given(texts, st.integers(1, 4), st.integers(0, 3), st.integers(1, 9), st.integers(0, 12))
def test_the_latest_earlier_match(
    tokens: list[int], low: int, more: int, k: int, budget: int
) -> None:
    drafter = PromptLookup(k=k, min_ngram=low, max_ngram=low + more)
    sequence = SimpleNamespace(tokens=tokens, draft_state=drafter.open(None))
    (tree,) = drafter.propose([sequence], [budget])
    expected = by_hand(tokens, low + more, low, min(k, budget))
    assert tree == TokenTree.chain([tokens[-1], *expected])
    assert len(tree) - 1 <= min(k, budget)


@given(texts, st.integers(1, 4), st.integers(0, 3))
def test_a_grade_counts_how_far_back_the_match_goes(tokens: list[int], low: int, more: int) -> None:
    drafter = PromptLookup(min_ngram=low, max_ngram=low + more)
    sequence = SimpleNamespace(tokens=tokens, draft_state=drafter.open(None))
    expected = 0
    for n in range(min(low + more, len(tokens) - 1), low - 1, -1):
        tail = tokens[len(tokens) - n :]
        starts = [s for s in range(len(tokens) - n) if tokens[s : s + n] == tail]
        if starts:
            after, same = starts[-1] + n, n
            while tokens[:after][-same - 1 :] == tokens[-same - 1 :] and same < after:
                same += 1
            expected = 1 if same == 1 else 2 if same < 4 else 3 if same < 8 else 4
            break
    assert drafter.grade(sequence) == expected
    (tree,) = drafter.propose([sequence], [1])
    assert (len(tree) > 1) == (expected > 0)


@given(texts, st.lists(st.integers(1, 7), max_size=12), st.integers(1, 4))
def test_the_growing_index_equals_a_fresh_one(
    tokens: list[int], growth: list[int], longest: int
) -> None:
    drafter = PromptLookup(max_ngram=longest)
    sequence = SimpleNamespace(tokens=tokens[:1], draft_state=drafter.open(None))
    for count in growth:
        sequence.tokens += tokens[len(sequence.tokens) : len(sequence.tokens) + count]
        (tree,) = drafter.propose([sequence], [8])
        fresh = SimpleNamespace(tokens=sequence.tokens, draft_state=drafter.open(None))
        assert drafter.propose([fresh], [8]) == [tree]
        assert fresh.draft_state == sequence.draft_state


def test_rollback_forgets_what_was_cut_off() -> None:
    drafter = PromptLookup()
    sequence = SimpleNamespace(tokens=[1, 2, 3, 4, 1, 2, 9, 1, 2], draft_state=drafter.open(None))
    assert drafter.propose([sequence], [1])[0].token == [2, 9]
    index = sequence.draft_state
    sequence.tokens = sequence.tokens[:6]
    drafter.rollback(sequence, 6)
    assert sequence.draft_state is index, "a short cut is taken back step by step"
    assert drafter.propose([sequence], [1])[0].token == [2, 3]


@given(texts, st.lists(st.integers(-UNDO - 9, UNDO + 9), max_size=12), st.integers(1, 4))
def test_a_cut_index_equals_a_fresh_one(
    tokens: list[int], changes: list[int], longest: int
) -> None:
    """Grown and cut by turns, by less and by more than can be taken back step by step."""
    drafter = PromptLookup(max_ngram=longest)
    tokens = (tokens * 40)[: len(tokens) + 99]
    sequence = SimpleNamespace(tokens=tokens[:50], draft_state=drafter.open(None))
    drafter.propose([sequence], [1])
    for change in changes:
        length = max(1, len(sequence.tokens) + change)
        if change < 0:
            del sequence.tokens[length:]
            drafter.rollback(sequence, length)
        sequence.tokens += [token ^ 1 for token in tokens[len(sequence.tokens) : length]]
        trees = drafter.propose([sequence], [8])
        fresh = SimpleNamespace(tokens=sequence.tokens, draft_state=drafter.open(None))
        assert drafter.propose([fresh], [8]) == trees
        assert fresh.draft_state == sequence.draft_state


def test_sequences_do_not_see_each_other() -> None:
    drafter = PromptLookup()
    both = [
        SimpleNamespace(tokens=[5, 6, 7, 5], draft_state=drafter.open(None)),
        SimpleNamespace(tokens=[6, 8, 5], draft_state=drafter.open(None)),
    ]
    assert [tree.token for tree in drafter.propose(both, [8, 8])] == [
        [5, 6, 7, 5, 6, 7, 5, 6, 7],
        [5],
    ]


@pytest.mark.parametrize(
    "bad", [{"k": 0}, {"min_ngram": 0}, {"min_ngram": 3, "max_ngram": 2}, {"max_ngram": 65}]
)
def test_bad_parameters(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        PromptLookup(**bad)


def test_the_same_text_in_fewer_steps(tiny: Callable[..., Decoder]) -> None:
    model = tiny("llama")
    rng = random.Random(5)
    prompt = [rng.randrange(2, 61) for _ in range(21)] * 2
    outputs, steps = [], []
    for text in ("plain", "draft=prompt-lookup(k=5)"):
        engine = Engine(model, Stack.parse(text), EngineConfig(max_sequences=2))
        request = engine.add(prompt, SamplingParams(max_tokens=120, ignore_eos=True))
        while engine.has_work:
            engine.step()
        outputs.append(request.sequences[0].tokens)
        steps.append(engine.stats.steps)
        seen = engine.stats.speculation
        assert request.sequences[0].figures.speculation == seen
        assert seen.accepted <= seen.drafted
    assert outputs[0] == outputs[1]
    assert steps[1] == steps[0] - seen.accepted < steps[0]
