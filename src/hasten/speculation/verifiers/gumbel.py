"""Accept a candidate exactly when it wins the race that the position's Gumbel noise decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hasten.decoding.params import SamplingParams
from hasten.methods import method
from hasten.speculation.base import Walk
from hasten.speculation.tree import TokenTree
from hasten.speculation.verification import descend, match


@method(
    "gumbel",
    slot="verify",
    paper="A* sampling (arXiv:1411.0030): the Gumbel-max trick",
    exact="distribution",
    does=("accepts-tokens",),
)
@dataclass(frozen=True)
class Gumbel:
    """The target chooses argmax(log p + noise of the position); a child that carries it counts.

    The maximum of log p plus standard Gumbel noise has the law p, and the noise belongs to seed,
    sequence and position. So a seeded text is the same bits with any drafts and without, in any
    batch; it is another text of the same law than `sample-match` gives. A drafter that adds the
    same noise to its own log-probabilities agrees with the target more often than one that draws
    freely. Rejection accepts still more: this is the mode for reproducing and debugging.
    """

    def refuses(self, params: SamplingParams) -> str | None:
        return None

    def verify(self, tree: TokenTree, walk: Walk) -> list[int]:
        return descend(tree, walk, match if walk.greedy else race)


def race(
    tree: TokenTree, walk: Walk, node: int, candidates: Sequence[int]
) -> tuple[int, int | None]:
    """The token that wins, the lowest id of equals, and the first candidate that carries it."""
    with np.errstate(divide="ignore"):  # what cannot be chosen is at -inf
        token = int(np.argmax(np.log(walk.law(node)) + walk.noise()))
    return token, next((c for c in candidates if tree.token[c] == token), None)
