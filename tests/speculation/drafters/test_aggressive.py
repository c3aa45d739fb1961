"""Input-guided drafting: the rest of the source, and how it is found again after a change."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.decoding.params import SamplingParams
from hasten.methods import MethodError
from hasten.models.base import Decoder
from hasten.models.loading import locate
from hasten.models.tokenizer import Tokenizer
from hasten.speculation.drafters.aggressive import Aggressive
from hasten.stack import Stack
from tests.conftest import favorite_successors
from tests.engine.world import World
from tests.speculation.drafters.parts import context
from tests.speculation.examples import tiny_target


def drafted(prompt: list[int], output: list[int], budget: int = 99, k: int = 64) -> list[int]:
    sequence: Any = SimpleNamespace(
        tokens=prompt + output, num_prompt=len(prompt), draft_state=None
    )
    (tree,) = Aggressive(k).start(context()).propose([sequence], [budget])
    assert tree.is_chain and tree.token[0] == sequence.tokens[-1]
    return tree.token[1:]


def test_the_first_draft_is_the_source() -> None:
    assert drafted([5, 6, 7], []) == [5, 6, 7]
    assert drafted([5, 6, 7], [], budget=2) == [5, 6] == drafted([5, 6, 7], [], k=2)
    assert drafted([5, 6, 7], [], budget=0) == []


def test_after_a_change_the_output_is_found_again_at_one_place_only() -> None:
    prompt = [1, 2, 3, 4, 2, 5, 6]
    assert drafted(prompt, [1, 2, 3]) == [4, 2, 5, 6], "the output follows the source"
    assert drafted(prompt, [1, 9]) == [], "9 is nowhere"
    assert drafted(prompt, [9, 2]) == [], "2 stands at two places, and 9 2 nowhere"
    assert drafted(prompt, [9, 4, 2]) == [5, 6], "4 2 stands at one"
    assert drafted(prompt, [9, 5]) == [6]
    assert drafted(prompt, [9, 6]) == [], "the input's end is not the output's end"
    assert drafted([7, 7, 7], [9, 7, 7]) == [], "ends that stay ambiguous are not taken"


def test_drafting_goes_on_after_many_changes() -> None:
    """The paper's case: it must not stop for ever at the first mismatch."""
    rng = random.Random(0)
    source = rng.sample(range(10, 400), 200)
    output = [t if i % 20 != 7 else 500 + i for i, t in enumerate(source)]
    sequence: Any = SimpleNamespace(tokens=list(source), num_prompt=200, draft_state=None)
    drafting = Aggressive().start(context())
    passes = 0
    while len(sequence.tokens) < 400:
        (tree,) = drafting.propose([sequence], [64])
        at = len(sequence.tokens) - 200
        accepted = 0
        while accepted < len(tree) - 1 and tree.token[accepted + 1] == output[at + accepted]:
            accepted += 1
        sequence.tokens += output[at : at + accepted + 1]
        passes += 1
    changes = 10
    assert passes <= 2 * changes + 1


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=25), st.lists(st.integers(0, 3), max_size=25)
)
def test_against_a_search_by_hand(prompt: list[int], output: list[int]) -> None:
    """Token by token: on the track the next place, else behind the shortest unique end."""
    place: int | None = 0
    for i, token in enumerate(output):
        if place is not None and place < len(prompt) and prompt[place] == token:
            place += 1
            continue
        place = None
        for size in range(1, i + 2):
            end = output[i + 1 - size : i + 1]
            found = [p for p in range(len(prompt)) if prompt[p : p + size] == end]
            if len(found) == 1:
                place = found[0] + size
            if len(found) < 2:
                break
    sequence: Any = SimpleNamespace(tokens=list(prompt), num_prompt=len(prompt), draft_state=None)
    drafting = Aggressive().start(context())
    for token in output:
        drafting.propose([sequence], [4])
        sequence.tokens.append(token)
    (tree,) = drafting.propose([sequence], [50])
    assert tree.token[1:] == ([] if place is None else prompt[place : place + 50])


@pytest.mark.parametrize(
    ("text", "begin", "end", "source"),
    [
        ("Fix this: <text>a = 1</text> now", "<text>", "</text>", "a = 1"),
        ("<text>old</text> and <text>b = 2\n</text>", "<text>", "</text>", "b = 2\n"),
        ("Fix: <text>no end", "<text>", "</text>", "no end"),
        ("</text> x <text>later", "<text>", "</text>", "later"),
        ("say: after this", "say:", "", " after this"),
        ("nothing here", "<text>", "", ""),
        ("<text></text>", "<text>", "</text>", ""),
    ],
)
def test_the_source_between_markers(text: str, begin: str, end: str, source: str) -> None:
    tokenizer = Tokenizer.load(locate("reference"))
    drafting = Aggressive(begin=begin, end=end).start(replace(context(), tokenizer=tokenizer))
    prompt = tokenizer.encode(text)
    sequence: Any = SimpleNamespace(tokens=prompt, num_prompt=len(prompt), draft_state=None)
    (tree,) = drafting.propose([sequence], [64])
    found = b"".join(map(tokenizer.token_bytes, tree.token[1:])).decode()
    # a token that holds a part of a marker is left out
    assert found == source or (found and found in source and len(source) - len(found) < 4)


def test_bad_parameters() -> None:
    with pytest.raises(MethodError, match="k=0: propose at least one token"):
        Stack.parse("draft=aggressive(k=0)")
    with pytest.raises(MethodError, match="end needs begin"):
        Stack.parse("draft=aggressive(end=x)")
    with pytest.raises(MethodError, match="without a tokenizer; leave them out"):
        Aggressive(begin="x").start(context())


def test_rollback_reads_again() -> None:
    sequence: Any = SimpleNamespace(tokens=[5, 6, 7, 8, 5, 9], num_prompt=4, draft_state=None)
    drafting = Aggressive().start(context())
    assert drafting.propose([sequence], [9])[0].token == [9]
    sequence.tokens = [5, 6, 7, 8, 5]
    drafting.rollback(sequence, 5)
    assert drafting.propose([sequence], [9])[0].token == [5, 6, 7, 8]


@pytest.mark.parametrize("temperature", [0.0, 0.4])
def test_under_load(tiny: Callable[..., Decoder], temperature: float) -> None:
    world = World(tiny_target(tiny), drafts=None, choices="draft=aggressive(k=9)", blocks=9)
    rng, favorites = random.Random(2), favorite_successors(61).tolist()
    for seed in range(8):
        prompt = [rng.randrange(2, 61)]
        while len(prompt) < 20:  # the text that the model tends to, with changes
            prompt.append(rng.randrange(2, 61) if rng.random() < 0.2 else favorites[prompt[-1]])
        prompt.append(prompt[3])
        params = SamplingParams(
            max_tokens=30, seed=seed, temperature=temperature, n=1 + seed % 2, ignore_eos=True
        )
        world.add(prompt, params)
    world.drain()
    seen = world.engine.stats.speculation
    assert world.checked >= 8 and seen.examined > seen.accepted > 10
