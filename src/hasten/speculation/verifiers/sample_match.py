"""Accept a candidate exactly when the target would have chosen it."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.decoding.params import SamplingParams
from hasten.methods import method
from hasten.speculation.base import Walk
from hasten.speculation.tree import TokenTree
from hasten.speculation.verification import descend, match


@method("sample-match", slot="verify", exact="bitwise", does=("accepts-tokens",))
@dataclass(frozen=True)
class SampleMatch:
    """At each node the target chooses its own token; a child that carries it is accepted.

    The output is what plain decoding gives, whatever the tree: greedy takes the argmax, sampling
    draws with the number that belongs to the position, so not even the text of a seeded sample
    changes. The tree only decides how many tokens one step yields.
    """

    def refuses(self, params: SamplingParams) -> str | None:
        return None

    def verify(self, tree: TokenTree, walk: Walk) -> list[int]:
        return descend(tree, walk, match)
