"""Speculative sampling: one drawn candidate a position, accepted by the ratio of the laws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.decoding.params import SamplingParams
from hasten.methods import method
from hasten.speculation.base import Walk
from hasten.speculation.tree import TokenTree
from hasten.speculation.verification import descend, match, ratio, residual, to_weigh


@method(
    "chain",
    slot="verify",
    paper="Fast Inference from Transformers via Speculative Decoding (arXiv:2211.17192)",
    exact="distribution",
    does=("accepts-tokens", "weighs-draft-laws"),
)
@dataclass(frozen=True)
class Chain:
    """A candidate x drawn from q is accepted with probability min(1, p(x) / q(x)).

    After a rejection the token is drawn from the positive part of p - q, normalized, and the walk
    ends: the output has the target's law, and no rule accepts one draw from q more often. It pays
    over `sample-match` where a draft model samples: a candidate is accepted with probability
    sum min(p, q) instead of sum p q. Of several drawn siblings only the first is looked at (see
    `recursive` and `k-seq`); chosen candidates, and all under temperature 0, are matched as
    `sample-match` does.
    """

    def refuses(self, params: SamplingParams) -> str | None:
        return None

    def verify(self, tree: TokenTree, walk: Walk) -> list[int]:
        return descend(tree, walk, judge_first)


def judge_first(
    tree: TokenTree, walk: Walk, node: int, candidates: Sequence[int]
) -> tuple[int, int | None]:
    """Accept the first candidate, or draw from what is left."""
    if not to_weigh(tree, walk, candidates):
        return match(tree, walk, node, candidates)
    first = candidates[0]
    token, p, q = tree.token[first], walk.law(node), tree.law[tree.parent[first]]
    if walk.accept(ratio(p, q, token)):
        return token, first
    return walk.draw(residual(p, q)), None
