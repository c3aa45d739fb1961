"""Sample-match: the law of the output is the target's, whatever the tree, computed exactly."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from hasten.decoding.sampling import Distribution
from hasten.speculation.tree import TokenTree
from hasten.speculation.verifiers.sample_match import SampleMatch

Verify = Callable[..., tuple[list[int], list[int]]]
DEPTH = 4  # one more than the deepest tree: the token after the last candidate counts too


class Target:
    """A Markov model of order two in a table, and its tokens at the quantiles of a position."""

    def __init__(self, vocab: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.vocab = vocab
        self.table = rng.dirichlet(np.full(vocab, 0.7), size=(vocab, vocab))

    def law(self, history: list[int]) -> NDArray[np.float64]:
        return self.table[history[-2], history[-1]]


def random_tree(rng: random.Random, vocab: int, root: int) -> TokenTree:
    """Depth at most 3; siblings may carry the same token."""
    tokens, parents, depth = [root], [-1], [0]
    for level in range(1, 4):
        above = [i for i, d in enumerate(depth) if d == level - 1]
        for parent in sorted(rng.choices(above, k=rng.randint(0, 4))) if above else []:
            tokens.append(rng.randrange(vocab))
            parents.append(parent)
            depth.append(level)
    return TokenTree(tokens, parents)


def decode(
    verify: Verify, tree: TokenTree, history: list[int], draw: Callable[[list[int], int], int]
) -> list[int]:
    """Tokens after the root, until there are DEPTH: one verified step, then plain ones.

    ``draw(history, turn)`` is the target's choice; the turn counts positions after the root.
    """
    tokens = list(history)

    def choose(node: int) -> int:
        seen = [tree.token[a] for a in range(1, len(tree)) if tree.ancestors()[node] >> a & 1]
        assert tokens == history + seen, "a node is judged by the history of its own path"
        return draw(tokens, len(tokens) - len(history))

    def ends(token: int) -> bool:
        tokens.append(token)
        return False

    path, out = verify(tree, choose, ends)
    assert tokens == history + out and path[0] == 0
    assert [tree.token[node] for node in path[1:]] == out[:-1], "accepted = all output but the last"
    assert all(tree.parent[b] == a for a, b in itertools.pairwise(path))
    while len(tokens) < len(history) + DEPTH:
        tokens.append(draw(tokens, len(tokens) - len(history)))
    return tokens[len(history) : len(history) + DEPTH]


class Scripted:
    """A target whose choices are given; beyond the script it takes 0 and notes the other ways."""

    def __init__(self, target: Target, script: list[int], todo: list[list[int]]) -> None:
        self.target, self.script, self.todo = target, script, todo
        self.turn, self.weight = 0, 1.0

    def draw(self, seen: list[int], _: int) -> int:
        if self.turn == len(self.script):
            self.todo += [[*self.script, token] for token in range(1, self.target.vocab)]
            self.script.append(0)
        token = self.script[self.turn]
        self.turn += 1
        self.weight *= self.target.law(seen)[token]
        return token


def output_law(
    verify: Verify, target: Target, tree: TokenTree, history: list[int]
) -> dict[tuple[int, ...], float]:
    """Exact: all ways in which the choices of the target can fall, with their probabilities.

    A choice is a branch; runs are repeated with every prefix of choices until none is open.
    """
    law: dict[tuple[int, ...], float] = {}
    todo: list[list[int]] = [[]]
    while todo:
        run = Scripted(target, todo.pop(), todo)
        out = tuple(decode(verify, tree, history, run.draw))
        law[out] = law.get(out, 0.0) + run.weight
    return law


def plain_law(target: Target, history: list[int]) -> dict[tuple[int, ...], float]:
    law = {}
    for out in itertools.product(range(target.vocab), repeat=DEPTH):
        tokens, weight = list(history), 1.0
        for token in out:
            weight *= target.law(tokens)[token]
            tokens.append(token)
        law[out] = weight
    return law


def accept_first(tree: TokenTree, choose: Callable, ends: Callable) -> tuple[list, list]:
    """Planted bias: trusts the first child."""
    path, out = [0], []
    while children := tree.children(path[-1]):
        out.append(tree.token[children[0]])
        ends(out[-1])
        path.append(children[0])
    out.append(choose(path[-1]))
    ends(out[-1])
    return path, out


def redraw_after_miss(tree: TokenTree, choose: Callable, ends: Callable) -> tuple[list, list]:
    """Planted bias: where no child carries the target's token, it draws once more."""
    path, out = [0], []
    while True:
        y = choose(path[-1])
        children = [c for c in tree.children(path[-1]) if tree.token[c] == y]
        if tree.children(path[-1]) and not children:
            y = choose(path[-1])
        out.append(y)
        ends(y)
        if not children:
            return path, out
        path.append(children[0])


