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

    @classmethod
    def constant(cls, law: list[float]) -> Markov:
        """The same law after every history."""
        made = cls(len(law), 0)
        made.table[:] = law
        return made

    @classmethod
    def certain(cls, vocab: int, seed: int) -> Markov:
        """All on one token, after every history another: what temperature 0 leaves."""
        made = cls(vocab, seed)
        made.table = np.eye(vocab)[made.table.argmax(-1)]
        return made

    def law(self, history: list[int]) -> Law:
        return self.table[history[-2], history[-1]]


class Branches:
    """The random outcomes of one run, by script."""

    def __init__(self, script: list[int], todo: list[list[int]]) -> None:
        self.script, self.todo = script, todo
        self.turn, self.weight = 0, 1.0

    def pick(self, weights: Law | list[float]) -> int:
        """One of the outcomes with a positive weight; they sum to 1."""
        if self.turn == len(self.script):
            assert abs(sum(weights) - 1) < 1e-9 and min(weights) >= 0
            possible = np.flatnonzero(weights).tolist()
            self.todo += [[*self.script, other] for other in possible[1:]]
            self.script.append(possible[0])
        found = self.script[self.turn]
        self.turn += 1
        self.weight *= float(weights[found])
        return found


class EnumeratedWalk:
    """`hasten.speculation.base.Walk` over a `Markov` target. ``history`` ends with the root."""

    greedy = False

    def __init__(
        self, target: Markov, tree: TokenTree, history: list[int], branches: Branches
    ) -> None:
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

    def ahead(self, node: int, tokens: list[int]) -> Law:
        assert self.tokens[self.start :] + tokens == self.tree.path(node)
        return self.target.law(self.tokens + tokens)

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


def step_law(
    verify: Verify, draft: Draft, target: Markov, history: list[int], greedy: bool = False
) -> dict[tuple[int, ...], float]:
    """The joint law of what one verified step emits."""
    law: dict[tuple[int, ...], float] = {}
    todo: list[list[int]] = [[]]
    while todo:
        run = Branches(todo.pop(), todo)
        tree = draft(list(history), run)
        walk = EnumeratedWalk(target, tree, history, run)
        walk.greedy = greedy
        path = verify(tree, walk)
        out = tuple(walk.tokens[len(history) :])
        assert path[0] == 0 and tuple(tree.token[node] for node in path[1:]) == out[:-1]
        assert all(tree.parent[b] == a for a, b in itertools.pairwise(path))
        law[out] = law.get(out, 0.0) + run.weight
    return law


def output_law(
    verify: Verify, draft: Draft, target: Markov, history: list[int]
) -> dict[tuple[int, ...], float]:
    """The joint law of the DEPTH tokens after the root: one verified step, then plain ones."""
    law: dict[tuple[int, ...], float] = {}
    for out, weight in step_law(verify, draft, target, history).items():
        for tail, share in plain_law(target, [*history, *out], DEPTH - len(out)).items():
            law[out + tail] = law.get(out + tail, 0.0) + weight * share
    return law


def acceptance(verify: Verify, draft: Draft, target: Markov, history: list[int]) -> float:
    """The probability that the step accepts a candidate."""
    law = step_law(verify, draft, target, history)
    return sum(weight for out, weight in law.items() if len(out) > 1)


def first_token(verify: Verify, draft: Draft, target: Markov, history: list[int]) -> Law:
    """The law of the first token that the step emits."""
    law = np.zeros(target.vocab)
    for out, weight in step_law(verify, draft, target, history).items():
        law[out[0]] += weight
    return law


def plain_law(
    target: Markov, history: list[int], length: int = DEPTH
) -> dict[tuple[int, ...], float]:
    law = {(): 1.0}
    for _ in range(length):
        law = {
            (*out, token): weight * float(share)
            for out, weight in law.items()
            for token, share in enumerate(target.law([*history, *out]))
        }
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


# ---- rules by which trees come about ------------------------------------------------------------


def chosen(rng: random.Random, vocab: int) -> Draft:
    """One tree for all outcomes: nothing is drawn."""
    tree = random_tree(rng, vocab, 0)
    while len(tree) < 5:
        tree = random_tree(rng, vocab, 0)
    return lambda history, _: TokenTree([history[-1], *tree.token[1:]], tree.parent)


