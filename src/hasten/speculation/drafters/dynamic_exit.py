"""The target's first layers and its own head draft; how many of them is learned while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.kernels.logits import row_max_lse
from hasten.methods import MethodError, method
from hasten.speculation.base import (
    Computed,
    Draftable,
    DraftContext,
    DraftProgress,
    Outcome,
)
from hasten.speculation.first_layers import FirstLayers
from hasten.speculation.tree import TokenTree

Floats = NDArray[np.float64]

LOOK_EVERY = 8
"""Rounds between two looks at the exits of a sequence that does not draft: a look costs the head
once more for each exit, and the step cannot be replayed from a recording."""

PRIOR = 0.5
"""Acceptance at every exit before anything was seen."""

MEMORY = 0.99
"""Decay, a round, of what all sequences of an engine saw: how good its exits are is mostly the
model's, so a new sequence begins with that, at the weight of one position."""


@method(
    "del",
    slot="draft",
    paper="DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding",
    exact="bitwise",
    training="early exits in the target (hasten train layerskip)",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens",),
)
@dataclass(frozen=True)
class DynamicExit:
    """Drafts with the first layers; after each round picks the exit layer and the draft length.

    Verification passes every layer's state by, so the token that each exit would have drafted (its
    *shadow token*) is known for the price of the head. From the decayed share of shadow tokens
    that were right, the exit l and length d with the most tokens per layer run are found by full
    search: (1 + a + ... + a^d) / (d l + L), a the acceptance at l. d = 0 is plain decoding, which
    is what a model without usable exits gets. A round ends early where confidence falls below the
    middle between that of right and of wrong shadow tokens.

    ``decay`` forgets earlier rounds, ``k`` bounds d, every ``stride``-th layer is an exit, and
    ``head`` is what the output matrix costs in layers (the paper's objective leaves it out).
    """

    decay: float = 0.95
    k: int = 12
    stride: int = 1
    head: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay}: the weight of the round before is in (0, 1]")
        if self.k < 1:
            raise ValueError(f"k={self.k}: allow at least one token")
        if self.stride < 1:
            raise ValueError(f"stride={self.stride}: exits are at least one layer apart")
        if not 0 <= self.head < np.inf:
            raise ValueError(f"head={self.head}: a cost is finite and not negative")

    def start(self, context: DraftContext) -> DynamicExitDrafting:
        context.check_fits(self.k)
        layers = context.model.config.num_layers
        exits = tuple(range(self.stride, layers, self.stride))
        if not exits:
            raise MethodError(
                f"draft=del: the model has {layers} layers, so stride={self.stride} leaves no exit "
                "to draft at; lower it"
            )
        return DynamicExitDrafting(self, context, exits)


def tokens_per_layer(
    acceptance: Floats, exits: Floats, layers: int, most: int, head: float = 0.0
) -> Floats:
    """Expected tokens of a round by the layers that it runs, float64 [exits, most + 1].

    Args:
        acceptance: chance that a token drafted at each exit is accepted.
        most: the longest draft.
        head: cost of the output matrix in layers.
    """
    lengths = np.arange(most + 1)
    # a sum of powers, as the closed form divides by zero at 1
    expected = np.cumsum(acceptance[:, None] ** lengths, axis=1)
    run: Floats = lengths * (exits[:, None] + head) + layers + head
    return expected / run


@dataclass(slots=True, eq=False)
class ExitState:
    """One sequence: what its exits were worth, and the round in flight.

    All sums are decayed, float64, one entry an exit.

    Attributes:
        prior: acceptance at each exit as other sequences had it.
        positions: judged positions; the same for all exits.
        right: those at which the exit's shadow token was the target's.
        sure_right, sure_wrong: confidence, summed over right and over wrong shadow tokens.
        exit, length: what the next round does.
        looks_in: rounds without a look at the exits, while nothing is drafted.
        drafted: the round's tokens, the pending one first; ``states`` has their residual stream
            at each exit that was passed, by depth.
    """

    prior: Floats
    right: Floats
    sure_right: Floats
    sure_wrong: Floats
    positions: float = 0.0
    exit: int = 0
    length: int = 0
    looks_in: int = 0
    drafted: list[int] = field(default_factory=list)
    states: list[list[Tensor]] = field(default_factory=list)

    @property
    def acceptance(self) -> Floats:
        return (self.right + self.prior) / (self.positions + 1)

    def threshold(self) -> float:
        """Confidence below which a draft at the chosen exit ends; 0 until both kinds were seen."""
        right, wrong = self.right[self.exit], self.positions - self.right[self.exit]
        if not self.sure_right[self.exit] or not self.sure_wrong[self.exit]:
            return 0.0
        return float(self.sure_right[self.exit] / right + self.sure_wrong[self.exit] / wrong) / 2


