"""A draft tree that grows where the draft model expects acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hasten.decoding.sampling import Number, generator
from hasten.methods import method
from hasten.speculation.base import Draftable, DraftContext
from hasten.speculation.draft_model import DraftModel, DraftRows, DraftState, load_draft
from hasten.speculation.draft_trees import TreeDrafting, draw, tempered_law


@method(
    "dyspec",
    slot="draft",
    paper="DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure (2024)",
    exact="bitwise",
    training="a draft model of the target's vocabulary (hasten train draft)",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens", "runs-draft-model", "tells-root-law"),
)
@dataclass(frozen=True)
class DySpec:
    """Spends a budget of nodes where the draft model itself predicts that verification gets.

    Every place at which a candidate could be added has a value, the estimated probability that
    verification reaches it: v for the first child of a node that is reached with v, and after a
    child of draft probability r the value v * (1 - r) for the next sibling and v * r for the
    child's own first child. Places are filled in the order of their values, which never rises
    along the way, so a threshold on the value fills the same places level by level with one pass
    of the draft model a level (the paper's layered variant). The threshold starts at 1 / budget
    and follows the size of the trees that came out.

    Draws, where the verifier weighs laws, are without replacement from the draft at
    ``temperature``, whatever the target's; values and laws are those of the draws. Otherwise the
    likeliest candidates are taken. ``depth`` bounds the passes of the draft model.
    """

    path: str = "reference-draft"
    n: int = 16
    depth: int = 8
    temperature: float = 0.6

    def __post_init__(self) -> None:
        if self.n < 1 or self.depth < 1:
            raise ValueError(f"n={self.n} and depth={self.depth} must be at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")

    def start(self, context: DraftContext) -> DySpecDrafting:
        runtime = DraftModel(load_draft(self.path, context), context, self.n)
        return DySpecDrafting(runtime, context.drawn, self)


@dataclass
class _Growth:
    """One sequence's tree while it grows."""

    budget: int
    threshold: float
    values: list[float] = field(default_factory=lambda: [1.0])
    laws: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    draws: int = 0
    """Random numbers taken."""


@dataclass
class DySpecDrafting(TreeDrafting):
    """`TreeDrafting` that fills places by value."""

    method: DySpec
    thresholds: dict[int, float] = field(default_factory=dict)
    """By budget: what gave trees of about that size lately."""

    def propose_trees(
        self, sequences: Sequence[Draftable], budgets: Sequence[int], first: DraftRows
    ) -> list[dict[int, NDArray[np.float64]]]:
        budgets = [min(budget, self.method.n) for budget in budgets]
        grown = [_Growth(b, self.thresholds.get(b, 1 / b)) for b in budgets]
        fresh = [(i, [0]) for i in range(len(sequences))]
        rows = first
        for _ in range(self.method.depth):
            level, row = [], 0
            for i, nodes in fresh:
                added = self._level(sequences[i], grown[i], nodes, rows, row)
                row += len(nodes)
                # a child is expanded if its own first child would be worth it
                expand = [n for n in added if grown[i].values[n] >= grown[i].threshold]
                if expand and len(grown[i].values) <= grown[i].budget:
                    level.append((i, expand))
            fresh = level
            if not fresh:
                break
            rows = self.compute([sequences[i].draft_state for i, _ in fresh], [n for _, n in fresh])
        for growth in grown:
            self._adapt(growth)
        return [growth.laws for growth in grown]

    def _level(
        self, sequence: Draftable, growth: _Growth, nodes: list[int], rows: DraftRows, row: int
    ) -> list[int]:
        """Fill the places below some nodes whose rows are here; the new nodes."""
        state: DraftState = sequence.draft_state
        added = []
        order = sorted(range(len(nodes)), key=lambda k: (-growth.values[nodes[k]], nodes[k]))
        for k in order:
            node, value = nodes[k], growth.values[nodes[k]]
            left = tempered_law(rows, row + k, self.method.temperature)
            if self.drawn and not sequence.sampler.greedy:
                growth.laws[node] = left.copy()
            while value >= growth.threshold and len(growth.values) <= growth.budget:
                if not self.runtime.room(state, len(growth.values)):
                    break
                token = self._pick(sequence, growth, left, node in growth.laws)
                share = float(left[token])
                added.append(state.add(node, token))
                growth.values.append(value * share)
                value *= 1 - share
                left[token] = 0.0
                total = left.sum()
                if not total > 0:
                    break
                left /= total
            if not any(parent == node for parent in state.parent):
                growth.laws.pop(node, None)
        return added

    def _pick(
        self, sequence: Draftable, growth: _Growth, left: NDArray[np.float64], drawn: bool
    ) -> int:
        if not drawn:
            return int(np.argmax(left))
        sampler, position = sequence.sampler, len(sequence.tokens)
        numbers = generator(sampler.seed, sampler.stream, position, Number.DRAFT, growth.draws)
        growth.draws += 1
        return draw(left, numbers.random())

    def _adapt(self, growth: _Growth) -> None:
        """Let the threshold of a budget follow the sizes that it gives."""
        nodes = len(growth.values) - 1
        if nodes >= growth.budget:
            growth.threshold *= 1.1
        elif nodes < 0.8 * growth.budget:
            growth.threshold /= 1.1
        # between what one node a level and what the tail of a law would be
        self.thresholds[growth.budget] = min(0.5, max(1e-4, growth.threshold))
