"""Sample-match: the law of the output is the target's, whatever the tree, computed exactly."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hasten.decoding.sampling import Distribution
from hasten.speculation.tree import TokenTree
from hasten.speculation.verifiers.sample_match import SampleMatch
from tests.speculation.verifiers.harness import (
    DEPTH,
    EnumeratedWalk,
    Markov,
    Verify,
    random_tree,
    total_variation,
)


def accept_first(tree: TokenTree, walk: Any) -> list[int]:
    """Planted bias: trusts the first child."""
    path = [0]
    while children := tree.children(path[-1]):
        walk.emit(path[-1], tree.token[children[0]])
        path.append(children[0])
    walk.emit(path[-1], walk.choose(path[-1]))
    return path


def redraw_after_miss(tree: TokenTree, walk: Any) -> list[int]:
    """Planted bias: where no child carries the target's token, it draws once more."""
    path = [0]
    while True:
        y = walk.choose(path[-1])
        children = [c for c in tree.children(path[-1]) if tree.token[c] == y]
        if tree.children(path[-1]) and not children:
            y = walk.choose(path[-1])
            if y in [tree.token[c] for c in tree.children(path[-1])]:
                children = [c for c in tree.children(path[-1]) if tree.token[c] == y]
        walk.emit(path[-1], y)
        if not children:
            return path
        path.append(children[0])


CASES = [(3, 0), (3, 1), (3, 2), (4, 3), (4, 4), (5, 5)]


def distance(verify: Verify, vocab: int, seed: int) -> float:
    rng = random.Random(seed)
    history = [rng.randrange(vocab), rng.randrange(vocab)]
    tree = random_tree(rng, vocab, history[-1])
    while len(tree) < 5:
        tree = random_tree(rng, vocab, history[-1])
    return total_variation(verify, lambda _, __: tree, Markov(vocab, seed), history)


@pytest.mark.parametrize(("vocab", "seed"), CASES)
def test_the_law_of_the_output_is_the_targets(vocab: int, seed: int) -> None:
    assert distance(SampleMatch().verify, vocab, seed) < 1e-12


@pytest.mark.parametrize("biased", [accept_first, redraw_after_miss])
def test_a_planted_bias_is_noticed(biased: Verify) -> None:
    assert min(distance(biased, vocab, seed) for vocab, seed in CASES[:3]) > 1e-3


class Numbered(EnumeratedWalk):
    """Draws with a given number for each position, as the engine does."""

    def __init__(self, target: Markov, tree: TokenTree, history: list[int], u: list[float]) -> None:
        super().__init__(target, tree, history, None)  # type: ignore[arg-type]
        self.u = u

    def choose(self, node: int) -> int:
        return self.plain()

    def plain(self) -> int:
        law = Distribution(np.arange(self.target.vocab), self.target.law(self.tokens))
        token = law.draw(self.u[len(self.tokens) - self.start])
        assert token is not None
        return token


def test_the_same_numbers_give_the_same_text() -> None:
    """Stronger than the law: the draws belong to positions, so no tree changes the text."""
    for seed in range(60):
        rng = random.Random(seed)
        history = [rng.randrange(5), rng.randrange(5)]
        u = [rng.random() for _ in range(DEPTH + 1)]
        trees = [TokenTree.root(history[-1])]
        trees += [random_tree(rng, 5, history[-1]) for _ in range(8)]
        outs = set()
        for tree in trees:
            walk = Numbered(Markov(5, seed), tree, history, u)
            SampleMatch().verify(tree, walk)
            while len(walk.tokens) < 2 + DEPTH:
                walk.tokens.append(walk.plain())
            outs.add(tuple(walk.tokens[: 2 + DEPTH]))
        assert len(outs) == 1


def scripted(script: dict[int, int], last: int | None) -> tuple[Any, list[int]]:
    out: list[int] = []

    def emit(node: int, token: int) -> bool:
        out.append(token)
        return token == last

    return SimpleNamespace(choose=script.__getitem__, emit=emit), out


@pytest.mark.parametrize(
    ("last", "path", "expected"),
    [
        (1, [0, 1], [1]),
        (2, [0, 1, 3], [1, 2]),
        (7, [0, 1, 3], [1, 2, 7]),
        (None, [0, 1, 3], [1, 2, 7]),
    ],
)
def test_nothing_follows_an_end(last: int | None, path: list[int], expected: list[int]) -> None:
    tree = TokenTree([9, 1, 1, 2, 3], [-1, 0, 0, 1, 2])
    walk, out = scripted({0: 1, 1: 2, 3: 7}, last)
    assert SampleMatch().verify(tree, walk) == path
    assert out == expected


@pytest.mark.parametrize(("token", "path", "out"), [(3, [0], [3]), (2, [0, 2], [2, 2])])
def test_a_miss_and_a_hit(token: int, path: list[int], out: list[int]) -> None:
    walk, seen = scripted(dict.fromkeys(range(3), token), None)
    assert SampleMatch().verify(TokenTree([9, 1, 2], [-1, 0, 0]), walk) == path
    assert seen == out


def test_a_plain_step() -> None:
    walk, seen = scripted({0: 3}, None)
    assert SampleMatch().verify(TokenTree.root(9), walk) == [0] and seen == [3]
