"""The step loop: plan, draft, run, verify, commit.

There are no phases. A sequence has known tokens and computed positions; each step computes some
of what is behind, and where the last known token is among it, a new one (or, with drafts,
several) can be chosen. Prompt chunks, decodes, drafts, prefix hits and resumption after
preemption differ in nothing but counts.
"""

from __future__ import annotations

import logging
import secrets
from bisect import bisect_left, insort
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hasten.cache.layout import PAGE_SIZE, KVStorage
from hasten.cache.manager import CacheManager, Stream
from hasten.cache.prefix import root_key
from hasten.decoding.constraints.base import ConstrainContext, Constraining, ConstraintError
from hasten.decoding.params import SamplingParams
from hasten.decoding.sampling import NoTokenLeft, Sampler
from hasten.decoding.text import TextStream
from hasten.engine.batch import Batch, Segment
from hasten.engine.clock import Clock, WallClock
from hasten.engine.cuda_graph import runner_for
from hasten.engine.executor import Begun, Executor, InlineExecutor, Moves, Output
from hasten.engine.profile import Profile
from hasten.engine.request import Delta, Figures, Request, Sequence
from hasten.engine.walk import Rows, SequenceWalk
from hasten.models.base import Decoder
from hasten.models.tokenizer import Tokenizer
from hasten.scheduling.base import Grant, Plan
from hasten.speculation.base import (
    Computed,
    ControlContext,
    Controlling,
    DraftContext,
    Drafting,
    Load,
    Outcome,
    StepReport,
)
from hasten.speculation.constrained import allowed_part
from hasten.speculation.statistics import DraftStatistics
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack

logger = logging.getLogger(__name__)

_PLAIN = TokenTree.root(0)
"""What is verified where nothing was drafted; a root's token is never looked at."""

HEAL_EVERY = 4096
"""Steps between two looks at the page ledger of a busy engine; an idle one is checked at once."""


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
        max_sequences: sequences that hold pages at the same time.
        max_batch_tokens: rows of a step, known tokens and candidates together.
        max_length: longest sequence; None = what the model was made for.
        kv_bytes: memory for keys and values.
        prefix_reuse: whether requests may start from pages that others computed.
        model_id: identifies the weights in prefix keys.
    """

    max_sequences: int = 64
    max_batch_tokens: int = 512
    max_length: int | None = None
    kv_bytes: int = 1 << 30
    prefix_reuse: bool = True
    model_id: str = ""

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_batch_tokens", "max_length", "kv_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
        if self.max_batch_tokens < self.max_sequences:
            raise ValueError(
                f"max_batch_tokens={self.max_batch_tokens} leaves some of the "
                f"max_sequences={self.max_sequences} without a row in every step; raise it"
            )


class RequestRefused(ValueError):
    """A request that can never run; the text says what to change."""


class ContractBroken(AssertionError):
    """A part of the stack did to some sequences what it must not: they end, the others go on."""

    def __init__(self, part: str, broken: Seq[tuple[Sequence, str]]) -> None:
        super().__init__(f"{part} broke its contract: {broken[0][1]}")
        self.sequences = [sequence for sequence, _ in broken]


@dataclass(slots=True)
class EngineStats:
    """Counters since start."""

    steps: int = 0
    recorded_steps: int = 0
    """Steps whose forward pass was one native call."""
    rows: int = 0
    speculation: DraftStatistics = field(default_factory=DraftStatistics)
    step_seconds: float = 0.0
    forward_seconds: float = 0.0
    decode_steps: int = 0
    """Steps in which every sequence had one known token to compute (and perhaps candidates)."""
    decode_seconds: float = 0.0
    """Forward time of the decode steps."""
    decode_kv_bytes: int = 0
    """Bytes of keys and values that the decode steps read; windows read no more than themselves."""
    draft_seconds: float = 0.0
    """Proposing candidates and learning from what became of them."""
    preemptions: int = 0
    finished: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that became output."""
        return self.speculation.tokens


