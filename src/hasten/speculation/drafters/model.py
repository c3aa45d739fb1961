"""A small model drafts a chain, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hasten.decoding.sampling import Number, generator
from hasten.methods import method
from hasten.speculation.base import Draftable, DraftContext, DraftProgress, StopRule
from hasten.speculation.draft_model import (
    DraftModel,
    DraftRows,
    DraftState,
    TreeDrafting,
    draft_law,
    draw,
    load_draft,
)


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
        return ChainDrafting(runtime, context.drawn, self.k, context.should_stop)


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
