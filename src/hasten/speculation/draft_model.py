"""A draft model at work: its weights, its own pages, and a tree that grows for each sequence.

Every drafter that runs a model stands on this. A round for some sequences is

    begin    compute the known tokens that the model has not seen; rows of the pending tokens
    extend   add candidates below known nodes and compute them; rows of the new nodes   (repeated)
    settle   the target has judged: keep the keys and values of accepted nodes, drop the others

Nodes of a sequence are numbered in the order in which they were added; 0 is the pending token. A
node's keys and values lie at the slot after those of the node before, whatever branch that is on,
and rows see their own ancestors only. What became known without the model having seen it (the
target's own token after the last candidate, or all tokens of a sequence that did not draft for a
while) is computed by the next ``begin``: there is no case of its own for a draft that was accepted
to its last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hasten.cache.layout import PAGE_SIZE, KVStorage
from hasten.cache.manager import CacheManager, Stream
from hasten.cache.prefix import root_key
from hasten.engine.batch import WORD, Batch, Segment
from hasten.engine.cuda_graph import runner_for
from hasten.engine.executor import Moves, Runner
from hasten.methods import MethodError
from hasten.models.base import Decoder
from hasten.models.loading import load_model, locate
from hasten.models.tokenizer import Tokenizer
from hasten.speculation.base import Draftable, DraftContext, Outcome, check_fits
from hasten.weights.base import WeightFormat


@dataclass(slots=True, eq=False)
class DraftState:
    """One sequence in the draft model.

    Attributes:
        stream: its pages; ``stream.tokens`` are the sequence's own.
        token, parent, depth: of the nodes, by number; empty between rounds.
        seen: the ancestors of a node and itself below the pending token, as bits: bit i is the
            slot of node i + 1.
        computed: nodes whose keys and values are stored, as bits.
        place: tree node -> number, for ``settle``; set by who makes the tree.
    """

    stream: Stream
    token: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    computed: int = 0
    place: Sequence[int] = ()

    def forget(self) -> None:
        """Drop the nodes; the stream keeps what was committed."""
        self.token, self.parent, self.depth, self.seen = [], [], [], []
        self.computed, self.place = 0, ()

    def become_chain(self, token: list[int], computed: int) -> None:
        """Have these nodes, each below the one before; ``computed`` as bits."""
        self.token, self.computed = token, computed
        self.parent = list(range(-1, len(token) - 1))
        self.depth = list(range(len(token)))
        self.seen = [(1 << node) - 1 for node in range(len(token))]

    def add(self, parent: int, token: int) -> int:
        """A new node below another; its number."""
        number = len(self.parent)
        self.token.append(token)
        self.parent.append(parent)
        self.depth.append(self.depth[parent] + 1)
        self.seen.append(self.seen[parent] | 1 << (number - 1))
        return number


@dataclass(slots=True)
class DraftRows:
    """What the draft model says after some nodes; valid until its next pass.

    Attributes:
        logits: float32 [n, V].
        best: the likeliest token a row, the lowest id of equals.
        lse: log of the sum of exponentials, float32 [n].
        hidden: normed last hidden states float32 [n, H], if they were asked for.
    """

    logits: NDArray[np.float32]
    best: list[int]
    lse: NDArray[np.float32]
    hidden: NDArray[np.float32] | None

    def probability(self, row: int, token: int) -> float:
        """Of a token at temperature 1."""
        return float(np.exp(self.logits[row, token] - self.lse[row]))


def load_draft(path: str, context: DraftContext, format: WeightFormat | None = None) -> Decoder:
    """The draft model in a folder or GGUF file, refused unless it speaks the target's vocabulary.

    Raises:
        MethodError: its tokens are not the target's.
    """
    folder = locate(path)
    model = load_model(folder, progress=False, max_length=context.max_length, format=format)
    check_vocabulary(model, folder, context)
    return model


def check_vocabulary(model: Decoder, folder: Path, context: DraftContext) -> None:
    """Refuse a draft model whose token ids mean something else than the target's."""
    own, targets = model.config.vocab_size, context.model.config.vocab_size
    if differ := vocabulary_difference(folder, own, targets, context.tokenizer):
        raise MethodError(
            f"the draft model {folder.name} and the target have different vocabularies ({differ}); "
            "take a draft of the target's family, or train one: hasten train draft"
        )
    if model.config.max_positions < context.max_length:
        raise MethodError(
            f"the draft model {folder.name} was made for {model.config.max_positions} positions, "
            f"the target runs up to {context.max_length}; lower max_length or take another draft"
        )