class Engine:
    """Runs requests. Not thread-safe: one thread adds, aborts and steps."""

    def __init__(
        self,
        model: Decoder,
        stack: Stack,
        config: EngineConfig | None = None,
        clock: Clock | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """``tokenizer`` is for methods that compare vocabularies or read texts; the engine itself
        runs on token ids.

        Raises:
            MethodError: the stack cannot run on this model.
        """
        self.config = config or EngineConfig()
        self.stack = stack
        self.clock = clock or WallClock()
        self.model = model
        facts = model.config
        stack.check(facts.provides, facts.architecture)
        plain = stack["codec"].layout(facts.kv_layout())
        groups = tuple(stack["select"].view(group) for group in plain.groups)
        layout = replace(plain, groups=groups)
        longest = self.config.max_length or facts.max_positions
        if longest > facts.max_positions:
            raise ValueError(
                f"max_length={longest} is beyond the {facts.max_positions} positions that "
                "the model was made for"
            )
        wanted = self.config.max_sequences * -(-(longest + 1) // PAGE_SIZE)
        blocks = min(wanted, self.config.kv_bytes // layout.block_bytes())
        if blocks < 1:
            raise ValueError(
                f"kv_bytes={self.config.kv_bytes} holds no page of {layout.block_bytes()} bytes"
            )
        self.max_length = min(longest, blocks * PAGE_SIZE)
        self.cache = CacheManager(layout, blocks, self.config.max_sequences, self.max_length + 1)
        storage = KVStorage(layout, [p.num_pages for p in self.cache.pools], model.device)
        self.runner = runner_for(model, storage, self.max_length + 1)
        self.executor: Executor = InlineExecutor(self.runner)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.requests: dict[str, Request] = {}
        self.stats = EngineStats()
        self.profile: Profile | None = None
        """Set it to have the native operations of each step counted (``profiling``)."""
        self._arrivals = 0
        self._drafts = "proposes-tokens" in stack["draft"].card.does
        # drafters that may propose without being verified do not mind if a part of it is not
        self._cuts = "drafts-from-text" in stack["draft"].card.does
        self.constraining: Constraining = stack["constrain"].start(
            ConstrainContext(facts.vocab_size, tokenizer)
        )
        self.control: Controlling = stack["control"].start(
            ControlContext(
                draft=stack["draft"],
                drafting=lambda: self.drafting,
                max_batch_tokens=self.config.max_batch_tokens,
                time_step=self._time_step,
                blocks=self.cache.num_blocks,
            )
        )
        self.drafting: Drafting = stack["draft"].start(
            DraftContext(
                model=model,
                runner=self.runner,
                executor=self.executor,
                cache=self.cache,
                tokenizer=tokenizer,
                max_sequences=self.config.max_sequences,
                max_batch_tokens=self.config.max_batch_tokens,
                max_length=self.max_length,
                prefix_reuse=self.config.prefix_reuse,
                should_stop=self.control.should_stop,
                hidden="draft-hidden-states" in stack["control"].card.needs,
                drawn="weighs-draft-laws" in stack["verify"].card.does,
            )
        )
        # only what changes stored values or who may read them belongs into a prefix key
        self._cache_identity = str(stack.baseline())

    @property
    def unrecorded(self) -> str | None:
        """Why forward passes of few rows are not recorded, or None if they are."""
        recorder = self.runner.recorder
        return recorder.refused if recorder else "they run on a device"

    # ---- requests ---------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(
        self,
        prompt: Seq[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        tenant: str = "",
        priority: int = 0,
        bad_words: Seq[Seq[int]] = (),
        texts: Seq[TextStream] = (),
        embed: bool = False,
    ) -> Request:
        """Queue a request.

        Args:
            prompt: token ids, at least one.
            params: fields that are None take the model's defaults.
            tenant: requests share cached prefixes only within a tenant.
            priority: smaller runs first and is preempted last.
            bad_words: ``params.bad_words`` as token ids.
            texts: one text stream per sequence if stop strings are to be found.
            embed: give the normed last hidden state of the last prompt token instead of new
                tokens; ``params`` does not matter then.

        Raises:
            RequestRefused: it can never run; nothing was queued.
        """
        if embed:
            params = SamplingParams(max_tokens=0)
        params = params.resolved(self.model.sampling_defaults)
        prompt = list(prompt)
        self._check(prompt, params, bad_words, texts)
        request_id = request_id or f"req-{secrets.token_hex(8)}"
        if request_id in self.requests:
            raise RequestRefused(f"request id '{request_id}' is in use")
        limit = self.max_length
        if params.max_tokens is not None:
            limit = min(limit, len(prompt) + params.max_tokens)
        eos: frozenset[int] = frozenset()
        if not params.ignore_eos:  # a checkpoint may name ids beyond its own vocabulary
            vocab = self.model.config.vocab_size
            eos = frozenset(t for t in self.model.config.eos_ids if 0 <= t < vocab)
        try:
            constraint = self.constraining.open(params, eos)
        except ConstraintError as error:
            raise RequestRefused(str(error)) from None
        request = Request(
            request_id,
            self._arrivals,
            prompt,
            params,
            limit,
            eos,
            priority,
            embed=embed,
            tenant=tenant,
        )
        self._arrivals += 1
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None] * len(prompt)
        root = None
        if self.config.prefix_reuse and params.prompt_logprobs is None:
            root = root_key(self._cache_identity, self.config.model_id, tenant)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        now = self.clock.now()
        for index in range(params.n):
            tokens = list(prompt)
            own = constraint.fork() if constraint is not None and index else constraint
            sequence = Sequence(
                request=request,
                index=index,
                tokens=tokens,
                stream=Stream(tokens, root),
                sampler=Sampler(params, prompt, eos, seed, index, bad_words, own),
                figures=Figures(now),
                text=texts[index] if texts else None,
            )
            sequence.draft_state = self.drafting.open(sequence)
            request.sequences.append(sequence)
        first, *request.dormant = request.sequences
        self.requests[request_id] = request
        insort(self.waiting, first, key=_rank)
        return request

    def abort(self, request_id: str) -> list[Delta]:
        """End a request wherever it is; an unknown id is normal (it may just have finished)."""
        request = self.requests.get(request_id)
        if request is None:
            return []
        request.dormant.clear()
        deltas = [Delta(s, []) for s in request.sequences if s.finish_reason is None]
        for delta in deltas:
            delta.sequence.finish_reason = "abort"
            self._retire(delta.sequence)
        return deltas

    def _check(
        self,
        prompt: list[int],
        params: SamplingParams,
        bad_words: Seq[Seq[int]],
        texts: Seq[TextStream],
    ) -> None:
        vocab = self.model.config.vocab_size
        if not prompt:
            raise RequestRefused("the prompt is empty; give at least one token (such as BOS)")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise RequestRefused(f"prompt has token ids outside 0..{vocab - 1}")
        room = self.max_length - (params.max_tokens != 0)
        if len(prompt) > room:
            raise RequestRefused(
                f"the prompt has {len(prompt)} tokens, at most {room} fit (context "
                f"{self.max_length}); shorten it, or raise max_length or kv_bytes"
            )
        for name, ids in (
            ("logit_bias", params.logit_bias),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("stop_token_ids", params.stop_token_ids),
            ("bad_words", [token for word in bad_words for token in word]),
        ):
            for token in ids:
                if not 0 <= token < vocab:
                    raise RequestRefused(f"{name} names token {token}, outside 0..{vocab - 1}")
        if params.allowed_token_ids is not None and not len(params.allowed_token_ids):
            raise RequestRefused("allowed_token_ids is empty: nothing could be generated")
        if not all(len(word) for word in bad_words):
            raise RequestRefused("bad_words holds an empty entry")
        if params.stop and len(texts) != params.n:
            raise RequestRefused("stop strings need a tokenizer")
        if refusal := self.stack["verify"].refuses(params):
            raise RequestRefused(refusal)

    # ---- one step ---------------------------------------------------------------------------

    def step(self) -> list[Delta]:
        """Run one batch and return what it added. An idle engine returns an empty list."""
        began = self.clock.now()
        profiled = self.profile.begin_step() if self.profile is not None else 0.0
        plan = self._plan()
        if not plan.grants:
            return [] if plan.preempted or self._heal() else self._unblock()
        try:
            load, trees, draft_seconds = self._draft(plan)
            batch, begun = self._build(plan, trees)
            output = self.executor.submit(
                batch, self.cache.take_copies(), self.drafting.capture, begun
            ).result()
            computed = self.clock.now()
            chunks = self._chunks(plan, batch, output)
            deltas, outcomes = self._verify_and_commit(plan, trees, batch, output)
            verified = self.clock.now()
            if chunks:
                self.drafting.absorb(chunks)
            self.drafting.observe(outcomes)
            draft_seconds += self.clock.now() - verified
        except ContractBroken as error:  # raised before anything was computed
            logger.exception("a draft cannot be verified; its sequence ends with an error")
            self.executor.copy(self.cache.take_copies())
            return self._fail(error.sequences, error)
        except Exception as error:
            logger.exception("a step failed; its sequences end with an error")
            return self._fail([grant.sequence for grant in plan.grants], error)
        self._check_pending(plan, deltas)
        for delta in deltas:
            if delta.sequence.finish_reason is not None:
                self._retire(delta.sequence)
        self.stats.steps += 1
        self.stats.rows += batch.num_rows
        self.stats.recorded_steps += output.recorded
        self.stats.forward_seconds += output.seconds
        self.stats.draft_seconds += draft_seconds
        decode, kv_bytes = plan.rows == len(plan.grants), 0
        if decode:
            kv_bytes = self._kv_bytes(batch.base[batch.segment_rows[1:] - 1])
            self.stats.decode_steps += 1
            self.stats.decode_seconds += output.seconds
            self.stats.decode_kv_bytes += kv_bytes
        if self.profile is not None:
            self.profile.end_step(
                profiled,
                decode=decode,
                recorded=output.recorded,
                rows=batch.num_rows,
                kv_bytes=kv_bytes,
            )
        seconds = self.clock.now() - began
        self.stats.step_seconds += seconds
        if self._drafts:
            self.control.observe(
                StepReport(
                    load=load,
                    rows=batch.num_rows,
                    candidates=sum(len(tree) - 1 for tree in trees.values()),
                    draft_seconds=draft_seconds,
                    forward_seconds=output.seconds,
                    verify_seconds=verified - computed,
                    step_seconds=seconds,
                    outcomes=outcomes,
                )
            )
        if not self.running or self.stats.steps % HEAL_EVERY == 0:
            self._heal()
        return deltas

    def _kv_bytes(self, contexts: NDArray[np.int32]) -> int:
        """Bytes that one row per context length reads."""
        layout, total = self.cache.layout, 0
        for index, group in enumerate(layout.groups):
            seen = contexts
            if group.window is not None:
                seen = np.minimum(contexts, group.window + group.sinks)
            page = layout.page_bytes(index) * group.head_groups
            total += int(seen.sum()) * page // PAGE_SIZE
        return total

    def _plan(self) -> Plan:
        plan: Plan = self.stack["schedule"].plan(
            self.waiting, self.running, self.cache, self.config.max_batch_tokens
        )
        for sequence in plan.preempted:
            _take_out(self.running, sequence)
            insort(self.waiting, sequence, key=_rank)
            self.drafting.close(sequence)
            sequence.figures.preemptions += 1
            self.stats.preemptions += 1
        for sequence in plan.admitted:
            _take_out(self.waiting, sequence)
            insort(self.running, sequence, key=_rank)
            figures = sequence.figures
            if figures.scheduled is None:
                figures.scheduled = self.clock.now()
                figures.cached_tokens = sequence.stream.computed
        return plan

    def _draft(self, plan: Plan) -> tuple[Load, dict[int, TokenTree], float]:
        """The load, trees with candidates by index of the grant, and seconds of proposing."""
        places = [
            (i, g.sequence)
            for i, g in enumerate(plan.grants)
            if g.reaches_end and not g.sequence.request.dormant
        ]
        sequences = [sequence for _, sequence in places]
        left = self.config.max_batch_tokens - plan.rows
        load = Load(
            decoding=len(sequences),
            rows_taken=plan.rows,
            rows_left=left,
            waiting=len(self.waiting),
            context=sum(len(s.tokens) for s in sequences) if self._drafts else 0,
        )
        trees: dict[int, TokenTree] = {}
        if not self._drafts or not sequences:
            return load, trees, 0.0
        budgets = self.control.plan(sequences, load)
        if not any(budgets):
            return load, trees, 0.0
        # the last token that may be generated is never a root, so drafts stop one before it
        budgets = [
            max(0, min(budget, s.request.limit - len(s.tokens) - 1))
            for budget, s in zip(budgets, sequences, strict=True)
        ]
        if sum(budgets) > left:
            raise AssertionError(f"budgets {budgets} exceed the {left} rows that are left")
        if not any(budgets):  # all are about to reach their limit
            return load, trees, 0.0
        began = self.clock.now()
        proposed = self.drafting.propose(sequences, budgets)
        broken = [
            (sequence, why)
            for (i, sequence), budget, tree in zip(places, budgets, proposed, strict=True)
            if (why := self._misdrafted(plan.grants[i], tree, budget)) is not None
        ]
        if broken:
            raise ContractBroken(f"draft={self.stack['draft'].card.name}", broken)
        for (i, sequence), tree in zip(places, proposed, strict=True):
            if self._cuts and sequence.sampler.constraint is not None:
                tree = allowed_part(tree, sequence.sampler.constraint)
            candidates = len(tree) - 1
            if candidates and self.cache.reserve(
                sequence.stream, len(sequence.tokens) + candidates
            ):
                trees[i] = tree
        return load, trees, self.clock.now() - began

    def _misdrafted(self, grant: Grant, tree: TokenTree, budget: int) -> str | None:
        """Why a proposed tree cannot be verified, or None."""
        sequence, vocab = grant.sequence, self.model.config.vocab_size
        if len(tree) - 1 > budget:
            return f"{len(tree) - 1} candidates for a budget of {budget}"
        if tree.token[0] != sequence.tokens[-1]:
            return f"root {tree.token[0]} instead of the pending token {sequence.tokens[-1]}"
        if min(tree.token) < 0 or max(tree.token) >= vocab:
            return f"a candidate outside 0..{vocab - 1}"
        if not grant.reaches_end:
            return f"it left {sequence.stream.behind} tokens to compute instead of {grant.rows}"
        return None

    def _build(self, plan: Plan, trees: dict[int, TokenTree]) -> tuple[Batch, list[Begun]]:
        segments, begun, row = [], [], 0
        for i, grant in enumerate(plan.grants):
            sequence, stream = grant.sequence, grant.sequence.stream
            start = stream.computed
            if sequence.request.prompt_logprobs is not None:
                wanted = "all"
            elif not grant.reaches_end:
                wanted = "none"
            else:
                # a prefix hit leaves at least the last token, so its row is always computed
                wanted = "embedding" if sequence.request.embed else "last"
            tokens, tree = sequence.tokens[start : start + grant.rows], trees.get(i)
            if tree is not None and tree.hidden is not None:
                begun.append(Begun(row + grant.rows - 1, tree.layers, tree.hidden))
            segments.append(Segment(stream.table_row, start, tokens, tree, wanted))
            row += segments[-1].num_rows
        return Batch.build(segments, self.cache.tables), begun

    def _chunks(self, plan: Plan, batch: Batch, output: Output) -> list[Computed]:
        """Known tokens in front of the roots, for drafters that read hidden states."""
        found = []
        for i, grant in enumerate(plan.grants if output.hidden else ()):
            rows, first = grant.rows - grant.reaches_end, int(batch.segment_rows[i])
            if rows and not grant.sequence.request.embed:
                hidden = {
                    layer: states[first : first + rows] for layer, states in output.hidden.items()
                }
                found.append(Computed(grant.sequence, grant.sequence.stream.computed, hidden))
        return found

    def _verify_and_commit(
        self, plan: Plan, trees: dict[int, TokenTree], batch: Batch, output: Output
    ) -> tuple[list[Delta], list[Outcome]]:
        lse = output.lse.numpy()
        finite = bool(np.isfinite(lse).all())
        rows = Rows(output.logits.numpy(), output.best.tolist(), lse, finite)
        ends_at = batch.segment_wanted.tolist()
        last_rows = batch.segment_rows.tolist()
        embeddings = iter(output.embeddings.tolist())
        moves = Moves([], [], [])
        extended: list[tuple[Delta, int, int]] = []  # with positions computed, row of the root
        outcomes: list[Outcome] = []
        for i, grant in enumerate(plan.grants):
            sequence = grant.sequence
            stream = sequence.stream
            if sequence.request.prompt_logprobs is not None:
                rows.score_prompt(sequence, stream.computed, grant.rows, ends_at[i])
            if not grant.reaches_end:
                self.cache.commit(stream, stream.computed + grant.rows)
                continue
            tree = trees.get(i)
            nodes = 1 if tree is None else len(tree)
            root_row = ends_at[i + 1] - nodes
            known = len(sequence.tokens)
            path, delta = self._extend(sequence, tree, root_row, rows)
            if sequence.request.embed:
                delta.embedding = next(embeddings)
            extended.append((delta, known + len(path) - 1, root_row))
            if self._drafts and delta.tokens and sequence.finish_reason != "error":
                last = last_rows[i + 1]
                outcomes.append(
                    Outcome(
                        sequence=sequence,
                        start=known - 1,
                        tree=tree or TokenTree.root(sequence.tokens[known - 1]),
                        path=path,
                        tokens=delta.tokens,
                        logits=rows.logits[root_row : root_row + nodes],
                        hidden={
                            layer: hidden[last - nodes : last]
                            for layer, hidden in output.hidden.items()
                        },
                    )
                )
            for to, node in enumerate(path):
                if node != to:
                    moves.table_row.append(stream.table_row)
                    moves.src.append(known - 1 + node)
                    moves.dst.append(known - 1 + to)
        if moves.src:
            self.executor.move(batch, moves)
        deltas: list[Delta] = []
        for delta, computed, root_row in extended:
            sequence = delta.sequence
            deltas.append(delta)
            self.cache.commit(sequence.stream, computed)
            if sequence.request.dormant:
                deltas.extend(self._wake(sequence, root_row, rows))
        now = self.clock.now()
        for delta in deltas:
            delta.sequence.figures.token_times.extend([now] * len(delta.tokens))
        return deltas, outcomes

    def _extend(
        self, sequence: Sequence, tree: TokenTree | None, root_row: int, rows: Rows
    ) -> tuple[list[int], Delta]:
        """Choose what follows a sequence. Returns the accepted nodes and what became output."""
        walk = SequenceWalk(sequence, root_row, rows)
        delta = walk.delta
        if len(sequence.tokens) >= sequence.request.limit:  # nothing was to be generated
            sequence.finish_reason = "length"
            return [0], delta
        try:
            path: list[int] = self.stack["verify"].verify(tree or _PLAIN, walk)
            self._check_path(sequence, tree or _PLAIN, path, delta.tokens)
        except (NoTokenLeft, ConstraintError) as error:
            sequence.finish_reason, sequence.error = "error", str(error)
            return [0], delta
        except Exception as error:  # one sequence's trouble stays its own
            logger.exception("request %s failed while a token was chosen", sequence.request.id)
            sequence.finish_reason = "error"
            sequence.error = f"{type(error).__name__}: {error}"
            return [0], delta
        for statistics in (sequence.figures.speculation, self.stats.speculation):
            if tree is None:
                statistics.plain(len(delta.tokens))
            else:
                statistics.count(tree, path, len(delta.tokens))
        return path, delta

    def _check_path(
        self, sequence: Sequence, tree: TokenTree, path: list[int], tokens: list[int]
    ) -> None:
        """Raise unless ``tokens`` are those of an accepted path and, where these did not end the
        sequence, one more: else what is committed would not be what became output."""
        accepted = len(path) - 1
        own = len(tokens) - accepted
        if (
            path[:1] != [0]
            or any(tree.parent[node] != before for before, node in pairwise(path))
            or any(tree.token[node] != token for node, token in zip(path[1:], tokens, strict=False))
            or not (own == 1 or (own == 0 and accepted and sequence.finish_reason is not None))
        ):
            why = f"accepted nodes {path} of {len(tree)}, but emitted {len(tokens)} tokens {tokens}"
            raise ContractBroken(f"verify={self.stack['verify'].card.name}", [(sequence, why)])

    def _check_pending(self, plan: Plan, deltas: list[Delta]) -> None:
        """End what could never run again: a running sequence without a token to compute."""
        for grant in plan.grants:
            sequence = grant.sequence
            if sequence.finish_reason is None and sequence.stream.behind < 1:
                logger.error("request %s has no token left to compute", sequence.request.id)
                sequence.finish_reason = "error"
                sequence.error = (
                    f"internal error: {sequence.stream.computed} positions are computed of "
                    f"{len(sequence.tokens)} tokens, so that none can follow"
                )
                if all(delta.sequence is not sequence for delta in deltas):
                    deltas.append(Delta(sequence, []))

    def _unblock(self) -> list[Delta]:
        """No sequence may run, though no page is lost and none was taken back just now: the next
        plan would be this one again, for ever. End those that are in the way."""
        stuck = self.running or self.waiting[:1]
        if not stuck:
            return []
        error = RuntimeError(
            f"internal error: schedule={self.stack['schedule'].card.name} lets nothing run, with "
            f"{len(self.running)} sequences running, {len(self.waiting)} waiting, and "
            f"{self.cache.usage:.0%} of the pages held"
        )
        logger.error("%s", error)
        return self._fail(list(stuck), error)

    def _wake(self, parent: Sequence, root_row: int, rows: Rows) -> list[Delta]:
        """Start the other sequences of a request whose prompt has just been computed."""
        deltas = []
        for twin in parent.request.dormant:
            twin.figures.scheduled = parent.figures.scheduled
            twin.figures.cached_tokens = parent.figures.cached_tokens
            _, delta = self._extend(twin, None, root_row, rows)
            deltas.append(delta)
            if twin.finish_reason is None:
                shares = self.cache.fork(parent.stream, twin.stream)
                # without a free table row it queues, and finds the prompt in the prefix index
                insort(self.running if shares else self.waiting, twin, key=_rank)
        parent.request.dormant = []
        return deltas

    def _fail(self, sequences: Seq[Sequence], error: Exception) -> list[Delta]:
        deltas = []
        for sequence in sequences:
            sequence.finish_reason = "error"
            sequence.error = f"{type(error).__name__}: {error}"
            deltas.append(Delta(sequence, []))
            for twin in sequence.request.dormant:
                twin.finish_reason, twin.error = "error", sequence.error
                deltas.append(Delta(twin, []))
            sequence.request.dormant = []
        for delta in deltas:
            self._retire(delta.sequence)
        return deltas

    def _retire(self, sequence: Sequence) -> None:
        """Give back what a finished sequence holds."""
        self.cache.release(sequence.stream)
        if not _take_out(self.running, sequence):
            _take_out(self.waiting, sequence)  # or a twin that never ran: it is in neither
        self.drafting.close(sequence)
        self.control.close(sequence)
        sequence.draft_state = None
        self.stats.finished += 1
        if sequence.request.finished:
            self.requests.pop(sequence.request.id, None)

    # ---- upkeep -----------------------------------------------------------------------------

    def _time_step(self, rows: int, context: int) -> float:
        """Seconds of a pass over a chain of ``rows`` rows behind ``context`` positions, on pages
        that nobody holds. See ``ControlContext.time_step``."""
        stream = Stream([0] * (context + 1))
        fits = rows <= self.config.max_batch_tokens and context + rows <= self.max_length
        if not fits or not self.cache.attach(stream):
            raise ValueError(f"a pass of {rows} rows does not fit this engine")
        try:
            if not self.cache.reserve(stream, context + rows):
                raise ValueError(f"a pass of {rows} rows does not fit this engine")
            tree = TokenTree.chain([0] * rows)
            batch = Batch.build([Segment(stream.table_row, context, [0], tree)], self.cache.tables)
            return self.executor.submit(batch).result().seconds
        finally:
            self.cache.release(stream)

    def _heal(self) -> int:
        """Give back pages that nobody who runs owns: counted and logged, never fatal."""
        return self.cache.heal([s.stream for s in self.running]) if self.cache.usage else 0

    def check_ledger(self) -> None:
        """Raise ``AssertionError`` unless every page has exactly the owners it counts, and every
        owner is a running sequence."""
        owners = {id(s.stream) for s in self.running}
        if strays := [s for s in self.cache.streams if id(s) not in owners]:
            raise AssertionError(f"{len(strays)} streams hold pages but do not run")
        if self.cache.stats.leaked_pages:
            raise AssertionError(f"{self.cache.stats.leaked_pages} pages leaked and were healed")
        for group, report in enumerate(self.cache.audit()):
            if report:
                raise AssertionError(f"page ledger of layer group {group}: {report}")


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank


def _take_out(line: list[Sequence], sequence: Sequence) -> bool:
    """Remove a sequence from a line in order of rank; False if it is not in it. Thousands may
    wait, so the place is searched by bisection."""
    place = bisect_left(line, sequence.rank, key=_rank)
    if place == len(line) or line[place] is not sequence:
        return False
    del line[place]
    return True
