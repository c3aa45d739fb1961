"""The part of a tree that a constraint allows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from hasten.speculation.constrained import allowed_part
from hasten.speculation.tree import TokenTree


class Falling:
    """Each token must be smaller than the one before."""

    def __init__(self, last: int) -> None:
        self.last = last

    def allowed(self, paths: Sequence[Sequence[int]]) -> list[int]:
        counts = []
        for path in paths:
            before = [self.last, *path]
            fits = [later < earlier for earlier, later in zip(before, path, strict=False)]
            counts.append(([*fits, False]).index(False))
        return counts


def part(tree: TokenTree, last: int) -> TokenTree:
    return allowed_part(tree, cast(Any, Falling(last)))


def test_a_chain_ends_before_the_first_forbidden_token() -> None:
    chain = TokenTree.chain([50, 9, 8, 3, 5, 1])
    assert part(chain, 10).token == [50, 9, 8, 3] and part(chain, 10).is_chain
    assert part(chain, 9).token == [50]
    rising = TokenTree.chain([50, 9, 8, 3])
    assert part(rising, 10) is rising
    root = TokenTree.root(4)
    assert part(root, 0) is root


def test_branches_are_cut_where_their_own_path_forbids() -> None:
    rng = random.Random(3)
    for _ in range(200):
        parents = [-1, *sorted(rng.randrange(i) for i in range(1, rng.randrange(2, 20)))]
        depth = [0]
        for node in range(1, len(parents)):
            depth.append(depth[parents[node]] + 1)
        tree = TokenTree([rng.randrange(30) for _ in parents], parents)
        expected = {0: 20}  # allowed nodes: the token that the next must be below
        for node in range(1, len(tree)):
            below = expected.get(parents[node])
            if below is not None and tree.token[node] < below:
                expected[node] = tree.token[node]
        got = part(tree, 20)
        assert got.token == [tree.token[node] for node in sorted(expected)]
        kept = sorted(expected)
        assert [kept[p] for p in got.parent[1:]] == [parents[node] for node in kept[1:]]


def test_drawn_candidates_stay() -> None:
    """Without them a verifier that weighs laws would be biased."""
    drawn = TokenTree([5, 9, 9], [-1, 0, 0], law={0: np.full(10, 0.1)})
    assert part(drawn, 3) is drawn