Children = Callable[[int, int, Law, Branches], tuple[list[int], bool]]
"""From place in the level, depth, law and random outcomes to children and whether they were drawn.
"""


def grow(draft: Markov, depth: int, children: Children, independent: bool = False) -> Draft:
    """Level by level, the children of each node as the rule says."""

    def tree(history: list[int], run: Branches) -> TokenTree:
        tokens, parents, laws = [history[-1]], [-1], {}
        texts = {0: history}
        for level in range(depth):
            for place, node in enumerate(list(texts)):
                law = draft.law(texts[node])
                found, drawn = children(place, level, law, run)
                if found and drawn:
                    laws[node] = law
                for token in found:
                    texts[len(tokens)] = [*texts[node], token]
                    tokens.append(token)
                    parents.append(node)
                del texts[node]
        return TokenTree(tokens, parents, law=laws, independent=independent)

    return tree


def draw_siblings(law: Law, count: int, run: Branches) -> list[int]:
    """Without replacement, in the order of the draws; as many as there are."""
    law, found = law.copy(), []
    for _ in range(min(count, int(np.count_nonzero(law)))):
        found.append(run.pick(law / law.sum()))
        law[found[-1]] = 0.0
    return found


def siblings(draft: Markov, branching: list[int]) -> Draft:
    """So many children a node and level, drawn without replacement. All 1: a chain."""
    return grow(
        draft, len(branching), lambda _, d, law, run: (draw_siblings(law, branching[d], run), True)
    )


def groups(draft: Markov, branching: list[int]) -> Draft:
    """So many children a node and level, drawn independently."""
    return grow(
        draft,
        len(branching),
        lambda _, d, law, run: ([run.pick(law) for _ in range(branching[d])], True),
        independent=True,
    )


def sequences(draft: Markov, count: int, depth: int) -> Draft:
    """Whole sequences, drawn independently of each other."""
    return groups(draft, [count] + [1] * (depth - 1))


def adaptive(draft: Markov, depth: int) -> Draft:
    """Whether one more sibling is drawn depends on those that are in the tree already."""

    def children(_: int, __: int, law: Law, run: Branches) -> tuple[list[int], bool]:
        found = [run.pick(law)]
        if found[0] % 2 == 0 and law[found[0]] < 1:
            rest = law.copy()
            rest[found[0]] = 0.0
            found.append(run.pick(rest / rest.sum()))
        return found, True

    return grow(draft, depth, children)


def mixed(draft: Markov, branching: list[int]) -> Draft:
    """Chosen and drawn nodes in turns, from level to level and within one."""

    def children(place: int, level: int, law: Law, run: Branches) -> tuple[list[int], bool]:
        if (place + level) % 2:
            return [int(t) for t in np.argsort(-law, kind="stable")[: branching[level]]], False
        return draw_siblings(law, branching[level], run), True

    return grow(draft, len(branching), children)


RULES: dict[str, Callable[[Markov, random.Random], Draft]] = {
    "chosen": lambda draft, rng: chosen(rng, draft.vocab),
    "chain of 2": lambda draft, _: siblings(draft, [1, 1]),
    "chain of 3": lambda draft, _: siblings(draft, [1, 1, 1]),
    "siblings 2, 1": lambda draft, _: siblings(draft, [2, 1]),
    "siblings 3": lambda draft, _: siblings(draft, [3]),
    "siblings 1, 3": lambda draft, _: siblings(draft, [1, 3]),
    "groups 3": lambda draft, _: groups(draft, [3]),
    "groups 2, 2": lambda draft, _: groups(draft, [2, 2]),
    "sequences 2 x 2": lambda draft, _: sequences(draft, 2, 2),
    "sequences 3 x 2": lambda draft, _: sequences(draft, 3, 2),
    "adaptive": lambda draft, _: adaptive(draft, 2),
    "mixed 2, 2": lambda draft, _: mixed(draft, [2, 2]),
    "mixed 2, 1, 1": lambda draft, _: mixed(draft, [2, 1, 1]),
}
"""Trees of all kinds, from a draft model."""