CASES = [(3, 0), (3, 1), (3, 2), (4, 3), (4, 4), (5, 5)]


def distance(verify: Verify, vocab: int, seed: int) -> float:
    rng = random.Random(seed)
    target = Target(vocab, seed)
    history = [rng.randrange(vocab), rng.randrange(vocab)]
    tree = random_tree(rng, vocab, history[-1])
    while len(tree) < 5:
        tree = random_tree(rng, vocab, history[-1])
    law, plain = output_law(verify, target, tree, history), plain_law(target, history)
    assert abs(sum(law.values()) - 1) < 1e-12 and law.keys() <= plain.keys()
    return max(abs(law.get(out, 0.0) - p) for out, p in plain.items())


@pytest.mark.parametrize(("vocab", "seed"), CASES)
def test_the_law_of_the_output_is_the_targets(vocab: int, seed: int) -> None:
    assert distance(SampleMatch().verify, vocab, seed) < 1e-12


@pytest.mark.parametrize("biased", [accept_first, redraw_after_miss])
def test_a_planted_bias_is_noticed(biased: Verify) -> None:
    assert min(distance(biased, vocab, seed) for vocab, seed in CASES[:3]) > 1e-3


def test_the_same_numbers_give_the_same_text() -> None:
    """Stronger than the law: the draws belong to positions, so no tree changes the text."""
    for seed in range(60):
        rng = random.Random(seed)
        target = Target(5, seed)
        history = [rng.randrange(5), rng.randrange(5)]
        u = [rng.random() for _ in range(DEPTH + 1)]

        def draw(seen: list[int], turn: int) -> int:
            return Distribution(np.arange(5), target.law(seen)).draw(u[turn])  # noqa: B023

        trees = [TokenTree.root(history[-1])]
        trees += [random_tree(rng, 5, history[-1]) for _ in range(8)]
        outs = {tuple(decode(SampleMatch().verify, tree, history, draw)) for tree in trees}
        assert len(outs) == 1


@pytest.mark.parametrize(
    ("last", "path", "expected"),
    [
        (1, [0], [1]),
        (2, [0, 1], [1, 2]),
        (7, [0, 1, 3], [1, 2, 7]),
        (None, [0, 1, 3], [1, 2, 7]),
    ],
)
def test_nothing_follows_an_end(last: int | None, path: list[int], expected: list[int]) -> None:
    tree = TokenTree([9, 1, 1, 2, 3], [-1, 0, 0, 1, 2])
    script = {0: 1, 1: 2, 3: 7}
    out: list[int] = []

    def ends(token: int) -> bool:
        out.append(token)
        return token == last

    assert SampleMatch().verify(tree, script.__getitem__, ends) == (path, expected)
    assert out == expected


def test_a_miss_and_a_plain_step() -> None:
    tree = TokenTree([9, 1, 2], [-1, 0, 0])
    assert SampleMatch().verify(tree, lambda _: 3, lambda _: False) == ([0], [3])
    assert SampleMatch().verify(TokenTree.root(9), lambda _: 3, lambda _: False) == ([0], [3])
    assert SampleMatch().verify(tree, lambda node: 2, lambda _: False) == ([0, 2], [2, 2])
