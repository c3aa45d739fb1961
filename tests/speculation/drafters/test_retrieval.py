"""Retrieval against a search by hand, and inside an engine."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten import _native
from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine
from hasten.methods import MethodError
from hasten.models.base import Decoder
from hasten.speculation.datastore import Datastore, sorted_places, write
from hasten.speculation.drafters.retrieval import Retrieval, RetrievalDrafting
from hasten.stack import Stack
from tests.engine.world import World

texts = st.lists(st.integers(-1, 2), min_size=1, max_size=80)
contexts = st.lists(st.integers(0, 2), min_size=1, max_size=9)


def store_of(tokens: list[int]) -> Datastore:
    ids = torch.tensor(tokens, dtype=torch.int32)
    return Datastore(Path("none"), ids, sorted_places(ids))


def saved(path: Path, tokens: list[int]) -> Path:
    write(path, torch.tensor(tokens, dtype=torch.int32), "")
    return path


def by_hand(
    text: list[int], context: list[int], shortest: int, longest: int, length: int
) -> Counter[tuple[int, ...]]:
    """How often each continuation of the longest end of the context occurs."""
    for size in range(min(longest, len(context)), shortest - 1, -1):
        end = context[len(context) - size :]
        places = [i for i in range(len(text)) if text[i : i + size] == end]
        if places:
            found: Counter[tuple[int, ...]] = Counter()
            for place in places:
                for more in range(1, length + 1):
                    path = text[place + size : place + size + more]
                    if len(path) == more and -1 not in path:
                        found[tuple(path)] += 1
            return found
    return Counter()


@given(texts, contexts, st.integers(1, 3), st.integers(0, 4), st.integers(1, 5), st.integers(0, 12))
def test_the_most_frequent_continuations(
    text: list[int], context: list[int], shortest: int, more: int, length: int, budget: int
) -> None:
    drafter = Retrieval("x", 9, shortest + more, shortest, length)
    drafting = RetrievalDrafting(drafter, store_of(text))
    (tree,) = drafting.propose([SimpleNamespace(tokens=context)], [budget])  # type: ignore[list-item]
    expected = by_hand(text, context, shortest, shortest + more, length)
    nodes = min(budget, 9)
    paths = [tuple(tree.path(node)) for node in range(1, len(tree))]
    assert tree.token[0] == context[-1] and len(set(paths)) == len(paths)
    counts = sorted((expected[path] for path in paths), reverse=True)
    assert counts == sorted(expected.values(), reverse=True)[:nodes], "none is more frequent"
    for node in range(len(tree)):
        order = [expected[tuple(tree.path(child))] for child in tree.children(node)]
        assert order == sorted(order, reverse=True), "the likeliest is tried first"


@given(st.lists(st.integers(-1, 1), min_size=1, max_size=200))
def test_places_are_sorted_by_what_stands_there(tokens: list[int]) -> None:
    places = sorted_places(torch.tensor(tokens, dtype=torch.int32)).tolist()
    depth = _native.SUFFIX_DEPTH
    assert places == sorted(range(len(tokens)), key=lambda i: (tokens[i : i + depth], i))


def test_many_occurrences_are_counted_evenly() -> None:
    rng = random.Random(0)
    text = [t for _ in range(3000) for t in (1, 2, rng.choices([3, 4, 5], [6, 3, 1])[0])]
    store = store_of(text)

    def counts(hits: int) -> dict[int, int]:
        matched, looked_at, tokens, parents, count = _native.continuations(
            store.tokens, store.sorted, [0, 1, 2], 1, 9, 1, 3, hits
        )
        assert matched == 2 and looked_at == min(hits, 3000) and parents == [-1] * 3
        return dict(zip(tokens, count, strict=True))

    exact, sampled = counts(10_000), counts(500)
    assert exact == Counter(text[2::3])
    assert all(abs(sampled[t] - exact[t] / 6) <= 1 for t in (3, 4, 5))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"nodes": 0}, "nodes=0 must be at least 1"),
        ({"shortest": 0}, "shortest=0 must be"),
        ({"hits": 1_000_001}, "hits=1000001 must be at most 1000000"),
        ({"longest": 1}, "longest=1 is below shortest=2"),
        ({"length": 17}, "longest \\+ length is 33"),
    ],
)
def test_bad_parameters(bad: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Retrieval("x", **bad)  # type: ignore[arg-type]


def test_without_a_file_it_does_not_start(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="build the file with: hasten datastore build"):
        Engine(tiny("llama"), Stack.parse("draft=retrieval"))
    with pytest.raises(MethodError, match="no such file"):
        Engine(tiny("llama"), Stack.parse(f"draft=retrieval(file={tmp_path}/x)"))
    beyond = saved(tmp_path / "beyond", [4, 61, -1])
    with pytest.raises(MethodError, match="'tokens' holds what it must not"):
        Engine(tiny("llama"), Stack.parse(f"draft=retrieval(file={beyond})"))


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_the_same_text_in_fewer_passes(
    tiny: Callable[..., Decoder], tmp_path: Path, temperature: float
) -> None:
    model = tiny("llama")
    rng = random.Random(1)
    prompts = [[rng.randrange(2, 61) for _ in range(11)] for _ in range(6)]
    settings = [
        SamplingParams(max_tokens=40, seed=i, temperature=temperature, n=1 + i % 2, ignore_eos=True)
        for i in range(6)
    ]
    plain = World(model, drafts=None, blocks=30)
    for prompt, params in zip(prompts, settings, strict=True):
        plain.add(prompt, params)
    plain.drain()
    outputs = [s.tokens for r in plain.requests.values() for s in r.sequences]
    half = [t for tokens in outputs for t in [*tokens[: len(tokens) // 2], -1]]
    path = saved(tmp_path / "half.store", half)
    world = World(model, drafts=None, choices=f"draft=retrieval(file={path})", blocks=9)
    for prompt, params in zip(prompts, settings, strict=True):
        world.add(prompt, params)
    world.drain()
    statistics = world.engine.stats.speculation
    assert world.checked >= 6 and statistics.accepted > 40
