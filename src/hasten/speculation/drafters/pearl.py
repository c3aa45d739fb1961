"""Drafting while the target verifies."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hasten.cache.manager import Stream
from hasten.decoding.sampling import Number, generator
from hasten.methods import method
from hasten.speculation.base import Computed, Draftable, DraftContext, Outcome
from hasten.speculation.draft_model import DraftModel, DraftRows, DraftState, load_draft
from hasten.speculation.draft_trees import draft_law, draw
from hasten.speculation.tree import TokenTree


@method(
    "pearl",
    slot="draft",
    paper="Parallel Speculative Decoding with Adaptive Draft Length (2024)",
    exact="bitwise",
    training="a draft model of the target's vocabulary (hasten train draft)",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens", "runs-draft-model"),
)
@dataclass(frozen=True)
class Pearl:
    """A chain drafter that works on the next ``k`` tokens during the target's pass.

    While the target verifies a chain, the draft model goes on behind its end. If all of the chain
    is accepted and the target's own token is the first of the new ones (post-verify), the others
    are a draft that took no time. Otherwise the new ones are dropped, the target runs its own token
    alone, and the draft of its continuation is written meanwhile (pre-verify): the target's next
    token verifies the first of it.

    A step takes as long as the slower of both instead of the sum. That pays where they run on
    different devices; on one processor give each a part of the cores (``--threads``: the draft
    runs on one more thread).
    """

    path: str = "reference-draft"
    k: int = 4

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ValueError(
                f"k={self.k}: the first token is spent on the match, draft two or more"
            )

    def start(self, context: DraftContext) -> PearlDrafting:
        runtime = DraftModel(load_draft(self.path, context), context, 2 * self.k)
        return PearlDrafting(runtime, self.k, context.drawn)


@dataclass(slots=True, eq=False)
class PearlState:
    """One sequence.

    Attributes:
        draft: nodes of the chain; ``draft.stream`` has tokens of its own, since the sequence's
            grow while the draft model runs.
        submitted: nodes that the target verifies now; those behind them are ahead of it.
        laws: from which nodes were drawn, by the node before.
        following: what comes after the last node, chosen already: (token, its law or None).
    """

    draft: DraftState
    submitted: int = 0
    laws: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    following: tuple[int, NDArray[np.float64] | None] | None = None


@dataclass
class PearlDrafting:
    """`hasten.speculation.base.Drafting` with one thread for the draft model."""

    runtime: DraftModel
    k: int
    drawn: bool
    capture = ()
    sources = ()
    carried: int = 0
    """Passes of the target whose successor found its draft ready."""

    def __post_init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="draft")
        self._running: Future[None] | None = None

    def open(self, sequence: Draftable) -> PearlState:
        state = self.runtime.open(sequence)
        return PearlState(DraftState(Stream(list(sequence.tokens), state.stream.root)))

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        self._wait()
        trees, going = [], []
        for sequence, budget in zip(sequences, budgets, strict=True):
            state: PearlState = sequence.draft_state
            known = state.draft.stream.tokens
            known.extend(sequence.tokens[len(known) :])
            nodes = state.draft.token[1 : 1 + budget]
            if len(nodes) < len(state.draft.token) - 1:  # what is ahead does not follow the tree
                self._drop(state)
                nodes = []
            state.submitted = len(nodes)
            tree = TokenTree.chain([sequence.tokens[-1], *nodes])
            tree.law = {node: law for node, law in state.laws.items() if node < len(nodes)}
            trees.append(tree)
            if budget:
                going.append(sequence)
        if going:
            self._running = self._worker.submit(self._draft, going)
        return trees

    def _draft(self, sequences: Sequence[Draftable]) -> None:
        """Go on behind the chains by ``k`` tokens each; runs beside the target's pass."""
        fresh = [s for s in sequences if s.draft_state.following is None]
        active = [s for s in sequences if s.draft_state.following is not None]
        ready, rows = self.runtime.begin([s.draft_state.draft for s in fresh])
        for row, index in enumerate(ready):
            assert rows is not None
            self._follow(fresh[index], rows, row)
            active.append(fresh[index])
        for _ in range(self.k):
            grown = []
            for sequence in active:
                state: PearlState = sequence.draft_state
                node = len(state.draft.token) - 1
                assert state.following is not None
                token, law = state.following
                if not self.runtime.room(state.draft, node + 1):
                    continue
                if law is not None:
                    state.laws[node] = law
                state.draft.add(node, token)
                grown.append(sequence)
            if not grown:
                break
            drafts = [s.draft_state.draft for s in grown]
            rows = self.runtime.extend(drafts, [[len(d.token) - 1] for d in drafts])
            for row, sequence in enumerate(grown):
                self._follow(sequence, rows, row)
            active = grown

    def _follow(self, sequence: Draftable, rows: DraftRows, row: int) -> None:
        """Choose what follows the last node, for when it is asked for."""
        state, sampler = sequence.draft_state, sequence.sampler
        if not self.drawn or sampler.greedy:
            state.following = rows.best[row], None
            return
        law = draft_law(rows, row, sequence)
        position = len(state.draft.stream.tokens) + len(state.draft.token) - 1
        number = generator(sampler.seed, sampler.stream, position, Number.DRAFT).random()
        state.following = draw(law, number), law

    def absorb(self, chunks: Sequence[Computed]) -> None:
        pass

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        self._wait()
        for outcome in outcomes:
            state: PearlState = outcome.sequence.draft_state
            draft, accepted = state.draft, len(outcome.path) - 1
            first = state.submitted + 1  # the node that the target's own token must carry
            matches = (
                len(outcome.tree) == first
                and accepted == state.submitted
                and len(outcome.tokens) == accepted + 1
                and first < len(draft.token)
                and draft.token[first] == outcome.tokens[-1]
                and draft.computed >> first & 1
            )
            if matches:
                self._carry(state, outcome)
                continue
            draft.stream.tokens.extend(outcome.tokens)
            draft.place = range(len(outcome.tree))
            self.runtime.settle(draft, outcome)
            self._drop(state)

    def _carry(self, state: PearlState, outcome: Outcome) -> None:
        """The nodes up to the matching one become known; those behind it are the next draft.

        They stay where they are: a chain's slots are its positions.
        """
        self.carried += 1
        draft, first = state.draft, state.submitted + 1
        draft.stream.tokens.extend(outcome.tokens)
        self.runtime.keep_chain(draft, first)
        state.laws = {node - first: law for node, law in state.laws.items() if node >= first}

    def _drop(self, state: PearlState) -> None:
        state.draft.forget()
        state.laws, state.following, state.submitted = {}, None, 0

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def rollback(self, sequence: Draftable, length: int) -> None:
        self._wait()
        state = sequence.draft_state
        self._drop(state)
        del state.draft.stream.tokens[length:]
        self.runtime.rollback(state.draft, length)

    def close(self, sequence: Draftable) -> None:
        if sequence.draft_state is not None:
            self._wait()
            self._drop(sequence.draft_state)
            self.runtime.close(sequence.draft_state.draft)
