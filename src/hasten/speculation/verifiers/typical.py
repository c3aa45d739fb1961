"""Typical acceptance: a candidate that is likely enough for the target's uncertainty will do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hasten.decoding.params import SamplingParams
from hasten.methods import method
from hasten.speculation.base import Walk
from hasten.speculation.tree import TokenTree
from hasten.speculation.verification import Law, descend, line, match


@method(
    "typical",
    slot="verify",
    paper="Medusa (arXiv:2401.10774)",
    exact="lossy",
    does=("accepts-tokens",),
)
@dataclass(frozen=True)
class Typical:
    """Accepts a candidate x if p(x) > min(eps, delta exp(-H(p))), H the entropy of p.

    Where the target is sure, only its own token passes; where it is not, many do, and it does not
    matter which of them a draft proposes. The longest path of accepted candidates becomes output,
    the likeliest of equally long ones. So the output is biased to what drafters propose: no token
    at or below the threshold is accepted, but the law is not the target's. The token after the
    path is the target's own choice (Medusa takes the argmax), so that without drafts the output is
    that of plain decoding. Under temperature 0 the argmax path is accepted, which is exact.
    """

    eps: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1:
            raise ValueError(f"eps={self.eps} is a probability: need 0 <= eps <= 1")
        if not self.delta > 0:
            raise ValueError(f"delta={self.delta}: need delta > 0 (the paper takes sqrt(eps))")

    def refuses(self, params: SamplingParams) -> str | None:
        return None

    def verify(self, tree: TokenTree, walk: Walk) -> list[int]:
        if walk.greedy:
            return descend(tree, walk, match)
        path = line(tree, self._best(tree, walk))
        for depth in range(1, len(path)):
            if walk.emit(path[depth - 1], tree.token[path[depth]]):
                return path[: depth + 1]
        walk.emit(path[-1], walk.choose(path[-1]))
        return path

    def _best(self, tree: TokenTree, walk: Walk) -> int:
        """The last node of the longest accepted path."""
        score = {0: (0, 0.0)}  # accepted nodes: depth, log-probability of the path
        for node in range(len(tree)):
            children = tree.children(node) if node in score else []
            if not children:
                continue
            p = walk.ahead(node, tree.path(node))
            least = self.threshold(p)
            depth, likelihood = score[node]
            for child in children:
                probability = p[tree.token[child]]
                if probability > least:
                    score[child] = (depth + 1, likelihood + float(np.log(probability)))
        return max(score, key=score.__getitem__)

    def threshold(self, p: Law) -> float:
        """What a candidate's probability must exceed."""
        entropy = -float((p * np.log(p + 1e-5)).sum())
        return min(self.eps, self.delta * float(np.exp(-entropy)))
