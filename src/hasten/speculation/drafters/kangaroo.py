"""The target's first layers and a small adapter draft; the target goes on from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from hasten.cache.layout import PAGE_SIZE, KVStorage, uniform_layout
from hasten.cache.manager import CacheManager, Stream
from hasten.cache.prefix import root_key
from hasten.engine.batch import Batch, Segment
from hasten.kernels.logits import row_max_lse
from hasten.kernels.rms_norm import add_rms_norm, rms_norm
from hasten.methods import MethodError, method
from hasten.models.base import Decoder
from hasten.models.layers import Attention, Rope, RopeFacts, vector
from hasten.models.paged import PagedKV
from hasten.speculation.base import Computed, Draftable, DraftContext, DraftProgress, Outcome
from hasten.speculation.first_layers import FirstLayers
from hasten.speculation.heads import HeadWeights, read_head
from hasten.speculation.tree import TokenTree

COMMAND = "hasten train kangaroo -m MODEL -o FILE"
LATE_ROWS = PAGE_SIZE
"""States that may wait for the adapter's next pass, a sequence."""


@method(
    "kangaroo",
    slot="draft",
    paper="Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting",
    exact="bitwise",
    training="an adapter for the target (hasten train kangaroo)",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens",),
)
@dataclass(frozen=True)
class Kangaroo:
    """The first layers of the target, an adapter and the target's own head draft a chain.

    The adapter is one attention and two norms, with a cache of its own. What the first layers
    computed is not computed again: verification runs the remaining layers only, so a draft token
    costs the first layers, the adapter and the head, and no second model is held. Drafting stops
    after the first token whose probability is below ``eta``; that token is still submitted. Pays
    where drafts agree often and no small model of the target's vocabulary exists.

    ``head`` is the adapter's file; the exit layer is written in it. ``k`` bounds a draft.
    """

    head: str = ""
    eta: float = 0.6
    k: int = 6

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta}: the confidence to go on is in 0..1 (0 never stops)")
        if self.k < 1:
            raise ValueError(f"k={self.k}: draft at least one token")

    def start(self, context: DraftContext) -> KangarooDrafting:
        context.check_fits(self.k)
        return KangarooDrafting(Adapter.read(self.head, context.model), context, self.eta, self.k)


class Adapter:
    """``norm(h + attention(norm(h)))``: the residual stream after a few layers to one that the
    target's head reads as if all layers had run."""

    def __init__(
        self, path: str, facts: dict[str, Any], weights: HeadWeights, model: Decoder
    ) -> None:
        self.layer = facts["layer"]
        """How many layers of the target run before it."""
        self.kv_heads, self.head_dim = facts["num_kv_heads"], facts["head_dim"]
        if not 1 <= self.layer < model.config.num_layers:
            raise MethodError(f"{path}: exit layer {self.layer} is not in the model")
        config = replace(
            model.config,
            num_heads=facts["num_heads"],
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
        )
        self.eps = config.norm_eps
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        rope = Rope(RopeFacts(tuple((1.0 / facts["rope_theta"] ** exponents).tolist())))
        self.attention = Attention(
            config, weights, 0, rope, q="q_proj", k="k_proj", v="v_proj", out="o_proj"
        )
        self.input_norm = vector(weights, "input_norm", config.hidden_size)
        self.output_norm = vector(weights, "output_norm", config.hidden_size)

    @classmethod
    def read(cls, path: str, model: Decoder) -> Adapter:
        """The adapter in a file. Raises ``MethodError`` unless it was trained for this model."""
        facts, tensors = read_head(path, "kangaroo", model, COMMAND)
        try:
            return cls(path, facts, HeadWeights(path, tensors), model)
        except KeyError as missing:
            raise MethodError(
                f"{path} does not state {missing}; train it again: {COMMAND}"
            ) from None

    def __call__(self, hidden: Tensor, kv: PagedKV) -> Tensor:
        attended = self.attention(rms_norm(hidden, self.input_norm, self.eps), kv)
        normed, _ = add_rms_norm(attended, hidden, self.output_norm, self.eps)
        return normed


@dataclass(slots=True, eq=False)
class KangarooState:
    """One sequence in the adapter.

    Attributes:
        stream: its pages in the adapter's cache; the first slot is that of position ``offset``.
        late: states [n, H] after the first layers of the positions behind those in the pages; the
            adapter takes them with its next pass.
        offset: earlier positions were not to be had; the adapter then sees the later ones only.
        drafted: the tokens of the draft that is being verified, the pending one first; empty
            between rounds. ``shallow`` has the state [H] of each.
        adapted: how many of these the adapter has keys of.
    """

    stream: Stream
    late: Tensor
    offset: int = 0
    drafted: list[int] = field(default_factory=list)
    shallow: list[Tensor] = field(default_factory=list)
    adapted: int = 0

    @property
    def known(self) -> int:
        """The first position of which nothing is known here."""
        return self.offset + self.stream.computed + len(self.late)


