"""K-SEQ: the independent candidates of a position are judged as one group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hasten.decoding.params import SamplingParams
from hasten.methods import method
from hasten.speculation.base import Walk
from hasten.speculation.tree import TokenTree
from hasten.speculation.verification import Law, descend, normalized, ratio, to_weigh
from hasten.speculation.verifiers.recursive import judge_in_turn

BISECTIONS = 14
"""Halvings of rho's interval. Any rho at or above the root is exact, so this decides only how much
acceptance is given away."""


@method(
    "k-seq",
    slot="verify",
    paper="SpecTr: Fast Speculative Decoding via Optimal Transport (arXiv:2310.15141)",
    exact="distribution",
    does=("accepts-tokens", "weighs-draft-laws"),
)
@dataclass(frozen=True)
class KSeq:
    """Each of k independent draws x is accepted with probability min(1, p(x) / (rho q(x))).

    Rho between 1 and k is as small as the target's law allows, which accepts at least 1 - 1/e of
    what the best coupling of p and k draws could. It is solved for each position, since p, q and
    the number of drafts that agree with the text so far change. A draft that occurs twice counts
    twice. For sequences drawn independently from a draft model, where it accepts more than
    `recursive`; siblings drawn without replacement are judged as `recursive` does, chosen
    candidates, and all under temperature 0, as `sample-match` does.
    """

    def refuses(self, params: SamplingParams) -> str | None:
        return None

    def verify(self, tree: TokenTree, walk: Walk) -> list[int]:
        return descend(tree, walk, judge_together)


def judge_together(
    tree: TokenTree, walk: Walk, node: int, candidates: Sequence[int]
) -> tuple[int, int | None]:
    """Accept one of the candidates, in their order, or draw from what the group leaves."""
    if not tree.independent or not to_weigh(tree, walk, candidates):
        return judge_in_turn(tree, walk, node, candidates)
    laws = [tree.law[tree.parent[c]] for c in candidates]
    p, q = walk.law(node), laws[0]
    # the same place of the text has one law; a drafter that sees more than the text may have others
    group = [
        candidate
        for candidate, law in zip(candidates, laws, strict=True)
        if law is q or np.array_equal(law, q)
    ]
    rho = smallest_rho(p, q, len(group))
    for candidate in group:
        token = tree.token[candidate]
        if walk.accept(ratio(p, q, token) / rho):
            return token, candidate
    return walk.draw(leftover(p, q, len(group), rho)), None


def smallest_rho(p: Law, q: Law, k: int) -> float:
    """The root in [1, k] of 1 - (1 - beta(rho))^k = rho beta(rho), from above.

    beta(rho) = sum min(q, p / rho) is what one draw is accepted with; k of them must not be
    accepted more often than rho beta, or a token would get more than its p.
    """
    low, high = 1.0, float(k)
    # only tokens with 1 < p / q < k change sides while rho is searched
    below, above = p <= q, p >= k * q
    p_below, q_above = float(p[below].sum()), float(q[above & ~below].sum())
    between = ~(below | above)
    p, q = p[between], q[between]
    while k > 1 and high - low > (k - 1) / 2**BISECTIONS:
        middle = (low + high) / 2
        beta = p_below / middle + q_above + float(np.minimum(q, p / middle).sum())
        if 1 - (1 - beta) ** k > middle * beta:
            low = middle
        else:
            high = middle
    return high


def leftover(p: Law, q: Law, k: int, rho: float) -> Law:
    """The law of the token after all k candidates were rejected."""
    taken = np.minimum(q, p / rho)
    beta = min(1.0, float(taken.sum()))
    if beta == 0:  # nothing in common: no candidate could be accepted
        return p
    accepted = 1 - (1 - beta) ** k
    return normalized(np.maximum(p - taken * (accepted / beta), 0.0), p)
