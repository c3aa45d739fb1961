"""Static trees from measurement: how often each candidate is right, and which tree follows.

A node of a static tree is the way to it by ranks: (0, 2) is the third likeliest continuation of the
likeliest one. If the candidate of rank r at depth d is the target's token with probability
acc(d, r) wherever its parent was, a node is accepted with the product of these along its way, and a
tree gains the sum over its nodes (Medusa, arXiv:2401.10774, section 2.3.3). The largest products
are therefore the best tree: a node's is never larger than its parent's.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.methods import MethodError

Ranks = tuple[int, ...]
"""A node by the ranks on the way to it, the root's child first."""

FORMAT = "hasten-tree-1"


@dataclass
class RankCounts:
    """How often the candidate of each rank was the target's token.

    Attributes:
        depth: levels that are looked at.
        width: ranks.
        reached: how often the path of the text lay in candidates up to a level, and the text
            went on, int64 [depth].
        hits: of these, how often the candidate of a rank was the next token, int64 [depth, width].
    """

    depth: int
    width: int
    reached: NDArray[np.int64] = field(init=False)
    hits: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.reached = np.zeros(self.depth, np.int64)
        self.hits = np.zeros((self.depth, self.width), np.int64)

    def add(self, ranks: Sequence[int | None]) -> None:
        """What one place of a text showed: the rank of the token after it, then of the one after
        that. None, which can only be the last, stands for a token that was no candidate."""
        for depth, rank in enumerate(ranks):
            self.reached[depth] += 1
            if rank is not None:
                self.hits[depth, rank] += 1

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """acc(depth, rank) float64 [depth, width]; 0 at levels that were never reached."""
        found: NDArray[np.float64] = self.hits / np.maximum(self.reached, 1)[:, None]
        return found


def best_tree(accuracy: NDArray[np.float64], nodes: int) -> list[Ranks]:
    """The tree of at most ``nodes`` candidates with the largest expected gain.

    The most valuable node comes first, so that any beginning of the list is the best tree of its
    size; of equal ones the nearer to the root, then that of lower ranks. Nodes that are never
    right are left out.

    Args:
        accuracy: acc(depth, rank) float64 [depth, width].
    """
    heap: list[tuple[float, int, Ranks]] = []
    found: list[Ranks] = []

    def grow(value: float, path: Ranks) -> None:
        if len(path) < len(accuracy):
            for rank, share in enumerate(accuracy[len(path)]):
                if value * share > 0:
                    child = (*path, rank)
                    heapq.heappush(heap, (-value * float(share), len(child), child))

    grow(1.0, ())
    while heap and len(found) < nodes:
        negative, _, path = heapq.heappop(heap)
        found.append(path)
        grow(-negative, path)
    return found


def expected_gain(accuracy: NDArray[np.float64], tree: Sequence[Ranks]) -> float:
    """Accepted candidates a pass of a tree; tau is one more. Nodes beyond the table gain nothing.

    Args:
        accuracy: acc(depth, rank) float64 [depth, width].
    """
    depth, width = accuracy.shape
    return sum(
        float(np.prod([accuracy[level, rank] for level, rank in enumerate(path)]))
        for path in tree
        if len(path) <= depth and max(path) < width
    )


def save_tree(path: Path, draft: str, tree: Sequence[Ranks], counts: RankCounts) -> None:
    """Write a tree with what it rests on; a file that is there is replaced whole or not at all."""
    rows = {
        "format": FORMAT,
        "draft": draft,
        "reached": counts.reached.tolist(),
        "accuracy": np.round(counts.accuracy, 5).tolist(),
        "nodes": [list(ranks) for ranks in tree],
    }
    text = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items())
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_tree(path: str | Path, draft: str, width: int) -> tuple[Ranks, ...]:
    """The nodes of a tree file, the most valuable first.

    Args:
        draft: the method that will use it.
        width: how many ranks it has.

    Raises:
        MethodError: no such file, another format, another drafter's, or no tree.
    """
    path = Path(path)
    make = f"make one with: hasten train tree --draft {draft} -o {path.name} -m MODEL"
    if not path.is_file():
        raise MethodError(f"tree={path}: there is no such file; {make}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MethodError(f"tree={path} cannot be read as JSON ({error}); {make}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise MethodError(f"tree={path} is no tree file ('{FORMAT}'); {make}")
    if data.get("draft") != draft:
        raise MethodError(f"tree={path} was made for draft={data.get('draft')}; {make}")
    try:
        return _checked(data.get("nodes"), width)
    except ValueError as error:
        raise MethodError(f"tree={path}: {error}; {make}") from None


def _checked(nodes: Any, width: int) -> tuple[Ranks, ...]:
    if not isinstance(nodes, list) or not nodes:
        raise ValueError("it has no list of nodes")
    found: dict[Ranks, None] = {(): None}
    for node in nodes:
        if not isinstance(node, list) or not node or not all(type(rank) is int for rank in node):
            raise ValueError(f"{json.dumps(node)} is no list of ranks")
        path = tuple(node)
        if not all(0 <= rank < width for rank in path):
            raise ValueError(f"node {node} has a rank outside 0..{width - 1}")
        if path in found:
            raise ValueError(f"node {node} is there twice")
        if path[:-1] not in found:
            raise ValueError(f"node {node} comes before its parent, or has none")
        found[path] = None
    return tuple(found)[1:]
