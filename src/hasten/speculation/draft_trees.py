"""Trees of a draft model: what the drafters that grow them share, and the laws of their draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hasten.decoding.sampling import Number, distribution, generator
from hasten.speculation.base import Computed, Draftable, DraftProgress, Outcome, StopRule
from hasten.speculation.draft_model import DraftModel, DraftRows, DraftState
from hasten.speculation.tree import TokenTree, TreeBuilder


def draft_law(rows: DraftRows, row: int, sequence: Draftable) -> NDArray[np.float64]:
    """The law from which candidates after a row are drawn: the draft's logits under the request's
    temperature and filters, float64 [V], summing to 1. Penalties and bans, which depend on the
    path's history, stay with the target: a law may be anything, as long as it is the one that was
    drawn from."""
    law = distribution(rows.logits[row], sequence.sampler.params).dense(rows.logits.shape[1])
    return law / law.sum()


def tempered_law(rows: DraftRows, row: int, temperature: float) -> NDArray[np.float64]:
    """Softmax of a row of the draft at a temperature, without the request's filters."""
    z = rows.logits[row].astype(np.float64)
    weights: NDArray[np.float64] = np.exp((z - z[rows.best[row]]) / temperature)
    return weights / weights.sum()


def draw(law: NDArray[np.float64], number: float) -> int:
    """The token of a law (not 0 everywhere, any sum) at a quantile in [0, 1)."""
    cumulative = np.cumsum(law)
    place = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
    if place == len(law) or not law[place]:  # rounding at the end of the law
        place = int(np.flatnonzero(law)[-1])
    return place


@dataclass
class TreeDrafting(ABC):
    """`hasten.speculation.base.Drafting` by trees of a draft model; a subclass grows them.

    Attributes:
        drawn: draw candidates of requests that sample, since the verifier weighs laws.
    """

    runtime: DraftModel
    drawn: bool
    capture = ()
    sources = ()
    independent = False
    """Siblings are drawn with replacement."""

    @abstractmethod
    def propose_trees(
        self, sequences: Sequence[Draftable], budgets: Sequence[int], first: DraftRows
    ) -> list[dict[int, NDArray[np.float64]]]:
        """Add nodes to the states of sequences, at most ``budget`` (1 or more) each.

        Args:
            first: what follows the pending token of each.

        Returns:
            For each sequence the laws of the nodes below which candidates were drawn, by number.
        """

    def compute(self, states: Sequence[DraftState], nodes: Sequence[Sequence[int]]) -> DraftRows:
        """`DraftModel.extend`."""
        return self.runtime.extend(states, nodes)

    def open(self, sequence: Draftable) -> DraftState:
        return self.runtime.open(sequence)

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        asked = [i for i, budget in enumerate(budgets) if budget]
        ready, rows = self.runtime.begin([sequences[i].draft_state for i in asked])
        trees = [TokenTree.root(sequence.tokens[-1]) for sequence in sequences]
        if rows is None:
            return trees
        chosen = [asked[i] for i in ready]
        expected: list[NDArray[np.float32] | None] = [None] * len(chosen)
        if self.runtime.root_law:
            expected = list(np.exp(rows.logits - rows.lse[:, None]))
        laws = self.propose_trees(
            [sequences[i] for i in chosen], [budgets[i] for i in chosen], rows
        )
        for i, law, root_law in zip(chosen, laws, expected, strict=True):
            trees[i] = self._tree(sequences[i].draft_state, law)
            trees[i].root_law = root_law
        return trees

    def _tree(self, state: DraftState, laws: dict[int, NDArray[np.float64]]) -> TokenTree:
        builder = TreeBuilder(state.token[0])
        for number in range(1, len(state.parent)):
            builder.add_drawn(state.parent[number], state.token[number])
        builder.law = laws
        tree, state.place = builder.build(self.independent)
        return tree

    def absorb(self, chunks: Sequence[Computed]) -> None:  # noqa: B027 (nothing is captured)
        pass

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            self.runtime.settle(outcome.sequence.draft_state, outcome)

    def rollback(self, sequence: Draftable, length: int) -> None:
        self.runtime.rollback(sequence.draft_state, length)

    def close(self, sequence: Draftable) -> None:
        if sequence.draft_state is not None:
            self.runtime.close(sequence.draft_state)


@dataclass
class ChainDrafting(TreeDrafting):
    """`TreeDrafting` with one candidate a level."""

    k: int
    should_stop: StopRule

    def propose_trees(
        self, sequences: Sequence[Draftable], budgets: Sequence[int], first: DraftRows
    ) -> list[dict[int, NDArray[np.float64]]]:
        laws: list[dict[int, NDArray[np.float64]]] = [{} for _ in sequences]
        active, rows, depth = list(range(len(sequences))), first, 0
        while active:
            going = []
            for row, i in enumerate(active):
                sequence = sequences[i]
                state: DraftState = sequence.draft_state
                if not self.runtime.room(state, depth + 1):
                    continue
                token, probability = self._next(rows, row, sequence, depth, laws[i])
                state.add(depth, token)
                hidden = None if rows.hidden is None else rows.hidden[row]
                progress = DraftProgress(sequence, depth + 1, probability, hidden)
                if depth + 1 < min(budgets[i], self.k) and not self.should_stop(progress):
                    going.append(i)
            depth += 1
            active = going
            if active:
                states = [sequences[i].draft_state for i in active]
                rows = self.compute(states, [[depth]] * len(states))
        return laws

    def _next(
        self,
        rows: DraftRows,
        row: int,
        sequence: Draftable,
        depth: int,
        laws: dict[int, NDArray[np.float64]],
    ) -> tuple[int, float]:
        """The candidate after a row and its probability; a law that it was drawn from is kept."""
        sampler = sequence.sampler
        if not self.drawn or sampler.greedy:
            return rows.best[row], rows.probability(row, rows.best[row])
        law = laws[depth] = draft_law(rows, row, sequence)
        position = len(sequence.tokens) + depth
        token = draw(law, generator(sampler.seed, sampler.stream, position, Number.DRAFT).random())
        return token, float(law[token])
