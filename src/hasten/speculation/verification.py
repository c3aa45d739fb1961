"""What verifiers share: the way down a tree, and the arithmetic of rejection.

A verifier decides one thing, again and again: which token follows the place that the walk has
reached, and which candidate carries it. ``descend`` does the rest. For candidates that were drawn,
all rules rest on one lemma (Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318): a
token x drawn from q, kept with probability min(1, p(x) / q(x)) and else replaced by a draw from the
normalized positive part of p - q, has the law p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hasten.speculation.base import Walk
from hasten.speculation.tree import TokenTree

Law = NDArray[np.float64]
"""Probabilities float64 [V]."""

Follow = Callable[[TokenTree, Walk, int, Sequence[int]], tuple[int, int | None]]
"""``follow(tree, walk, node, candidates)``: the token after ``node``, and the one of the candidates
that carries it and from which the walk goes on, or None if it ends."""


def descend(tree: TokenTree, walk: Walk, follow: Follow) -> list[int]:
    """Walk down from the root, emitting what ``follow`` chooses. Returns the accepted nodes.

    Where candidates were drawn independently, siblings may carry the same token. They stand for
    one place of the text, so what was drawn after any of them is a candidate there.
    """
    nodes = [0]
    while True:
        candidates = [child for node in nodes for child in tree.children(node)]
        token, child = follow(tree, walk, nodes[0], candidates)
        ended = walk.emit(nodes[0], token)
        if child is None:
            return line(tree, nodes[0])
        if ended:
            return line(tree, child)
        nodes = [child]
        if tree.independent:
            nodes += [c for c in candidates if tree.token[c] == token and c != child]


def line(tree: TokenTree, node: int) -> list[int]:
    """The nodes from the root to a node."""
    nodes = [node]
    while nodes[-1]:
        nodes.append(tree.parent[nodes[-1]])
    return nodes[::-1]


def match(
    tree: TokenTree, walk: Walk, node: int, candidates: Sequence[int]
) -> tuple[int, int | None]:
    """The target chooses for itself; the first candidate that carries its token is accepted.

    Exact however the candidates came about, since the choice does not look at them.
    """
    token = walk.choose(node)
    return token, next((c for c in candidates if tree.token[c] == token), None)


def to_weigh(tree: TokenTree, walk: Walk, candidates: Sequence[int]) -> bool:
    """Whether all candidates were drawn, from laws that the tree knows, for a target that samples.

    If not, ``match`` decides. For a chosen candidate that is what rejection comes down to (q is
    all on it: it is accepted with probability p, else taken out of p), and greedily too.
    """
    drawn = bool(candidates) and all(tree.parent[c] in tree.law for c in candidates)
    return drawn and not walk.greedy


def ratio(p: Law, q: Law, token: int) -> float:
    """p(token) / q(token), for a token that was drawn from q.

    Raises:
        ValueError: it cannot have been.
    """
    if not q[token] > 0:
        raise ValueError(
            f"candidate token {token} has probability {q[token]} in the law it was drawn from; the "
            "drafter must declare the law that it draws from, and draw no token twice without "
            "replacement"
        )
    return float(p[token] / q[token])


def residual(p: Law, q: Law) -> Law:
    """The law after a candidate from q was rejected: the positive part of p - q, normalized."""
    return normalized(np.maximum(p - q, 0.0), p)


def normalized(weights: Law, otherwise: Law) -> Law:
    """``weights`` scaled to sum 1, or ``otherwise`` where all of them are 0.

    A residual without weight belongs to a rejection of probability 0, which rounding let happen.
    """
    total = weights.sum()
    return weights / total if total > 0 else otherwise
