"""One draft model with several exits: a token leaves as early as the model is sure of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.engine.batch import Batch
from hasten.engine.executor import Runner
from hasten.kernels.logits import row_max_lse
from hasten.methods import MethodError, method
from hasten.models.base import Decoder
from hasten.models.loading import locate, read_facts
from hasten.speculation.base import DraftContext, Outcome
from hasten.speculation.draft_model import DraftModel, DraftRows, DraftState, load_draft
from hasten.speculation.draft_trees import ChainDrafting

AT_ONCE = 8
"""A chunk of more known tokens than this runs through all layers: it is a prompt."""


@method(
    "s2d",
    slot="draft",
    paper="S2D: Sorted Speculative Decoding For More Efficient Deployment of Nested Large "
    "Language Models (2024)",
    exact="bitwise",
    training="a draft model whose exits were trained together (hasten train draft --exits)",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens", "runs-draft-model", "tells-root-law"),
)
@dataclass(frozen=True)
class S2D:
    """A chain from nested sub-models that share layers, last norm and output matrix.

    Each token runs to the first exit; if the largest probability there reaches ``threshold`` it is
    drafted, otherwise the same hidden state goes on to the next exit, and the last one always
    answers. One sorted draft serves targets of several sizes: the dearer a target's pass, the more
    a good draft is worth and the higher the threshold should be.

    Rows that left early have no keys in the deeper layers. Their hidden states are kept, and the
    next row that goes deeper takes them along, so no row ever reads a key that was not computed.
    ``exits`` lists layers as ``1/2/3``; by default those that the checkpoint states
    (``draft_exits`` in config.json).
    """

    path: str = "reference-draft"
    k: int = 4
    threshold: float = 0.7
    exits: str = ""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k}: draft at least one token")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} is a probability")
        if self.exits and not all(part.isdigit() for part in self.exits.split("/")):
            raise ValueError(f"exits='{self.exits}', write layer counts such as 1/2/3")

    def start(self, context: DraftContext) -> ChainDrafting:
        model = load_draft(self.path, context)
        stated = read_facts(locate(self.path)).values.get("draft_exits")
        exits = [int(e) for e in self.exits.split("/")] if self.exits else stated
        layers = model.config.num_layers
        if not exits:
            raise MethodError(
                f"the draft model {self.path} states no exits: train one (hasten train draft "
                "--exits 1/2/3), or name them (exits=1/2/3) at the price of untrained ones"
            )
        if exits != sorted(set(exits)) or exits[-1] != layers or exits[0] < 1:
            raise MethodError(
                f"exits {exits} must rise and end with the draft's {layers} layers; the last exit "
                "answers whatever the others were unsure of"
            )
        runtime = SortedDraftModel(model, context, self.k, tuple(exits), self.threshold)
        return ChainDrafting(runtime, context.drawn, self.k, context.should_stop)


class _Shallow(NamedTuple):
    """A row that left early."""

    token: int
    level: int
    """Exits that it passed."""
    hidden: torch.Tensor
    """The stream float32 [H] after them."""


class SortedDraftModel(DraftModel):
    """A draft model that leaves its layers early. Chains only: a slot is a position."""

    def __init__(
        self,
        model: Decoder,
        context: DraftContext,
        nodes: int,
        exits: tuple[int, ...],
        threshold: float,
    ) -> None:
        super().__init__(model, context, nodes)
        self.exits, self.threshold = exits, threshold
        self.reuse = False  # pages of rows that left early have holes
        self.left_at = [0] * len(exits)
        """Answers by exit."""
        self._shallow: dict[int, dict[int, _Shallow]] = defaultdict(dict)  # table row -> slot

    def close(self, state: DraftState) -> None:
        self._shallow.pop(state.stream.table_row, None)
        super().close(state)

    def rollback(self, state: DraftState, length: int) -> None:
        self._shallow.pop(state.stream.table_row, None)
        self.cache.release(state.stream)
        state.forget()

    def settle(self, state: DraftState, outcome: Outcome) -> None:
        super().settle(state, outcome)
        kept = self._shallow[state.stream.table_row]
        for slot in [slot for slot in kept if slot >= state.stream.computed]:
            del kept[slot]

    def _run(self, batch: Batch, runner: Runner) -> DraftRows:
        self.runner.copy(self.cache.take_copies())
        self.passes += 1
        stream = runner.run_layers(batch, range(self.exits[0]))
        level = np.ones(batch.num_rows, np.int64)
        wanted = np.asarray(batch.wanted)
        logits = torch.empty(len(wanted), self.model.config.vocab_size)
        best = torch.empty(len(wanted), dtype=torch.int64)
        lse = torch.empty(len(wanted))
        hidden = torch.empty(len(wanted), self.model.config.hidden_size)
        unsure = np.arange(len(wanted))
        deep = self._prompts(batch)
        for passed, layers in enumerate([*pairwise(self.exits), None], 1):
            if len(unsure):
                rows = stream[torch.from_numpy(wanted[unsure])]
                at = torch.from_numpy(unsure)
                logits[at] = found = self.model.head(rows)
                hidden[at] = self.model.final_norm(rows)
                best[at], largest, lse[at] = row_max_lse(found)
                sure = torch.exp(largest - lse[at]).numpy() >= self.threshold
                if layers is None:
                    sure[:] = True
                self.left_at[passed - 1] += int(sure.sum())
                unsure = unsure[~sure]
            if layers is None:
                break
            going = set(batch.table_row[wanted[unsure]].tolist()) | deep
            stream = self._deeper(batch, runner, stream, level, passed, range(*layers), going)
        self._remember(batch, stream, level)
        return DraftRows(
            logits.numpy(), best.tolist(), lse.numpy(), hidden.numpy() if self.hidden else None
        )

    def _prompts(self, batch: Batch) -> set[int]:
        rows, counts = np.unique(batch.table_row, return_counts=True)
        return set(rows[counts > AT_ONCE].tolist())

    def _deeper(
        self,
        batch: Batch,
        runner: Runner,
        stream: torch.Tensor,
        level: NDArray[np.int64],
        passed: int,
        layers: range,
        going: set[int],
    ) -> torch.Tensor:
        """Run the sequences ``going`` through some layers, with all their rows that are at this
        exit, in this batch or left behind."""
        own = np.flatnonzero(np.isin(batch.table_row, list(going)) & (level == passed))
        behind = [
            (row, slot, shallow)
            for row in going
            for slot, shallow in self._shallow[row].items()
            if shallow.level == passed
        ]
        if not len(own) and not behind:
            return stream
        slots = np.array([slot for _, slot, _ in behind] + batch.slots[own].tolist(), np.int32)
        table_row = [row for row, _, _ in behind] + batch.table_row[own].tolist()
        tokens = [shallow.token for _, _, shallow in behind] + batch.tokens[own].tolist()
        some = Batch(
            tokens=np.array(tokens, np.int64),
            positions=slots,
            slots=slots,
            table_row=np.array(table_row, np.int32),
            base=slots + 1,
            mask=np.zeros((len(slots), 0), np.uint64),
            wanted=np.empty(0, np.int64),
            embedded=np.empty(0, np.int64),
            segment_rows=np.array([0, len(slots)], np.int32),
            segment_wanted=np.zeros(2, np.int32),
            tables=batch.tables,
        )
        index = torch.from_numpy(own)
        before = torch.cat([*(s.hidden[None] for _, _, s in behind), stream[index]])
        after = runner.run_layers(some, layers, before)
        for place, (row, slot, shallow) in enumerate(behind):
            if passed + 1 == len(self.exits):
                del self._shallow[row][slot]
            else:
                self._shallow[row][slot] = shallow._replace(
                    level=passed + 1, hidden=after[place].clone()
                )
        stream = stream.clone()
        stream[index] = after[len(behind) :]
        level[own] = passed + 1
        return stream

    def _remember(self, batch: Batch, stream: torch.Tensor, level: NDArray[np.int64]) -> None:
        for row in range(batch.num_rows):
            kept = self._shallow[int(batch.table_row[row])]
            if level[row] == len(self.exits):
                kept.pop(int(batch.slots[row]), None)
                continue
            kept[int(batch.slots[row])] = _Shallow(
                int(batch.tokens[row]), int(level[row]), stream[row].clone()
            )
