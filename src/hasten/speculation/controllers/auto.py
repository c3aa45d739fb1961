"""Drafts where they pay, by measurement: per sequence, per step, per drafter."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from hasten.methods import Card, method
from hasten.speculation.acceptance import RUNGS, Curve, Trial, Worth, worth
from hasten.speculation.base import (
    ControlContext,
    Draftable,
    DraftProgress,
    Load,
    Outcome,
    StepReport,
)
from hasten.speculation.drafters.any import Portfolio
from hasten.speculation.latency import LinearTimes, PassTimes

OWN, SHARED = 0.93, 0.99
"""What a sequence's and a tenant's curves keep with each proposal."""
HEATS = 3
"""How the last proposal went: not at all, partly, to its end. Acceptance comes in runs."""
TRIAL_CANDIDATES = 4
MARGIN = 0.01
"""Gain in tokens a second below which drafting is not worth its risk."""
TENANTS = 1024
"""Tenants whose curves are kept (about 4 KiB each and drafter); the one longest unused goes."""
PLANNING = 0.01
"""Share of the time that weighing budgets may take; between two times, they stay as they are."""
LEARN_EVERY = 16
"""Steps without candidates between two that the step times learn from."""


@method("auto", slot="control", exact="bitwise", does=("sets-budgets",))
@dataclass(frozen=True)
class Auto:
    """Gives each sequence the drafter and the budget that make the step yield most tokens a second.

    What a candidate is worth is learned per sequence, leaning on the tenant's other texts; what it
    costs is learned from the time of the steps, drafting and planning included. Where drafts do
    not pay, it stops drafting, and goes on watching with trials: proposals that are held against
    the text as it comes, unverified. Trials and probes take at most ``explore`` of the time.
    """

    most: int = 16
    explore: float = 0.015

    def __post_init__(self) -> None:
        if not 1 <= self.most <= RUNGS[-1]:
            raise ValueError(f"most={self.most}: need 1 to {RUNGS[-1]} candidates")
        if not 0 <= self.explore < 1:
            raise ValueError(f"explore={self.explore}: a share of the time, at least 0, below 1")

    def start(self, context: ControlContext) -> AutoControl:
        return AutoControl(self, context)


@dataclass(slots=True)
class Follower:
    """What is known of one sequence.

    Attributes:
        sequence: itself, as its drafts' state is assigned through it.
        curves: by drafter, then heat; ``shared`` are the tenant's.
        arm: the drafter that it has now, with ``budget`` candidates.
        stale: whether curves or heat changed since the budget was chosen.
        trial: a proposal that waits for its text.
        idle: steps without a proposal.
    """

    sequence: Draftable
    curves: list[list[Curve]]
    shared: list[list[Curve]]
    heat: list[int]
    arm: int = 0
    budget: int = 0
    stale: bool = True
    trial: Trial | None = None
    idle: int = 0
    worths: dict[int, Worth] = field(default_factory=dict)


class AutoControl:
    """`Controlling` by expected tokens a second."""

    def __init__(self, method: Auto, context: ControlContext) -> None:
        self.method = method
        self.context = context
        self.clock = time.perf_counter
        of = getattr(context.draft, "of", None)
        cards: list[Card] = [part.card for part in of or (context.draft,)]
        self.by_trial = ["drafts-from-text" in card.does for card in cards]
        self.passes = PassTimes(context.max_batch_tokens)
        if context.time_step is not None:
            self.passes.look(context.time_step)
        self.around = LinearTimes(3)  # of a step, its sequences, its candidates
        self.drafts = [LinearTimes(3) for _ in cards]  # of a round, its depth, its candidates
        self.depth_share = [1.0] * len(cards)  # depth of a tree, against its candidates
        self.followers: dict[int, Follower] = {}
        self.tenants: dict[str, list[list[Curve]]] = {}
        self.purse = 0.0
        """Seconds that may be spent on looking."""
        self._spare = 0.0
        """Seconds that planning may take, negative after it took them."""
        self.steps = 0
        self._load: tuple[int, int, int] = (0, 0, 0)
        self._asked: list[Follower] = []
        self._awake = False
        self._rate = 0.0  # tokens a second that the last plan expected

    # ---- planning ---------------------------------------------------------------------------

    def plan(self, sequences: Sequence[Draftable], load: Load) -> list[int]:
        followers = self.followers
        asked: list[Follower] = []
        stale = False
        for sequence in sequences:
            follower = followers.get(id(sequence))
            if follower is None:
                follower = followers[id(sequence)] = self._follow(sequence)
            stale = stale or follower.stale
            asked.append(follower)
        self._asked = asked
        now = (load.decoding, load.rows_taken, load.rows_left)
        if (stale or now != self._load) and self._spare >= 0:
            began = self.clock()
            self._load = now
            self._choose(load)
            self._spare -= self.clock() - began
        budgets = [follower.budget for follower in asked]
        if sum(budgets) > load.rows_left:  # chosen when there was more room
            budgets = [min(b, load.rows_left // len(budgets)) for b in budgets]
            for follower, budget in zip(asked, budgets, strict=True):
                follower.budget, follower.stale = budget, True
        if self.purse > 0 and not any(budgets):
            self._probe(load, budgets)
        self._awake = any(budgets)
        return budgets

    def _follow(self, sequence: Draftable) -> Follower:
        arms = range(len(self.drafts))
        shared = self.tenants.pop(sequence.tenant, None)
        if shared is None:
            shared = [[Curve(SHARED) for _ in range(HEATS)] for _ in arms]
            if len(self.tenants) >= TENANTS:
                del self.tenants[next(iter(self.tenants))]
        self.tenants[sequence.tenant] = shared  # now the latest
        curves = [[Curve(OWN) for _ in range(HEATS)] for _ in arms]
        return Follower(sequence, curves, shared, [0 for _ in arms])

    def _choose(self, load: Load) -> None:
        """Raise budgets in the order of their worth a row, and keep the best point on the way."""
        reads = load.context / max(load.decoding, 1)
        steps: list[tuple[float, float, float, int, Follower]] = []
        for follower in self._asked:
            if follower.stale or not follower.worths:
                self._weigh(follower, load, reads)
                follower.stale = False
            follower.budget = 0
            for rows, gain, budget in follower.worths[follower.arm]:
                steps.append((gain / rows, rows, gain, budget, follower))
        steps.sort(key=_density, reverse=True)
        tokens, rows = float(load.decoding), float(load.rows_taken)
        plain = tokens / max(self._seconds(load, rows, reads), 1e-9)
        best, best_at = plain * (1 + MARGIN), -1
        if not self.passes.known:  # no look was possible: the first steps run plain
            steps = []
        deepest = [0.0] * len(self.drafts)
        left = load.rows_left
        drafting = 0.0
        held: dict[int, int] = {}
        for at, (_, more, gain, budget, follower) in enumerate(steps):
            left -= budget - held.get(id(follower), 0)
            if left < 0:
                break
            held[id(follower)] = budget
            tokens += gain
            rows += more
            arm = follower.arm
            depth = budget * self.depth_share[arm]
            if depth > deepest[arm]:
                price = self.drafts[arm].price
                drafting += max(0.0, price[1]) * (depth - deepest[arm])
                drafting += 0.0 if deepest[arm] else max(0.0, price[0])
                deepest[arm] = depth
            drafting += max(0.0, self.drafts[arm].price[2]) * more
            rate = tokens / (self._seconds(load, rows, reads) + drafting)
            if rate > best:
                best, best_at = rate, at
        for _, _, _, budget, follower in steps[: best_at + 1]:
            follower.budget = budget
        self._rate = best

    def _weigh(self, follower: Follower, load: Load, reads: float) -> None:
        """The worth of all drafters for a sequence, and the one that is best at today's prices."""
        taken = load.rows_taken
        plain = self._seconds(load, taken, reads)
        rate = max(self._rate, load.decoding / max(plain, 1e-9))
        chosen, best = 0, -1.0
        for arm, curves in enumerate(follower.curves):
            heat = follower.heat[arm]
            found = worth(curves[heat], follower.shared[arm][heat], self.method.most)
            follower.worths[arm] = found
            if len(self.drafts) == 1:
                return
            tokens, rows, value = 0.0, 0.0, 0.0
            price = [max(0.0, p) for p in self.drafts[arm].price]
            for more, gain, budget in found:
                tokens, rows = tokens + gain, rows + more
                cost = self._seconds(load, taken + rows, reads) - plain + price[2] * rows
                # a round is shared by the sequences that draft in it
                cost += (price[0] + price[1] * budget * self.depth_share[arm]) / load.decoding
                value = max(value, tokens - rate * cost)
            if value > best:
                chosen, best = arm, value
        if chosen != follower.arm:
            follower.arm = chosen
        self._assign(follower)

    def _assign(self, follower: Follower) -> None:
        drafting = self.context.drafting()
        if isinstance(drafting, Portfolio):
            drafting.assign(follower.sequence, follower.arm)

    def _seconds(self, load: Load, rows: float, reads: float) -> float:
        """Of a step without its drafting; ``reads`` is the context of a row."""
        around = self.around.price
        return (
            self.passes.seconds(rows, rows * reads)
            + max(0.0, around[0])
            + max(0.0, around[1]) * load.decoding
            + max(0.0, around[2]) * (rows - load.rows_taken)
        )

    def _probe(self, load: Load, budgets: list[int]) -> None:
        """Draft for the sequence that was longest without, if what that costs is in the purse.

        Only where trials cannot tell: drafters that they do no harm to are watched by them.
        """
        place = max(range(len(self._asked)), key=lambda i: self._asked[i].idle)
        follower = self._asked[place]
        budget = min(2, load.rows_left, self.method.most)
        arms = [arm for arm, trial in enumerate(self.by_trial) if not trial]
        if not arms or not budget or follower.idle < 8:
            return
        arm = min(arms, key=lambda a: follower.curves[a][follower.heat[a]].asked)
        reads = load.context / max(load.decoding, 1)
        price = self.drafts[arm]
        cost = self._seconds(load, load.rows_taken + budget, reads)
        cost += price.seconds((1, budget, budget)) - self._seconds(load, load.rows_taken, reads)
        if cost <= self.purse:
            self.purse -= cost
            follower.arm = arm
            self._assign(follower)
            budgets[place] = budget
            follower.stale = True

    def should_stop(self, progress: DraftProgress) -> bool:
        return False

    # ---- learning ---------------------------------------------------------------------------

    def observe(self, report: StepReport) -> None:
        self.steps += 1
        share = self.method.explore * report.step_seconds
        self.purse = min(self.purse + share, 100 * share)
        self._spare = min(self._spare + PLANNING * report.step_seconds, 0.0)
        if self._awake:
            self._learn_drafts(report)
        if self._awake or self.steps % LEARN_EVERY == 0 or not self.passes.known:
            self._learn_times(report)
        followers = self.followers
        for outcome in report.outcomes:
            follower = followers.get(id(outcome.sequence))
            if follower is None:
                continue
            follower.idle += not follower.budget
            if follower.trial is not None:
                self._judge(outcome.sequence, follower, follower.trial)
        if self.purse > 0 and report.outcomes:
            self._try(report.outcomes)

    def _learn_times(self, report: StepReport) -> None:
        load = report.load
        reads = load.context / max(load.decoding, 1) * report.rows
        self.passes.observe(report.rows, reads, report.forward_seconds)
        if load.rows_taken == load.decoding:  # prompt chunks have costs of their own
            rest = report.step_seconds - report.forward_seconds - report.draft_seconds
            self.around.observe((1, load.decoding, report.candidates), rest)

    def _learn_drafts(self, report: StepReport) -> None:
        """Count proposals, and what drafting took."""
        drafting = self.context.drafting()
        candidates = [0] * len(self.drafts)
        deepest = [0] * len(self.drafts)
        asked = [False] * len(self.drafts)
        for outcome in report.outcomes:
            follower = self.followers.get(id(outcome.sequence))
            if follower is None:
                continue
            arm, count = follower.arm, len(outcome.tree) - 1
            budget = max(follower.budget, count)
            if not budget:
                continue
            asked[arm] = True
            candidates[arm] += count
            if count:
                deepest[arm] = max(deepest[arm], outcome.tree.depth[-1])
                share = outcome.tree.depth[-1] / count
                self.depth_share[arm] += 0.05 * (share - self.depth_share[arm])
            self._count(follower, arm, follower.heat[arm], budget, count, outcome.path[1:])
            follower.idle = 0
        for arm, times in enumerate(self.drafts):
            if asked[arm]:
                seconds = report.draft_seconds
                if isinstance(drafting, Portfolio):
                    seconds = drafting.seconds[arm]
                times.observe((1, deepest[arm], candidates[arm]), seconds)

    def _count(
        self,
        follower: Follower,
        arm: int,
        heat: int,
        budget: int,
        candidates: int,
        accepted: list[int],
    ) -> None:
        for curve in (follower.curves[arm][heat], follower.shared[arm][heat]):
            curve.observe(budget, candidates, accepted)
        if candidates:
            follower.heat[arm] = (len(accepted) > 0) + (
                len(accepted) > 0 and accepted[-1] == candidates
            )
        follower.stale = True

    def _judge(self, sequence: Draftable, follower: Follower, trial: Trial) -> None:
        if trial.advance(sequence.tokens):
            follower.trial = None
            self._count(
                follower,
                trial.arm,
                trial.heat,
                trial.budget,
                len(trial.tree) - 1,
                trial.accepted,
            )

    def _try(self, outcomes: Sequence[Outcome]) -> None:
        """Begin a trial of a drafter that a sequence does not use now, and pay for it."""
        outcome = outcomes[self.steps % len(outcomes)]
        sequence = outcome.sequence
        follower = self.followers.get(id(sequence))
        if follower is None or follower.trial is not None:
            return
        used = follower.arm if follower.budget else None
        arms = [arm for arm, trial in enumerate(self.by_trial) if trial and arm != used]
        if not arms:
            return
        arm = arms[self.steps // len(outcomes) % len(arms)]
        budget = min(TRIAL_CANDIDATES, self.method.most)
        began = self.clock()
        drafting = self.context.drafting()
        if isinstance(drafting, Portfolio):
            (tree,) = drafting.ask(arm, [sequence], [budget])
        else:
            (tree,) = drafting.propose([sequence], [budget])
        heat = follower.heat[arm]
        if len(tree) > 1:
            follower.trial = Trial(arm, heat, budget, tree, len(sequence.tokens))
        else:
            self._count(follower, arm, heat, budget, 0, [])
        self.purse -= self.clock() - began

    def close(self, sequence: Draftable) -> None:
        self.followers.pop(id(sequence), None)


def _density(step: tuple[float, float, float, int, Follower]) -> float:
    return step[0]
