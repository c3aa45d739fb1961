"""A small model drafts a chain, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.decoding.sampling import Number, generator
from hasten.methods import method
from hasten.speculation.base import Draftable, DraftContext, DraftProgress, Outcome, StopRule
from hasten.speculation.draft_model import DraftModel, DraftRows, DraftState, draft_law, load_draft
from hasten.speculation.tree import TokenTree


@method(
    "model",
    slot="draft",
    paper="Fast Inference from Transformers via Speculative Decoding (Leviathan et al., 2023)",
    exact="bitwise",
    training="a draft model of the target's vocabulary (hasten train draft)",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens", "runs-draft-model"),
)
@dataclass(frozen=True)
class ModelDraft:
    """A draft model writes ``k`` tokens ahead, with a cache of its own.

    Pays where a model of a tenth of the target's size or less often agrees with it; nothing has to
    repeat itself in the text. ``path`` is a checkpoint folder, GGUF file or hub id, by default the
    draft that comes with the reference model. With a verifier that weighs draft laws (chain,
    recursive, k-seq) the tokens of sampled requests are drawn, otherwise each is the draft's
    likeliest.
    """

    path: str = "reference-draft"
    k: int = 4

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k}: draft at least one token")

    def start(self, context: DraftContext) -> ChainDrafting:
        runtime = DraftModel(load_draft(self.path, context), context, self.k)
        return ChainDrafting(runtime, self.k, context.drawn, context.should_stop)


@dataclass
class ChainDrafting:
    """`Drafting` by chains of a draft model."""

    runtime: DraftModel
    k: int
    drawn: bool
    should_stop: StopRule
    capture: Sequence[int] = ()
    sources: Sequence[str] = ()

    def open(self, sequence: Draftable) -> DraftState:
        return self.runtime.open(sequence)

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        lengths = [min(budget, self.k) for budget in budgets]
        asked = [i for i, length in enumerate(lengths) if length]
        states = [sequences[i].draft_state for i in asked]
        ready, rows = self.runtime.begin(states)
        laws: dict[int, dict[int, Any]] = {i: {} for i in asked}
        active = [asked[i] for i in ready]
        depth = 0
        while active and rows is not None:
            going = []
            for row, i in enumerate(active):
                sequence = sequences[i]
                state: DraftState = sequence.draft_state
                if not self.runtime.room(state, depth + 1):
                    continue
                token, probability = self._next(rows, row, sequence, depth, laws[i])
                state.add(depth, token)
                if depth + 1 < lengths[i] and not self.should_stop(
                    DraftProgress(
                        sequence,
                        depth + 1,
                        probability,
                        None if rows.hidden is None else rows.hidden[row],
                    )
                ):
                    going.append(i)
            depth += 1
            if going:
                states = [sequences[i].draft_state for i in going]
                rows = self.runtime.extend(states, [1] * len(states))
            active = going
        trees = []
        for i, sequence in enumerate(sequences):
            state = sequence.draft_state
            tree = TokenTree.chain([sequence.tokens[-1], *(state.token[1:] if i in laws else ())])
            tree.law = laws.get(i, {})
            if i in laws:
                state.place = range(len(tree))
            trees.append(tree)
        return trees

    def _next(
        self, rows: DraftRows, row: int, sequence: Draftable, depth: int, laws: dict[int, Any]
    ) -> tuple[int, float]:
        """The candidate after a row and its probability; a law that it was drawn from is kept."""
        sampler = sequence.sampler
        if not self.drawn or sampler.greedy:
            return rows.best[row], rows.probability(row, rows.best[row])
        law = laws[depth] = draft_law(rows, row, sequence)
        position = len(sequence.tokens) + depth
        number = generator(sampler.seed, sampler.stream, position, Number.DRAFT).random()
        token = min(int(np.searchsorted(np.cumsum(law), number, side="right")), len(law) - 1)
        while not law[token]:
            token -= 1
        return token, float(law[token])

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            self.runtime.settle(outcome.sequence.draft_state, outcome)

    def rollback(self, sequence: Draftable, length: int) -> None:
        self.runtime.rollback(sequence.draft_state, length)

    def close(self, sequence: Draftable) -> None:
        if sequence.draft_state is not None:
            self.runtime.close(sequence.draft_state)
