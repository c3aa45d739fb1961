"""Drafts under a constraint: candidates that the sequence's grammar forbids are not worth a row."""

from __future__ import annotations

from hasten.decoding.constraints.base import ConstraintState
from hasten.speculation.parts import subtree
from hasten.speculation.tree import TokenTree


def allowed_part(tree: TokenTree, constraint: ConstraintState) -> TokenTree:
    """The tree without the candidates that may not follow their path, and all below them.

    It changes no output where candidates were chosen (a tree without laws). Every verifier then
    compares them with what the target says under its mask: a forbidden one has probability 0 there,
    so it can neither be the target's choice nor pass a threshold, and what the target chooses does
    not depend on which candidates stand beside its choice (``verification.match``).

    Trees with laws stay whole. Of candidates drawn from q, a forbidden x is rejected with
    certainty, and the token is then drawn from the positive part of p - q. That draw makes up for
    what acceptance gave the allowed tokens, min(p, q); withdrawing x beforehand would replace it by
    a draw from p, and the output's law would be p + q(F) (p - r), with F the forbidden tokens and r
    the normalized positive part of p - q: not p, unless p = r.
    """
    if tree.law or len(tree) == 1:
        return tree
    paths: list[list[int]] = []  # nodes from the first candidate to each leaf
    for leaf in sorted(set(range(1, len(tree))) - set(tree.parent)):
        path = [leaf]
        while tree.parent[path[-1]]:
            path.append(tree.parent[path[-1]])
        paths.append(path[::-1])
    counts = constraint.allowed([[tree.token[node] for node in path] for path in paths])
    kept = {0}
    for path, count in zip(paths, counts, strict=True):
        kept.update(path[:count])
    return subtree(tree, sorted(kept))
