"""Recursive rejection: siblings are tried one after the other, each against what is left of p."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.decoding.params import SamplingParams
from hasten.methods import method
from hasten.speculation.base import Walk
from hasten.speculation.tree import TokenTree
from hasten.speculation.verification import (
    Law,
    descend,
    match,
    normalized,
    ratio,
    residual,
    to_weigh,
)


@method(
    "recursive",
    slot="verify",
    paper="Recursive Speculative Decoding (arXiv:2402.14160); SpecInfer (arXiv:2305.09781)",
    exact="distribution",
    does=("accepts-tokens", "weighs-draft-laws"),
)
@dataclass(frozen=True)
class Recursive:
    """A rejected candidate changes the law that its next sibling is judged by.

    Sibling x, drawn from q, is accepted with probability min(1, p(x) / q(x)). If it is rejected, p
    becomes the positive part of p - q, normalized, and q the law of the next draw: q without x,
    normalized, if siblings were drawn without replacement, q itself if independently. What no
    sibling got is drawn from the last p. Each try leaves the output's law at p, so their number is
    free. Siblings drawn without replacement waste no try on a token that was rejected already.
    Chosen candidates, and all under temperature 0, are matched as `sample-match` does.
    """

    def refuses(self, params: SamplingParams) -> str | None:
        return None

    def verify(self, tree: TokenTree, walk: Walk) -> list[int]:
        return descend(tree, walk, judge_in_turn)


def judge_in_turn(
    tree: TokenTree, walk: Walk, node: int, candidates: Sequence[int]
) -> tuple[int, int | None]:
    """Accept one of the candidates, in their order, or draw from what is left."""
    if not to_weigh(tree, walk, candidates):
        return match(tree, walk, node, candidates)
    p, q = walk.law(node), tree.law[tree.parent[candidates[0]]]
    for candidate in candidates:
        token = tree.token[candidate]
        if tree.independent:
            q = tree.law[tree.parent[candidate]]
        if walk.accept(ratio(p, q, token)):
            return token, candidate
        p = residual(p, q)
        if not tree.independent:
            q = without(q, token)
    return walk.draw(p), None


def without(q: Law, token: int) -> Law:
    """The law of the next draw without replacement."""
    rest = q.copy()
    rest[token] = 0.0
    return normalized(rest, rest)
