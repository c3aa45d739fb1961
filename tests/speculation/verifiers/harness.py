"""Exact laws: everything random that a drafter and a verifier do, followed in all its outcomes.

A run takes its choices from a script; where the script ends it takes the first outcome and notes
the others, so that repeating it until nothing is noted visits every outcome with its probability.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hasten.speculation.tree import TokenTree

Law = NDArray[np.float64]
DEPTH = 4
"""Tokens whose joint law is compared: one more than the deepest tree."""


class Markov:
    """A model of order two over a small vocabulary, in a table."""

    def __init__(self, vocab: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.vocab = vocab
        self.table = rng.dirichlet(np.full(vocab, 0.7), size=(vocab, vocab))

    def law(self, history: list[int]) -> Law:
        return self.table[history[-2], history[-1]]


class Branches:
    """The random outcomes of one run, by script."""

    def __init__(self, script: list[int], todo: list[list[int]]) -> None:
        self.script, self.todo = script, todo
        self.turn, self.weight = 0, 1.0

    def pick(self, weights: Law | list[float]) -> int:
        """One of the outcomes with a positive weight; they sum to 1."""
        weights = np.asarray(weights, float)
        assert abs(weights.sum() - 1) < 1e-9 and (weights >= 0).all()
        possible = np.flatnonzero(weights).tolist()
        if self.turn == len(self.script):
            self.todo += [[*self.script, other] for other in possible[1:]]
            self.script.append(possible[0])
        found = self.script[self.turn]
        self.turn += 1
        self.weight *= float(weights[found])
        return found


class EnumeratedWalk:
    """`hasten.speculation.base.Walk` over a `Markov` target. ``history`` ends with the root."""

    greedy = False

    def __init__(self, target: Markov, tree: TokenTree, history: list[int], branches: Branches):
        self.target, self.tree, self.branches = target, tree, branches
        self.tokens, self.start = list(history), len(history)

    def _check(self, node: int) -> None:
        expected = self.tree.path(node)
        assert self.tokens[self.start :] == expected, "a node is judged by its own path's history"

    def choose(self, node: int) -> int:
        return self.branches.pick(self.law(node))

    def law(self, node: int) -> Law:
        self._check(node)
        return self.target.law(self.tokens)

    def accept(self, probability: float) -> bool:
        probability = min(1.0, float(probability))
        return self.branches.pick([1 - probability, probability]) == 1

    def draw(self, weights: Law) -> int:
        return self.branches.pick(weights / weights.sum())

    def noise(self) -> Law:
        """Gumbel noise, reduced to what it decides: which token is the largest."""
        y = self.branches.pick(self.target.law(self.tokens))
        noise = np.full(self.target.vocab, -1e9)
        noise[y] = 0.0
        return noise

    def emit(self, node: int, token: int) -> bool:
        self._check(node)
        self.tokens.append(token)
        return False


class Verify(Protocol):
    def __call__(self, tree: TokenTree, walk: Any) -> list[int]: ...


Draft = Callable[[list[int], Branches], TokenTree]
"""From a history that ends with the root and the random outcomes to a tree."""


def output_law(
    verify: Verify, draft: Draft, target: Markov, history: list[int]
) -> dict[tuple[int, ...], float]:
    """The joint law of the DEPTH tokens after the root: one verified step, then plain ones."""
    law: dict[tuple[int, ...], float] = {}
    todo: list[list[int]] = [[]]
    while todo:
        run = Branches(todo.pop(), todo)
        tree = draft(list(history), run)
        walk = EnumeratedWalk(target, tree, history, run)
        path = verify(tree, walk)
        out = walk.tokens[len(history) :]
        assert path[0] == 0 and [tree.token[node] for node in path[1:]] == out[:-1]
        assert all(tree.parent[b] == a for a, b in itertools.pairwise(path))
        while len(walk.tokens) < len(history) + DEPTH:
            walk.tokens.append(run.pick(target.law(walk.tokens)))
        key = tuple(walk.tokens[len(history) : len(history) + DEPTH])
        law[key] = law.get(key, 0.0) + run.weight
    return law


def plain_law(target: Markov, history: list[int]) -> dict[tuple[int, ...], float]:
    law = {}
    for out in itertools.product(range(target.vocab), repeat=DEPTH):
        tokens, weight = list(history), 1.0
        for token in out:
            weight *= target.law(tokens)[token]
            tokens.append(token)
        law[out] = float(weight)
    return law


def total_variation(verify: Verify, draft: Draft, target: Markov, history: list[int]) -> float:
    """Between the law of the output and the target's."""
    law, plain = output_law(verify, draft, target, history), plain_law(target, history)
    assert abs(sum(law.values()) - 1) < 1e-9 and law.keys() <= plain.keys()
    return sum(abs(law.get(out, 0.0) - p) for out, p in plain.items()) / 2


def random_tree(rng: random.Random, vocab: int, root: int) -> TokenTree:
    """Chosen candidates, depth at most 3; siblings may carry the same token."""
    tokens, parents, depth = [root], [-1], [0]
    for level in range(1, 4):
        above = [i for i, d in enumerate(depth) if d == level - 1]
        for parent in sorted(rng.choices(above, k=rng.randint(0, 4))) if above else []:
            tokens.append(rng.randrange(vocab))
            parents.append(parent)
            depth.append(level)
    return TokenTree(tokens, parents)
