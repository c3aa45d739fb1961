"""Nested: the draft model's own chains, in fewer passes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine, EngineConfig
from hasten.methods import MethodError
from hasten.models.base import Decoder
from hasten.models.loading import load_model
from hasten.speculation.drafters.nested import Nested, NestedDrafting
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack
from tests.engine.world import World, params_of, prompt_of
from tests.speculation.drafters.parts import Said
from tests.speculation.examples import tiny_draft, tiny_target
from tests.speculation.tree_checks import (
    check_trees,
    no_row_is_uninitialised,
    same_as_alone,
    trees_of,
    watch,
)

INNER = {
    "chains": "prompt-lookup(max_ngram=1)",
    "trees": "token-recycling",
    "joined": "fuse(of=prompt-lookup(max_ngram=1)|token-recycling)",
    "first": "any(of=copyspec(gamma=1)|aded)",
    "model": "model(path={path},k=2)",
    "tree of a model": "dyspec(path={path},n=6)",
    "ahead": "pearl(path={path},k=3)",
    "nested": "nested(path={path},k=3,of=copyspec(gamma=1))",
}


def nested(folder: Path, inner: str, k: int = 5, width: int = 2) -> str:
    path = tiny_draft(folder)
    return f"nested(of={INNER[inner].format(path=path)},path={path},k={k},width={width})"


Proposals = dict[tuple[int, int], tuple[list[int], dict[int, Any]]]


def proposals(
    target: Decoder, draft: str | Nested, params: Sequence[SamplingParams], verify: str
) -> tuple[Proposals, Engine, list[list[int]]]:
    """Token and laws of each proposal, by request and length of the text; the texts. Pages of the
    draft model start as NaN."""
    chosen = Stack.parse(f"draft={draft}")["draft"] if isinstance(draft, str) else draft
    stack = Stack.parse({"draft": chosen, "verify": verify, "control": "fixed(k=5)"})
    engine = Engine(target, stack, EngineConfig(max_sequences=3))
    no_row_is_uninitialised(engine)
    found: Proposals = {}
    propose = engine.drafting.propose

    def watched(sequences: Sequence[Any], budgets: Sequence[int]) -> list[TokenTree]:
        trees = propose(sequences, budgets)
        for sequence, tree in zip(sequences, trees, strict=True):
            assert tree.is_chain
            key = (requests.index(sequence.request), len(sequence.tokens))
            found[key] = (tree.token, tree.law)
        return trees

    engine.drafting.propose = watched  # type: ignore[method-assign]
    rng = random.Random(2)
    phrase = [rng.randrange(2, 61) for _ in range(7)]
    prompts = [phrase * 3 + phrase[:n] for n in range(1, 1 + len(params))]
    requests = [engine.add(p, each) for p, each in zip(prompts, params, strict=True)]
    while engine.has_work:
        for delta in engine.step():
            assert delta.sequence.error is None, delta.sequence.error
    return found, engine, [request.sequences[0].tokens for request in requests]


@pytest.mark.parametrize("inner", INNER)
def test_token_for_token_what_the_draft_model_proposes(
    tiny: Callable[..., Decoder], tmp_path: Path, inner: str
) -> None:
    """Greedy and drawn; after candidates of its own were found wrong, and the target's rejected
    some of what it wrote."""
    target, path = tiny_target(tiny), tiny_draft(tmp_path)
    params = [
        SamplingParams(max_tokens=50, temperature=t, seed=i, ignore_eos=True)
        for i, t in enumerate((0.0, 0.0, 0.7, 1.0))
    ]
    plain, engine, _ = proposals(target, f"model(path={path},k=5)", params, "chain")
    counts = engine.stats.speculation
    assert 20 < counts.accepted < counts.drafted - 20
    ours, _, _ = proposals(target, nested(tmp_path, inner), params, "chain")
    assert ours.keys() == plain.keys() and len(plain) > 40
    for key, (tokens, laws) in plain.items():
        assert ours[key][0] == tokens
        assert ours[key][1].keys() == laws.keys()
        assert all(np.array_equal(ours[key][1][node], law) for node, law in laws.items())


def test_fewer_passes_where_text_copies(tmp_path: Path) -> None:
    """The target is the draft model itself, so each chain is accepted; its greedy text repeats
    itself now and then, which the inner drafter copies."""
    folder = tiny_draft(tmp_path)
    target = load_model(folder, progress=False)
    params = [SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True)]
    plain, engine, (text,) = proposals(target, f"model(path={folder},k=5)", params, "sample-match")
    passes = engine.drafting.runtime.passes  # type: ignore[attr-defined]
    written = [len(tokens) - 1 for tokens, _ in plain.values()]
    assert passes == sum(written), "one pass a token"
    ours, engine, _ = proposals(target, nested(tmp_path, "chains"), params, "sample-match")
    assert ours == plain
    assert engine.drafting.runtime.passes < 0.8 * passes  # type: ignore[attr-defined]

    knows = Nested(Knows({}, text=text), str(folder), 5)
    ours, engine, _ = proposals(target, knows, params, "sample-match")
    assert ours == plain
    fewest = sum(min(count, 2) for count in written)
    assert engine.drafting.runtime.passes == fewest  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class Knows(Said):
    """Proposes what stands in a text."""

    text: list[int] = field(default_factory=list)

    def propose(self, sequences: Sequence[Any], budgets: Sequence[int]) -> list[TokenTree]:
        return [
            TokenTree.chain(self.text[len(s.tokens) - 1 : len(s.tokens) + budget])
            for s, budget in zip(sequences, budgets, strict=True)
        ]


def test_never_more_passes(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    """An inner drafter that is always wrong costs rows, not passes."""
    wrong = Wrong({})
    method = Nested(wrong, str(tiny_draft(tmp_path)), 5)
    engine = Engine(
        tiny_target(tiny), Stack({**Stack.parse("").methods, "draft": method}), EngineConfig()
    )
    seen = watch(engine)
    engine.add([5, 6, 7], SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
    while engine.has_work:
        engine.step()
    drafting = engine.drafting
    assert isinstance(drafting, NestedDrafting)
    asked = [len(tree) - 1 for _, tree, _ in seen if len(tree) > 1]
    assert drafting.runtime.passes == sum(asked) and len(asked) > 5


class Wrong(Said):
    """Proposes what the draft model never says, and is told what it says instead."""

    def propose(self, sequences: Sequence[Any], budgets: Sequence[int]) -> list[TokenTree]:
        return [
            TokenTree.chain([s.tokens[-1], *[0] * budget])
            for s, budget in zip(sequences, budgets, strict=True)
        ]

    def observe(self, outcomes: Sequence[Any]) -> None:
        for seen in outcomes:
            tokens = seen.sequence.tokens
            assert tokens[seen.start :] == [seen.tree.token[0], *seen.tokens]
            assert seen.path == [0] and len(seen.tokens) == 1
            assert seen.logits.shape == (len(seen.tree), 61)
            assert seen.tokens == [int(seen.logits[0].argmax())] and seen.tokens != [0]


def test_the_inner_drafter_follows_the_text(tmp_path: Path) -> None:
    """It sees what the draft model wrote, and is rolled back to what the target kept of it."""
    inner = Said({})
    drafting = at_work(tmp_path, inner)
    sequence = opened(drafting, [3, 1, 4])
    (tree,) = drafting.propose([sequence], [4])
    assert inner.log[0] == ("open", 4)
    written = tree.token[1:]
    view = sequence.draft_state.view
    assert len(written) == 4 and view.tokens == [3, 1, 4, *written]
    # asked behind each token for those that are missing but one, which the pass itself gives
    assert inner.log[1:] == [("propose", [t], [2 - i]) for i, t in enumerate(written[:3])]

    other = (written[1] + 1) % 61
    sequence.tokens += [written[0], other]
    inner.log.clear()
    drafting.propose([sequence], [1])
    assert inner.log == [("rollback", 4)], "the first token was right"
    assert view.tokens[:5] == sequence.tokens
    inner.log.clear()
    sequence.tokens += [view.tokens[5], 7]
    drafting.propose([sequence], [1])
    assert inner.log == [] and view.tokens[:7] == sequence.tokens

    del sequence.tokens[2:]
    drafting.rollback(sequence, 2)
    assert inner.log == [("rollback", 2)] and view.tokens == [3, 1]
    drafting.close(sequence)
    assert inner.log[-1] == ("close", "state")


def at_work(folder: Path, inner: Any, k: int = 5) -> NestedDrafting:
    engine = Engine(
        load_model(tiny_draft(folder), progress=False),
        Stack({**Stack.parse("").methods, "draft": Nested(inner, str(tiny_draft(folder)), k)}),
        EngineConfig(max_sequences=2),
    )
    assert isinstance(engine.drafting, NestedDrafting)
    return engine.drafting


def opened(drafting: NestedDrafting, tokens: list[int]) -> Any:
    from tests.speculation.test_draft_model import sequence

    made = sequence(tokens)
    made.num_prompt, made.stream = len(tokens), None
    made.draft_state = drafting.open(made)
    return made


@pytest.mark.parametrize(("verify", "drawn"), [("sample-match", False), ("chain", True)])
def test_chains(tmp_path: Path, verify: str, drawn: bool) -> None:
    seen = trees_of(tmp_path, nested(tmp_path, "joined"), verify, temperature=0.8, budget=4)
    check_trees(seen, drawn=drawn)
    assert all(tree.is_chain for _, tree, _ in seen)


@pytest.mark.parametrize("inner", INNER)
def test_the_same_as_alone(tiny: Callable[..., Decoder], tmp_path: Path, inner: str) -> None:
    world = same_as_alone(tiny_target(tiny), nested(tmp_path, inner), seed=3)
    assert world.engine.stats.preemptions
    held = world.engine.drafting.inner  # type: ignore[attr-defined]
    if hasattr(held, "runtime"):
        assert all(pool.num_held == 0 for pool in held.runtime.cache.pools), "inner pages leak"


def test_no_room_for_candidates(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    """The draft model's pool is short of pages most of the time."""
    world = World(
        tiny_target(tiny), drafts=None, choices=f"draft={nested(tmp_path, 'trees')}", blocks=8
    )
    drafting = world.engine.drafting
    assert isinstance(drafting, NestedDrafting)
    room, refused = drafting.runtime.room, 0
    rng = random.Random(5)

    def short(state: Any, nodes: int) -> bool:
        nonlocal refused
        taken = rng.random() < 0.5
        refused += taken
        return not taken and room(state, nodes)

    drafting.runtime.room = short  # type: ignore[method-assign]
    for _ in range(12):
        world.add(prompt_of(rng, 61, rng.randint(1, 30)), params_of(rng, 61))
    world.drain()
    assert refused > 20 and world.checked >= 12


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        ("k=1", "the first token needs no drafter"),
        ("width=0", "at least one candidate"),
        ("of=none", "none proposes nothing"),
        ("of=del", "of=del cannot draft for a draft model"),
        ("of=fuse(of=copyspec|scripted)", "of=scripted cannot draft for a draft model"),
    ],
)
def test_bad_parameters(inside: str, words: str) -> None:
    with pytest.raises(MethodError) as error:
        Stack.parse(f"draft=nested({inside})")
    assert words in str(error.value)
