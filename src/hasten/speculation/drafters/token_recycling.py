"""Drafts from what the model thought likely the last time it saw a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.kernels.logits import row_top
from hasten.methods import method
from hasten.speculation.base import Draftable, DraftContext, Outcome, StatelessDrafting
from hasten.speculation.calibration import Ranks, load_tree
from hasten.speculation.tenants import TenantTables
from hasten.speculation.tree import TokenTree

WIDTH = 8
"""Continuations that are kept of a token: as many as the template's widest node has children."""

CHILDREN = {
    "": 8,
    **{"0": 8, "1": 4, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1},
    **{"00": 8, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1},
    **{"10": 2, "11": 1, "20": 1, "30": 1, "40": 1, "50": 1},
    **{"000": 5, "001": 2, "002": 1, "003": 1, "004": 1, "010": 1, "020": 1, "100": 1},
    **{"200": 1, "300": 1},
    **{"0000": 3, "0001": 1, "0002": 1, "0010": 1, "0100": 1, "1000": 1},
    **{"00000": 2, "00010": 1},
}
"""Template 2.2.2: how many children a node has, by the ranks on the way to it."""

NOTHING = -1


@dataclass(frozen=True)
class Level:
    """Nodes of one depth: the place of each one's parent in the level above, and its rank."""

    parent: NDArray[np.int64]
    rank: NDArray[np.int64]


def by_worth() -> tuple[Ranks, ...]:
    """The template's nodes, the one worth most first.

    Where the whole has no room, the template itself says what a node is worth: the more nodes
    hang below it, the likelier its authors found it; of equal ones, those near the root and of
    low rank come first.
    """
    below = {
        name: sum(count for other, count in CHILDREN.items() if other.startswith(name))
        for name in CHILDREN
    }
    nodes = [name + str(rank) for name, count in CHILDREN.items() for rank in range(count)]
    nodes.sort(key=lambda name: (-below.get(name, 0), len(name), name))
    return tuple(tuple(map(int, name)) for name in nodes)


TEMPLATE = by_worth()


@cache
def levels_of(nodes: tuple[Ranks, ...], budget: int) -> list[Level]:
    """The first ``budget`` nodes of a tree, level by level."""
    levels: list[Level] = []
    above: list[Ranks] = [()]
    for _, level in groupby(sorted(nodes[:budget], key=lambda node: (len(node), node)), len):
        found = list(level)
        place = {node: i for i, node in enumerate(above)}
        parents = np.array([place[node[:-1]] for node in found])
        levels.append(Level(parents, np.array([node[-1] for node in found])))
        above = found
    return levels


@method(
    "token-recycling",
    slot="draft",
    paper="Turning Trash into Treasure: Accelerating Inference of Large Language Models with "
    "Token Recycling (arXiv:2408.08696)",
    exact="bitwise",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens", "drafts-from-text"),
)
@dataclass(frozen=True)
class TokenRecycling:
    """Unrolls a table of each token's latest eight likeliest successors into a fixed tree.

    Every verified row, accepted or not, overwrites its token's entry with the eight best of its
    raw logits, which costs nothing more than looking at them. The tree has the shape 2.2.2 of the
    paper: 80 nodes, six deep, wide where ranks are low; a smaller budget takes its best part.

    It needs no training and no text, and pays on any text once the table has filled up: it knows
    what the model says after a token, not what stood there. Rows of the prompt would fill it
    sooner, but their logits are not computed. A table takes 32 bytes for each token of the
    vocabulary, a tenant; the ``tenants`` last seen have one.

    ``tree`` names a file with another tree, measured on a model's own texts by ``hasten train
    tree``; as many of its best nodes are used as the budget allows.

    ``hot=false`` starts each sequence with an empty table, and ``rejected=false`` learns from
    accepted rows alone, to compare with.
    """

    hot: bool = True
    rejected: bool = True
    tenants: int = 32
    tree: str | None = None

    def __post_init__(self) -> None:
        if self.tenants < 1:
            raise ValueError(f"tenants={self.tenants}: at least 1")

    def start(self, context: DraftContext) -> TokenRecyclingDrafting:
        nodes = TEMPLATE
        if self.tree is not None:
            nodes = load_tree(self.tree, "token-recycling", WIDTH)
        return TokenRecyclingDrafting(self, context.model.config.vocab_size, nodes)


Table = NDArray[np.int32]
"""[V, 8]: likeliest successor first, ``NOTHING`` where no row was seen."""


class TokenRecyclingDrafting(StatelessDrafting):
    """Token Recycling at work: the tables of the tenants, or of the sequences."""

    def __init__(
        self, method: TokenRecycling, vocab_size: int, nodes: tuple[Ranks, ...] = TEMPLATE
    ) -> None:
        self.method = method
        self.vocab_size = vocab_size
        self.nodes = nodes
        self.tables = TenantTables(self._empty, method.tenants)

    def _empty(self) -> Table:
        return np.full((self.vocab_size, WIDTH), NOTHING, np.int32)

    def open(self, sequence: Draftable) -> Table | None:
        return None if self.method.hot else self._empty()

    def _table(self, sequence: Draftable) -> Table:
        own: Table | None = sequence.draft_state
        return self.tables[sequence.tenant] if own is None else own

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        return [
            unroll(
                self._table(s), s.tokens[-1], levels_of(self.nodes, min(budget, len(self.nodes)))
            )
            for s, budget in zip(sequences, budgets, strict=True)
        ]

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            tree = outcome.tree
            logits = torch.from_numpy(outcome.logits)
            _, _, _, best = row_top(logits, min(WIDTH, self.vocab_size))
            ids = best.numpy()
            # where a token has several rows, the last one written stays: an accepted one, if any
            accepted = outcome.path
            rows = list(accepted)
            if self.method.rejected:
                taken = set(accepted)
                rows = [row for row in range(len(tree)) if row not in taken] + rows
            tokens = [tree.token[row] for row in rows]
            self._table(outcome.sequence)[tokens, : ids.shape[1]] = ids[rows]


def unroll(table: Table, root: int, levels: list[Level]) -> TokenTree:
    """The tree that a table gives below ``root``; entries that are not known have no nodes."""
    token, parent = [root], [-1]
    above = np.array([root])
    place = np.array([0])
    for level in levels:
        found = table[above[level.parent], level.rank]
        known = (found != NOTHING) & (place[level.parent] != NOTHING)
        if not known.any():
            break
        first = len(token)
        token += found[known].tolist()
        parent += place[level.parent[known]].tolist()
        place = np.where(known, first - 1 + np.cumsum(known), NOTHING)
        above = found
    return TokenTree(token, parent)