class DynamicExitDrafting:
    """`Drafting` at exits; sequences of one step may leave at different ones."""

    sources: Sequence[str] = ()

    def __init__(self, settings: DynamicExit, context: DraftContext, exits: Sequence[int]) -> None:
        self.settings = settings
        self.should_stop = context.should_stop
        self.first = FirstLayers(context, "del")
        self.model = context.model
        self.exits = exits
        """Counts of layers after which the head may read."""
        self._looking = False
        self._right = np.full(len(exits), PRIOR)
        self._positions = 1.0

    @property
    def capture(self) -> Sequence[int]:
        """States at all exits, in steps after which some sequence looks at them."""
        return [count - 1 for count in self.exits] if self._looking else ()

    def open(self, sequence: Draftable) -> ExitState:
        none = np.zeros(len(self.exits))
        prior = self._right / self._positions
        state = ExitState(prior, none.copy(), none.copy(), none.copy())
        self._decide(state)
        if not state.length:
            state.looks_in = LOOK_EVERY - 1
        return state

    def _decide(self, state: ExitState) -> None:
        """The exit and length with the most tokens per layer; the earlier and shorter of equals."""
        value = tokens_per_layer(
            state.acceptance,
            np.array(self.exits, np.float64),
            self.model.config.num_layers,
            self.settings.k,
            self.settings.head,
        )
        state.exit, state.length = divmod(int(value.argmax()), value.shape[1])

    # ---- drafting ---------------------------------------------------------------------------

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        limits: dict[int, int] = {}
        self._looking = False
        for i, (sequence, budget) in enumerate(zip(sequences, budgets, strict=True)):
            state: ExitState = sequence.draft_state
            limit = min(budget, state.length)
            if limit and self.first.reserve(sequence, limit):
                limits[i] = limit
                state.drafted, state.states = [sequence.tokens[-1]], []
            self._looking |= i in limits or state.looks_in == 0
        self._draft(sequences, limits)
        trees = [TokenTree.root(s.tokens[-1]) for s in sequences]
        for i in limits:
            state = sequences[i].draft_state
            tree = trees[i] = TokenTree.chain(state.drafted)
            tree.layers = self.exits[state.exit]
            tree.hidden = torch.stack([passed[-1] for passed in state.states])
        return trees

    def _draft(self, sequences: Sequence[Draftable], limits: dict[int, int]) -> None:
        """Depth by depth, all sequences together; the last token of each runs its layers, too."""
        active, last, depth = list(limits), list[int](), 0
        while active or last:
            ends = self._run([sequences[i] for i in active + last], depth)
            rows = ends[: len(active)]
            going: list[int] = []
            last = []
            for i, token, probability in self._next(active, rows):
                sequence = sequences[i]
                state: ExitState = sequence.draft_state
                state.drafted.append(token)
                stops = (
                    depth + 1 == limits[i]
                    or probability < state.threshold()
                    or self.should_stop(DraftProgress(sequence, depth + 1, probability))
                )
                (last if stops else going).append(i)
            active = going
            depth += 1

    def _run(self, sequences: Sequence[Draftable], depth: int) -> list[Tensor]:
        """Run the newest node of each sequence up to its exit, keeping the state at each exit that
        is passed. Returns the last states, [H] each."""
        states: list[ExitState] = [s.draft_state for s in sequences]
        batch = self.first.batch(
            [(s, len(s.tokens) - 1 + depth, s.draft_state.drafted[depth:]) for s in sequences]
        )
        for state in states:
            state.states.append([])
        running = np.arange(len(states))
        hidden: Tensor | None = None
        for number, (start, end) in enumerate(pairwise((0, *self.exits))):
            stays = np.array([states[i].exit >= number for i in running], bool)
            if not stays.any():
                break
            if not stays.all():
                running, batch = running[stays], batch.take(np.flatnonzero(stays))
                hidden = None if hidden is None else hidden[torch.from_numpy(stays)]
            hidden = self.first.executor.run_layers(batch, range(start, end), hidden)
            for i, row in zip(running, hidden, strict=True):
                states[i].states[-1].append(row)
        return [state.states[-1][-1] for state in states]

    def _next(self, active: Sequence[int], rows: list[Tensor]) -> list[tuple[int, int, float]]:
        if not active:
            return []
        best, top, lse = row_max_lse(self.model.head(torch.stack(rows)))
        return list(zip(active, best.tolist(), (top - lse).exp().tolist(), strict=True))

    # ---- what became of it ------------------------------------------------------------------

    def absorb(self, chunks: Sequence[Computed]) -> None:
        pass  # what the target would say inside a prompt is not computed

    def rollback(self, sequence: Draftable, length: int) -> None:
        sequence.draft_state.drafted, sequence.draft_state.states = [], []

    def close(self, sequence: Draftable) -> None:
        if sequence.draft_state is not None:
            self.rollback(sequence, len(sequence.tokens))

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        judged: list[tuple[ExitState, list[int], int]] = []
        shadows: list[Tensor] = []
        for outcome in outcomes:
            state: ExitState = outcome.sequence.draft_state
            seen = all(count - 1 in outcome.hidden for count in self.exits)
            due = seen and (bool(state.states) or state.looks_in == 0)
            if due and (found := self._states(state, outcome)) is not None:
                shadows.append(found)
                judged.append((state, outcome.tokens, found.shape[1]))
            state.looks_in = max(0, state.looks_in - 1)
            state.drafted, state.states = [], []
        if not judged:
            return
        best, top, lse = row_max_lse(self.model.head(torch.cat([s.flatten(0, 1) for s in shadows])))
        sure = (top - lse).exp().double().numpy()
        at = 0
        for state, tokens, count in judged:
            end = at + count * len(self.exits)
            shape = (len(self.exits), count)
            self._learn(
                state, best.numpy()[at:end].reshape(shape), sure[at:end].reshape(shape), tokens
            )
            state.looks_in = 0 if state.length else LOOK_EVERY - 1
            at = end

    def _states(self, state: ExitState, outcome: Outcome) -> Tensor | None:
        """States at all exits of the positions that count, [exits, n, H]: those on the accepted
        path, as behind the first mismatch the context is another than the text's."""
        path = outcome.path[: len(outcome.tokens)]
        parts = []
        for number, count in enumerate(self.exits):
            if state.states and number <= state.exit:
                own = [state.states[node][number] for node in path if node < len(state.states)]
                part = torch.stack(own) if len(own) == len(path) else None
            else:
                part = outcome.hidden[count - 1][path]
            if part is None or part.isnan().any():  # a stack verified another drafter's tree
                return None
            parts.append(part)
        return torch.stack(parts)

    def _learn(
        self, state: ExitState, best: NDArray[np.int64], sure: Floats, tokens: list[int]
    ) -> None:
        """Count a round. ``best`` and ``sure`` are [exits, n]: shadow tokens and confidences."""
        decay = self.settings.decay
        right = best == np.array(tokens[: best.shape[1]])
        state.positions = decay * state.positions + best.shape[1]
        state.right = decay * state.right + right.sum(1)
        self._positions = MEMORY * self._positions + best.shape[1]
        self._right = MEMORY * self._right + right.sum(1)
        state.sure_right = decay * state.sure_right + (sure * right).sum(1)
        state.sure_wrong = decay * state.sure_wrong + (sure * ~right).sum(1)
        self._decide(state)
