"""Accept a candidate exactly when the target would have chosen it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hasten.methods import method
from hasten.speculation.tree import TokenTree


@method("sample-match", slot="verify", exact="bitwise", does=("accepts-tokens",))
@dataclass(frozen=True)
class SampleMatch:
    """At each node the target chooses its own token; a child that carries it is accepted.

    The output is what plain decoding gives, whatever the tree: greedy takes the argmax, sampling
    draws with the number that belongs to the position, so not even the text of a seeded sample
    changes. The tree only decides how many tokens one step yields.
    """

    def verify(
        self, tree: TokenTree, choose: Callable[[int], int], ends: Callable[[int], bool]
    ) -> tuple[list[int], list[int]]:
        path, out = [0], []
        while True:
            y = choose(path[-1])
            out.append(y)
            if ends(y):
                return path, out
            child = next((c for c in tree.children(path[-1]) if tree.token[c] == y), None)
            if child is None:
                return path, out
            path.append(child)
