"""Parts for tests of combinators: drafters that say what they are told to, and remember."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.methods import Card
from hasten.speculation.base import (
    Draftable,
    DraftContext,
    DraftProgress,
    Outcome,
    StatelessDrafting,
)
from hasten.speculation.tree import TokenTree, TreeBuilder


@dataclass(frozen=True, eq=False)
class Said(StatelessDrafting):
    """Proposes paths by the root's token. What it was told is in ``log`` and ``seen``."""

    answers: dict[int, list[list[int]]]
    log: list[Any] = field(default_factory=list)
    seen: list[Outcome] = field(default_factory=list)

    def open(self, sequence: Draftable) -> Any:
        self.log.append(("open", sequence.tokens[-1]))
        return ["state", len(self.log)]

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        self.log.append(("propose", [s.tokens[-1] for s in sequences], list(budgets)))
        trees = []
        for sequence, budget in zip(sequences, budgets, strict=True):
            assert sequence.draft_state[0] == "state"
            builder = TreeBuilder(sequence.tokens[-1])
            for path in self.answers.get(sequence.tokens[-1], []):
                node = 0
                for token in path:
                    if len(builder) <= budget or (node, token) in builder:
                        node = builder.add(node, token)
            trees.append(builder.build()[0])
        return trees

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        self.seen.extend(outcomes)

    def rollback(self, sequence: Draftable, length: int) -> None:
        self.log.append(("rollback", length))

    def close(self, sequence: Draftable) -> None:
        self.log.append(("close", sequence.draft_state[0]))


Said.card = Card(  # type: ignore[attr-defined]
    *("said", ("draft",), Said, "", "bitwise", "none", frozenset()),
    frozenset({"proposes-tokens", "drafts-from-text"}),
)


def context(drawn: bool = False) -> DraftContext:
    values: dict[str, Any] = {f.name: None for f in fields(DraftContext)}
    values |= {"cache": SimpleNamespace(num_blocks=99)}
    values |= {"should_stop": lambda progress: progress.depth >= 2, "drawn": drawn}
    return DraftContext(**values)


def opened(drafting: Any, *roots: int) -> list[Any]:
    sequences: list[Any] = [SimpleNamespace(tokens=[root], draft_state=None) for root in roots]
    for sequence in sequences:
        sequence.draft_state = drafting.open(sequence)
    return sequences


def rows(tree: TokenTree) -> NDArray[np.float32]:
    """Logits that tell the node: row i holds i."""
    return np.repeat(np.arange(len(tree), dtype=np.float32)[:, None], 3, axis=1)


__all__ = ["DraftProgress", "Said", "context", "opened", "rows"]
