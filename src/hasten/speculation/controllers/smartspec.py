"""The draft length with the highest goodput: expected tokens a second under the measured load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hasten.methods import method
from hasten.speculation.base import (
    ControlContext,
    Draftable,
    DraftProgress,
    Load,
    Outcome,
    StepReport,
)
from hasten.speculation.latency import LinearTimes, PassTimes


@method(
    "smartspec",
    slot="control",
    paper="Optimizing Speculative Decoding for Serving Large Language Models Using Goodput "
    "(arXiv:2406.14066)",
    exact="bitwise",
    does=("sets-budgets",),
)
@dataclass(frozen=True)
class SmartSpec:
    """One length for all sequences, chosen anew every ``every`` steps.

    With acceptance a, a chain of k candidates is expected to yield (1 - a^(k+1)) / (1 - a) tokens;
    goodput is that, over the batch, by the predicted time of the step. Lengths are tried upwards
    from 0 until goodput drops; length 0 counts ``bonus`` times. Pays in servers, where drafts that
    help a lone request slow down a full batch.

    ``acceptance`` is the first guess and ``weight`` that of each step's share of examined
    candidates that were accepted. At length 0 a step in ``probe`` drafts one candidate, so that a
    change is noticed. ``per_request`` keeps an acceptance for each sequence and gives lengths by
    marginal gain (the paper's text; its code has one length for all).
    """

    most: int = 8
    every: int = 20
    acceptance: float = 0.7
    weight: float = 0.15
    bonus: float = 1.1
    probe: int = 100
    per_request: bool = False

    def __post_init__(self) -> None:
        for name in ("most", "every", "probe"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: need at least 1")
        for name in ("acceptance", "weight"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: need a number between 0 and 1")
        if self.bonus < 1:
            raise ValueError(f"bonus={self.bonus}: below 1 it would favor drafting")

    def start(self, context: ControlContext) -> SmartSpecControl:
        context.check_fits(self.most)
        passes = PassTimes(context.max_batch_tokens)
        if context.time_step is not None:
            passes.look(context.time_step)
        return SmartSpecControl(self, passes, Rate(self.acceptance))


@dataclass(slots=True)
class Rate:
    """Acceptance of a candidate that is examined, and how often there are candidates at all."""

    acceptance: float
    coverage: float = 1.0

    def observe(self, outcomes: Sequence[Outcome], weight: float) -> None:
        """Candidates behind the first rejection were never judged and do not count."""
        accepted = examined = drafted = 0
        for outcome in outcomes:
            if len(outcome.tree) == 1:
                continue
            hits = len(outcome.path) - 1
            # a walk that ended with its last accepted candidate examined nothing behind it
            judged = len(outcome.tokens) > hits and bool(outcome.tree.children(outcome.path[-1]))
            drafted += 1
            accepted += hits
            examined += hits + judged
        if examined:
            self.acceptance += weight * (accepted / examined - self.acceptance)
        self.coverage += weight * (drafted / len(outcomes) - self.coverage)

    def extra(self, k: int) -> float:
        """Tokens that k candidates are expected to add."""
        a = min(self.acceptance, 0.999)
        return self.coverage * a * (1 - a**k) / (1 - a)


@dataclass
class SmartSpecControl:
    """`Controlling` by goodput."""

    method: SmartSpec
    passes: PassTimes
    rate: Rate
    drafts: LinearTimes = field(default_factory=lambda: LinearTimes((1, 1, 1)))
    around: LinearTimes = field(default_factory=lambda: LinearTimes((1, 1, 1)))
    own: dict[int, Rate] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    length: int = 0
    step: int = 0
    drafted: int = 0
    """The step in which candidates were last allowed."""

    def plan(self, sequences: Sequence[Draftable], load: Load) -> list[int]:
        if self.step % self.method.every == 0:
            if self.method.per_request:
                self._lengths(sequences, load)
            else:
                self.length = self._length(load)
        self.step += 1
        share = load.rows_left // max(len(sequences), 1)
        wanted = [self.lengths.get(id(s), self.length) for s in sequences]
        if not any(wanted) and self.step - self.drafted >= self.method.probe:
            wanted = [1] * len(wanted)
        if any(wanted):
            self.drafted = self.step
        return [min(k, share) for k in wanted]

    def _length(self, load: Load) -> int:
        best, goodput = 0, -1.0
        for k in range(min(self.method.most, load.rows_left // max(load.decoding, 1)) + 1):
            tokens = load.decoding * (1 + self.rate.extra(k))
            candidates = load.decoding * self.rate.coverage * k
            found = tokens / max(self._seconds(load, candidates, k), 1e-9)
            found *= self.method.bonus if k == 0 else 1.0
            if found < goodput:
                break
            best, goodput = k, found
        return best

    def _lengths(self, sequences: Sequence[Draftable], load: Load) -> None:
        """The best prefix of single candidates in the order of their expected gain."""
        gains: list[tuple[float, float, int, int]] = []
        for sequence in sequences:
            rate = self.own.get(id(sequence), self.rate)
            for k in range(1, self.method.most + 1):
                gain = rate.extra(k) - rate.extra(k - 1)
                gains.append((gain, rate.coverage, k, id(sequence)))
        gains.sort(key=lambda g: (-g[0], g[2]))
        tokens, candidates, deepest = float(load.decoding), 0.0, 0
        best = tokens / max(self._seconds(load, 0, 0), 1e-9) * self.method.bonus
        kept = 0
        for count, (gain, rows, k, _) in enumerate(gains[: load.rows_left], 1):
            tokens, candidates, deepest = tokens + gain, candidates + rows, max(deepest, k)
            found = tokens / max(self._seconds(load, candidates, deepest), 1e-9)
            if found > best:
                best, kept = found, count
        self.lengths = {id(s): 0 for s in sequences}
        for _, _, k, key in gains[:kept]:
            self.lengths[key] = max(self.lengths[key], k)
        self.length = round(sum(self.lengths.values()) / max(len(self.lengths), 1))  # newcomers'

    def _seconds(self, load: Load, candidates: float, deepest: int) -> float:
        """Of a step: drafting, the pass with its prompt chunks, and what is around them."""
        rows = load.rows_taken + candidates
        reads = rows * load.context / max(load.decoding, 1)
        drafting = self.drafts.seconds((1, deepest, candidates)) if deepest else 0.0
        around = self.around.seconds((1, load.decoding, candidates))
        return self.passes.seconds(rows, reads) + around + drafting

    def should_stop(self, progress: DraftProgress) -> bool:
        return False

    def observe(self, report: StepReport) -> None:
        load = report.load
        reads = report.rows * load.context / max(load.decoding, 1)
        self.passes.observe(report.rows, reads, report.forward_seconds)
        if load.rows_taken == load.decoding:
            rest = report.step_seconds - report.forward_seconds - report.draft_seconds
            self.around.observe((1, load.decoding, report.candidates), rest)
        if self.drafted != self.step or not report.outcomes:
            return
        deepest = max(outcome.tree.depth[-1] for outcome in report.outcomes)
        self.drafts.observe((1, deepest, report.candidates), report.draft_seconds)
        self.rate.observe(report.outcomes, self.method.weight)
        if self.method.per_request:
            for outcome in report.outcomes:
                key = id(outcome.sequence)
                if key not in self.own:
                    self.own[key] = Rate(self.rate.acceptance, self.rate.coverage)
                self.own[key].observe([outcome], self.method.weight)

    def close(self, sequence: Draftable) -> None:
        self.own.pop(id(sequence), None)
        self.lengths.pop(id(sequence), None)