class KangarooDrafting:
    """`Drafting` with one adapter; all sequences of a step draft together, depth by depth."""

    sources: Sequence[str] = ()

    def __init__(self, adapter: Adapter, context: DraftContext, eta: float, k: int) -> None:
        self.adapter = adapter
        self.eta, self.k = eta, k
        self.should_stop = context.should_stop
        self.first = FirstLayers(context, "kangaroo")
        self.capture = (adapter.layer - 1,)
        self.again = context.max_batch_tokens
        """Positions that one step may run through the first layers again, where a prefix hit or a
        fork left the adapter without their states."""
        if self.first.windowed(adapter.layer):
            self.again = 0  # what was before the window is given back, so states cannot be redone
        slots = context.max_length + 1 + k
        each = -(-slots // PAGE_SIZE)
        spare = context.max_sequences * -(-k // PAGE_SIZE)
        blocks = min(context.max_sequences * each, context.cache.num_blocks + spare)
        layout = uniform_layout(1, adapter.kv_heads, adapter.head_dim, (None,))
        self.cache = CacheManager(layout, blocks, context.max_sequences, slots)
        self.storage = KVStorage(layout, [pool.num_pages for pool in self.cache.pools])
        self.reuse = context.prefix_reuse
        self._none = torch.empty(0, context.model.config.hidden_size)
        self.passes = 0
        """Passes of the adapter; ``repeated`` positions ran through the first layers again."""
        self.repeated = 0

    def open(self, sequence: Draftable) -> KangarooState:
        return KangarooState(self._stream(sequence), self._none)

    def _stream(self, sequence: Draftable) -> Stream:
        root = root_key("kangaroo", "", sequence.tenant) if self.reuse else None
        return Stream(sequence.tokens, root)

    def close(self, sequence: Draftable) -> None:
        if sequence.draft_state is not None:
            self._forget(sequence)

    def rollback(self, sequence: Draftable, length: int) -> None:
        self._forget(sequence)  # shared pages cannot be cut; the prefix index has the rest
        del sequence.draft_state.stream.keys[length // PAGE_SIZE :]

    def _forget(self, sequence: Draftable) -> None:
        state: KangarooState = sequence.draft_state
        self.cache.release(state.stream)
        if state.offset:
            state.stream, state.offset = self._stream(sequence), 0
        state.late, state.drafted, state.shallow, state.adapted = self._none, [], [], 0

    # ---- drafting ---------------------------------------------------------------------------

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        limits = {
            i: min(budget, self.k)
            for i, (s, budget) in enumerate(zip(sequences, budgets, strict=True))
            if budget and self.first.reserve(s, min(budget, self.k))
        }
        self._catch_up([(sequences[i], len(sequences[i].tokens) - 1) for i in limits])
        drafting = [i for i in limits if self._begin(sequences[i], limits[i])]
        active, last, depth = drafting, list[int](), 0
        while active or last:
            # a draft's last token is not drafted from, but its first layers run here, too
            rows = self.first.run(
                [
                    (s, len(s.tokens) - 1 + depth, s.draft_state.drafted[depth:])
                    for s in (sequences[i] for i in active + last)
                ],
                self.adapter.layer,
            )
            for i, row in zip(active + last, rows, strict=True):
                sequences[i].draft_state.shallow.append(row)
            going: list[int] = []
            last = []
            for i, token, probability in self._next(sequences, active):
                state: KangarooState = sequences[i].draft_state
                state.drafted.append(token)
                stops = (
                    depth + 1 == limits[i]
                    or probability < self.eta
                    or self.should_stop(DraftProgress(sequences[i], depth + 1, probability))
                )
                (last if stops else going).append(i)
            active = going
            depth += 1
        trees = [TokenTree.root(s.tokens[-1]) for s in sequences]
        for i in drafting:
            state = sequences[i].draft_state
            trees[i] = TokenTree.chain(state.drafted)
            trees[i].layers, trees[i].hidden = self.adapter.layer, torch.stack(state.shallow)
        return trees

    def _next(
        self, sequences: Sequence[Draftable], active: Sequence[int]
    ) -> list[tuple[int, int, float]]:
        """What the adapter says after the newest node of each sequence: (index, token,
        probability)."""
        if not active:
            return []
        chunks = []
        for i in active:
            state: KangarooState = sequences[i].draft_state
            rows, slot = state.shallow[-1][None], len(sequences[i].tokens) - 1 - state.offset
            if state.adapted:
                slot += state.adapted
            else:
                rows, slot = torch.cat([state.late, rows]), state.stream.computed
            state.adapted += 1
            chunks.append((state, slot, rows))
        best, top, lse = row_max_lse(self.first.model.head(self._adapt(chunks)))
        return list(zip(active, best.tolist(), (top - lse).exp().tolist(), strict=True))

    def _catch_up(self, wanted: Sequence[tuple[Draftable, int]]) -> None:
        """Know each sequence up to a position whose predecessors the target has computed.

        The first layers run again over positions whose states never came by: those of a prefix hit
        that the adapter's own cache had lost, and of the prompt's last block after a fork. Where
        that is not possible the adapter begins anew in the middle of the text.
        """
        chunks: list[tuple[Draftable, int, list[int]]] = []
        left = self.again
        for sequence, end in wanted:
            state: KangarooState = sequence.draft_state
            if not self._attach(state) or state.known >= end:
                continue
            if end - state.known > self.again:
                self._restart(sequence, end - self.again)
            start = state.known
            if start < end <= start + left:  # others took the rows of this step: in the next one
                left -= end - start
                chunks.append((sequence, start, sequence.tokens[start:end]))
        if chunks:
            rows = self.first.run(chunks, self.adapter.layer)
            self.repeated += len(rows)
            parts = rows.split([len(tokens) for _, _, tokens in chunks])
            self._take([(s, at, part) for (s, at, _), part in zip(chunks, parts, strict=True)])

    def _begin(self, sequence: Draftable, limit: int) -> bool:
        """Whether the adapter knows all but the pending token and has room for a draft."""
        state: KangarooState = sequence.draft_state
        root = len(sequence.tokens) - 1
        if (
            state.stream.table_row < 0
            or state.known != root
            or not self.cache.reserve(state.stream, root - state.offset + limit)
        ):
            return False
        state.drafted, state.shallow, state.adapted = [sequence.tokens[-1]], [], 0
        return True

    # ---- what became of it ------------------------------------------------------------------

    def absorb(self, chunks: Sequence[Computed]) -> None:
        layer = self.adapter.layer - 1
        self._feed([(c.sequence, c.start, c.hidden[layer]) for c in chunks])

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        rest = []
        for outcome in outcomes:
            state: KangarooState = outcome.sequence.draft_state
            path = [outcome.tree.token[node] for node in outcome.path]
            # a stack may have verified another drafter's tree
            own = sum(1 for _ in takewhile(_equal, zip(state.drafted, path, strict=False)))
            if own:
                kept = min(own, state.adapted)
                self.cache.commit(state.stream, outcome.start - state.offset + kept)
                # the last token of a draft has no keys in the adapter: if it was accepted, its
                # state goes into the next pass
                state.late = torch.stack(state.shallow)[kept:own]
            state.drafted, state.shallow, state.adapted = [], [], 0
            if own < len(path):
                rows = outcome.hidden[self.adapter.layer - 1][outcome.path[own:]]
                if not rows.isnan().any():  # else another drafter ran the first layers
                    rest.append((outcome.sequence, outcome.start + own, rows))
        self._feed(rest)

    def _feed(self, chunks: Sequence[tuple[Draftable, int, Tensor]]) -> None:
        """Take the states [n, H] of known tokens from a position on."""
        self._catch_up([(sequence, start) for sequence, start, _ in chunks])
        self._take(chunks)

    def _take(self, chunks: Sequence[tuple[Draftable, int, Tensor]]) -> None:
        """The same where nothing is missing before them. A few wait for the adapter's next pass."""
        due = []
        for sequence, start, rows in chunks:
            state: KangarooState = sequence.draft_state
            if state.stream.table_row < 0 or state.known < start:
                continue  # no room, or a gap that waits for a later step
            if new := max(0, len(rows) - (state.known - start)):
                state.late = torch.cat([state.late, rows[len(rows) - new :]])
            if len(state.late) > LATE_ROWS:
                due.append((state, state.stream.computed, state.late))
        due = [part for part in due if self.cache.reserve(part[0].stream, part[1] + len(part[2]))]
        if due:
            self._adapt(due)
        for state, computed, late in due:
            self.cache.commit(state.stream, computed + len(late))
            state.late = self._none

    def _attach(self, state: KangarooState) -> bool:
        return state.stream.table_row >= 0 or self.cache.attach(state.stream)

    def _restart(self, sequence: Draftable, start: int) -> None:
        """Begin at a position in the middle: what is before it stays unseen."""
        self._forget(sequence)
        state: KangarooState = sequence.draft_state
        state.stream, state.offset = Stream(sequence.tokens[start:]), start
        self._attach(state)  # has room: its own pages were just given back

    def _adapt(self, chunks: Sequence[tuple[KangarooState, int, Tensor]]) -> Tensor:
        """One pass of the adapter over states at consecutive slots; the last row of each [n, H]."""
        batch = Batch.build(
            [Segment(s.stream.table_row, slot, [0] * len(rows)) for s, slot, rows in chunks],
            self.cache.tables,
        )
        self.passes += 1
        out = self.adapter(torch.cat([rows for _, _, rows in chunks]), PagedKV(self.storage, batch))
        return out[torch.from_numpy(batch.wanted)]


def _equal(pair: tuple[int, int]) -> bool:
    return pair[0] == pair[1]