def vocabulary_difference(folder: Path, own: int, targets: int, known: Tokenizer | None) -> str:
    """How a draft model's ``own`` ids differ from a target's, whose tokenizer may be ``known``.

    Returns:
        A few words, or "" if the same ids mean the same tokens.
    """
    if own != targets:
        return f"{own} ids against {targets}"
    if known is None:
        return ""
    drafts = Tokenizer.load(folder).core.get_vocab(with_added_tokens=True)
    theirs = known.core.get_vocab(with_added_tokens=True)
    other = {token for token, _ in drafts.items() ^ theirs.items()}
    return f"{len(other)} tokens have other ids, such as {min(other)!r}" if other else ""


class DraftModel:
    """Runs a draft model for the sequences of one engine."""

    def __init__(
        self,
        model: Decoder,
        context: DraftContext,
        nodes: int,
        *,
        grown_by: Decoder | None = None,
        keep: bool = True,
    ) -> None:
        """
        Args:
            model: computes known tokens.
            nodes: the most candidates that a tree will have.
            grown_by: computes candidates, on the same pages; by default ``model``.
            keep: whether accepted candidates keep the keys and values that they were drafted
                with; otherwise the next ``begin`` computes them again.
        """
        check_fits(f"a draft of {nodes} tokens", nodes, context.cache.num_blocks)
        self.model = model
        self.most_rows = context.max_batch_tokens
        self.hidden = context.hidden
        self.root_law = context.root_law
        layout = model.config.kv_layout()
        slots = context.max_length + 1 + nodes
        each = -(-slots // PAGE_SIZE)
        spare = context.max_sequences * -(-nodes // PAGE_SIZE)
        blocks = min(context.max_sequences * each, context.cache.num_blocks + spare)
        self.cache = CacheManager(layout, blocks, context.max_sequences, slots)
        storage = KVStorage(layout, [pool.num_pages for pool in self.cache.pools], model.device)
        self.runner = runner_for(model, storage, slots)
        self.growing = runner_for(grown_by, storage, slots) if grown_by else self.runner
        self.keep = keep
        self.reuse = context.prefix_reuse
        self.passes = 0
        """Forward passes so far."""

    def open(self, sequence: Draftable) -> DraftState:
        root = root_key("draft", "", sequence.tenant) if self.reuse else None
        return DraftState(Stream(sequence.tokens, root))

    def close(self, state: DraftState) -> None:
        state.forget()
        self.cache.release(state.stream)

    def rollback(self, state: DraftState, length: int) -> None:
        """Keep what was computed of the first ``length`` tokens."""
        state.forget()
        stream = state.stream
        del stream.keys[length // PAGE_SIZE :]
        if stream.computed > length:
            self.cache.release(stream)  # shared pages cannot be cut; the prefix index has the rest

    def begin(self, states: Sequence[DraftState]) -> tuple[list[int], DraftRows | None]:
        """Catch up with the known tokens.

        Returns:
            Indices of the sequences that can draft now, and a row for each of them: what follows
            its pending token. A sequence cannot if pages are lacking, or if it is so far behind
            that its tokens take more than this step's rows; it then catches up step by step.
        """
        left = self.most_rows
        ready: list[int] = []
        segments: list[Segment] = []
        caught_up: list[tuple[Stream, int]] = []
        for index in sorted(range(len(states)), key=lambda i: states[i].stream.behind):
            state = states[index]
            state.forget()
            stream = state.stream
            if stream.table_row < 0 and not self.cache.attach(stream):
                continue
            if not stream.behind:  # asked again for the same place
                stream.computed -= 1
            rows = min(stream.behind, left)
            if not rows or not self.cache.reserve(stream, stream.computed + rows):
                continue
            left -= rows
            known = stream.tokens[stream.computed : stream.computed + rows]
            whole = rows == stream.behind
            wanted = "last" if whole else "none"
            segments.append(Segment(stream.table_row, stream.computed, known, wanted=wanted))
            caught_up.append((stream, stream.computed + rows))
            if whole:
                ready.append(index)
                state.token, state.parent = [stream.tokens[-1]], [-1]
                state.depth, state.seen, state.computed = [0], [0], 1
        if not segments:
            return [], None
        found = self._run(Batch.build(segments, self.cache.tables), self.runner)
        for stream, computed in caught_up:
            self.cache.commit(stream, computed)
        return ready, found if ready else None

    def room(self, state: DraftState, nodes: int) -> bool:
        """Take pages for as many nodes in all (the pending token not counted)."""
        return self.cache.reserve(state.stream, state.stream.computed + nodes)

    def extend(self, states: Sequence[DraftState], nodes: Sequence[Sequence[int]]) -> DraftRows:
        """Compute the nodes ``nodes[i]`` of each state; their rows, in this order. Their ancestors
        are computed, and all have pages: see ``room``."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        bases: list[int] = []
        masked: list[tuple[int, int]] = []  # (row, bits)
        words = 0
        for state, some in zip(states, nodes, strict=True):
            stream, length = state.stream, state.stream.computed
            for node in some:
                slot = length + node - 1
                if state.seen[node] == (1 << node) - 1:  # all nodes before it: a chain
                    bases.append(slot + 1)
                else:
                    bases.append(length)
                    words = max(words, -(-node // WORD))
                    masked.append((len(slots), state.seen[node]))
                slots.append(slot)
                positions.append(length - 1 + state.depth[node])
                tokens.append(state.token[node])
                state.computed |= 1 << node
            rows += [stream.table_row] * len(some)
        mask = np.zeros((len(tokens), words), np.uint64)
        for row, bits in masked:
            for word in range(words):
                mask[row, word] = bits >> (WORD * word) & (2**WORD - 1)
        count = len(tokens)
        return self._run(
            Batch(
                tokens=np.array(tokens, np.int64),
                positions=np.array(positions, np.int32),
                slots=np.array(slots, np.int32),
                table_row=np.array(rows, np.int32),
                base=np.array(bases, np.int32),
                mask=mask,
                wanted=np.arange(count, dtype=np.int64),
                embedded=np.empty(0, np.int64),
                segment_rows=np.array([0, count], np.int32),
                segment_wanted=np.array([0, count], np.int32),
                tables=self.cache.tables,
            ),
            self.growing,
        )

    def settle(self, state: DraftState, outcome: Outcome) -> None:
        """Keep the nodes that were accepted and computed, as far as they go without a gap."""
        length = outcome.start + 1
        if not state.parent or state.stream.computed != length:
            state.forget()
            return
        kept: list[int] = []
        for node in outcome.path[1:] if self.keep else ():
            if not state.computed >> state.place[node] & 1:
                break
            kept.append(state.place[node])
        self._gather(state, kept)
        self.cache.commit(state.stream, length + len(kept))
        state.forget()

    def keep_chain(self, state: DraftState, nodes: int) -> None:
        """The first nodes of a chain became known, the last of them as the pending token; go on
        with those behind it."""
        stream = state.stream
        stream.computed += nodes
        # committed without giving pages back: the nodes behind lie on them
        state.become_chain(state.token[nodes:], state.computed >> nodes)

    def keep_path(self, state: DraftState, path: Sequence[int]) -> None:
        """Drop all nodes but a path, given by numbers from the pending token on, all computed.

        The path becomes a chain; the slots behind it are free for the nodes that come next.
        """
        self._gather(state, path[1:])
        state.become_chain([state.token[node] for node in path], (1 << len(path)) - 1)

    def _gather(self, state: DraftState, numbers: Sequence[int]) -> None:
        """Move the rows of some nodes, ascending, to the first slots behind the pending token."""
        length, moves = state.stream.computed, Moves([], [], [])
        for kept, number in enumerate(numbers, 1):
            if number != kept:
                moves.table_row.append(state.stream.table_row)
                moves.src.append(length + number - 1)
                moves.dst.append(length + kept - 1)
        if moves.src:
            self.runner.move(self.cache.tables, moves)

    def _run(self, batch: Batch, runner: Runner) -> DraftRows:
        if self.hidden:
            batch.embedded = batch.wanted
        self.runner.copy(self.cache.take_copies())
        out = runner.run(batch)
        self.passes += 1
        hidden = out.embeddings.numpy() if self.hidden else None
        return DraftRows(out.logits.numpy(), out.best.tolist(), out.lse.numpy(), hidden)
