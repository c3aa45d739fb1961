"""The token tree: what one step verifies for one sequence.

A plain decode step is a tree of one node, a chain draft is a tree with one child per node, and
every drafter produces this one structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Proposal = Literal["delta", "wor", "iid"]
"""How the children of a node came about: chosen (nothing random), or drawn from the node's draft
distribution without replacement, in the order of the siblings, or independently."""


@dataclass(slots=True)
class TokenTree:
    """Candidate tokens of one sequence, sorted by depth (breadth first).

    Node 0 is the *pending token*: already part of the output, its keys and values not computed
    yet. ``parent[i] < i`` and ``parent[0] == -1``. The order of siblings is the order in which a
    verifier tries them. A chain has ``parent == [-1, 0, 1, ...]``.

    Attributes:
        token: token ids. Siblings differ, except among children drawn independently.
        parent: index of each node's parent.
        depth: computed; 0 for the root.
        law: for nodes whose children were drawn, the probabilities float64 [V] from which the
            first of them was (after the draft's own temperature and filters); it sums to 1.
            Children of other nodes were chosen.
        independent: the drawn children of a node were drawn with replacement (else without), and
            independently of what was drawn after its siblings, which may carry the same token.
        root_law: the draft's probabilities after the root, float32 [V], where they are asked for
            (``DraftContext.root_law``); nothing was drawn from them.
        source: bit set of the drafters that produced each node, empty if there is one.
        auxiliary: nodes that are computed but are no candidates; their descendants are auxiliary,
            too. Empty if there are none.
        layers: layers that already ran over all nodes, root included, and ``hidden``, float32
            [nodes, H], the residual stream after them (self-speculation).
    """

    token: list[int]
    parent: list[int]
    depth: list[int] = field(default_factory=list)
    law: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    independent: bool = False
    source: list[int] = field(default_factory=list)
    auxiliary: frozenset[int] = frozenset()
    layers: int = 0
    hidden: Tensor | None = None
    root_law: NDArray[np.float32] | None = None

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
            if parent in self.auxiliary and node not in self.auxiliary:
                raise ValueError(f"candidate {node} would see the auxiliary node {parent}")
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
        """The candidates that may follow a node, in the order in which they are tried."""
        return [
            i
            for i in range(node + 1, len(self.parent))
            if self.parent[i] == node and i not in self.auxiliary
        ]

    def proposal(self, node: int) -> Proposal:
        """How the children of a node came about."""
        if node not in self.law:
            return "delta"
        return "iid" if self.independent else "wor"

    def path(self, node: int) -> list[int]:
        """The tokens from the first candidate to a node."""
        tokens: list[int] = []
        while node:
            tokens.append(self.token[node])
            node = self.parent[node]
        return tokens[::-1]


class TreeBuilder:
    """A tree that grows in any order; ``build`` sorts it by depth.

    Adding a token that a node already has as a child gives that child (its sources are joined), so
    that siblings differ. Children of a node keep the order in which they were added.
    """

    def __init__(self, root: int) -> None:
        self.token = [root]
        self.parent = [-1]
        self.depth = [0]
        self.source = [0]
        self.law: dict[int, NDArray[np.float64]] = {}
        self._child: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.token)

    def __contains__(self, child: tuple[int, int]) -> bool:
        """Whether a node has a child with a token, given as (node, token)."""
        return child in self._child

    def add(self, parent: int, token: int, source: int = 0) -> int:
        """The node of ``token`` below ``parent``, new or found."""
        found = self._child.get((parent, token))
        if found is None:
            found = self._child[parent, token] = self.add_drawn(parent, token, source)
        self.source[found] |= source
        return found

    def add_drawn(self, parent: int, token: int, source: int = 0) -> int:
        """A new node, even where a sibling carries the token (independent draws)."""
        self.token.append(token)
        self.parent.append(parent)
        self.depth.append(self.depth[parent] + 1)
        self.source.append(source)
        return len(self.token) - 1

    def build(self, independent: bool = False) -> tuple[TokenTree, list[int]]:
        """The tree, and for each of its nodes the number that ``add`` gave it."""
        order = sorted(range(len(self.token)), key=self.depth.__getitem__)  # stable
        place = {node: i for i, node in enumerate(order)}
        tree = TokenTree(
            [self.token[node] for node in order],
            [-1, *(place[self.parent[node]] for node in order[1:])],
            law={place[node]: law for node, law in self.law.items()},
            independent=independent,
            source=[self.source[node] for node in order] if any(self.source) else [],
        )
        return tree, order
