"""The token tree: what one step verifies for one sequence.

A plain decode step is a tree of one node, a chain draft is a tree with one child per node, and
every drafter produces this one structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class TokenTree:
    """Candidate tokens of one sequence, sorted by depth (breadth first).

    Node 0 is the *pending token*: already part of the output, its keys and values not computed
    yet. ``parent[i] < i`` and ``parent[0] == -1``. The order of siblings is the order in which a
    verifier tries them. A chain has ``parent == [-1, 0, 1, ...]``.
    """

    token: list[int]
    parent: list[int]
    depth: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.token) != len(self.parent) or not self.token or self.parent[0] != -1:
            raise ValueError("a tree needs a root (parent -1) and one parent for each token")
        depth = [0]
        for node in range(1, len(self.parent)):
            parent = self.parent[node]
            if not 0 <= parent < node:
                raise ValueError(f"node {node} has parent {parent}; parents come before children")
            depth.append(depth[parent] + 1)
            if depth[node] < depth[node - 1]:
                raise ValueError(f"node {node} breaks the order by depth")
        self.depth = depth

    @classmethod
    def root(cls, token: int) -> TokenTree:
        """A tree without candidates: plain decoding."""
        return cls([token], [-1])

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> TokenTree:
        """``tokens[0]`` is the pending token, the rest a linear draft."""
        return cls(list(tokens), list(range(-1, len(tokens) - 1)))

    def __len__(self) -> int:
        return len(self.token)

    @property
    def is_chain(self) -> bool:
        return self.depth[-1] == len(self.token) - 1

    def ancestors(self) -> list[int]:
        """For each node the set of its ancestors and itself, as a bit set (bit i = node i)."""
        bits = [1]
        for node in range(1, len(self.parent)):
            bits.append(bits[self.parent[node]] | 1 << node)
        return bits

    def children(self, node: int) -> list[int]:
        return [i for i in range(node + 1, len(self.parent)) if self.parent[i] == node]
