"""Drafts where they pay, by measurement: per sequence, per step, per drafter."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from hasten.methods import Card, method
from hasten.speculation.acceptance import RUNGS, Curve, Trial, worth
from hasten.speculation.base import (
    ControlContext,
    Draftable,
    DraftProgress,
    Load,
    StepReport,
)
from hasten.speculation.drafters.any import Portfolio
from hasten.speculation.latency import LinearTimes, PassTimes

OWN, SHARED = 0.96, 0.98
"""What a sequence's and a tenant's curves keep with each proposal."""
HEATS = 3
"""How the last proposal went: not at all, partly, to its end. Acceptance comes in runs."""
TRIAL_CANDIDATES, PROBE_CANDIDATES = 4, 2
YOUNG = 3
"""Proposals of its own below which a sequence is probed: others' texts are no proof."""
PATIENCE = 8
"""Steps between two trials of a drafter that fails, or two probes of one that cannot be tried."""
MARGIN = 0.01
"""Gain in tokens a second below which drafting is not worth its risk."""
SWITCH = 1.2
"""How much more another drafter must be worth than the present one."""
WORTHLESS = 0.03
"""Tokens a row below which a candidate is not even weighed."""
TENANTS = 1024
"""Tenants whose curves are kept (about 3 KiB each and drafter); the one longest unused goes."""
PLANNING = 0.01
"""Share of the time that weighing budgets may take; between two times, they stay as they are."""
SAVED = 100
"""Steps whose shares may be saved up."""
REFRESH = 32
"""Steps between two looks at what passes cost."""
LEARN_EVERY, LEARN_OFTEN = 16, 4
"""Steps between two that the step times learn from, without candidates and with them."""


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
        news: drafters whose curves or heat changed since they were weighed.
        values: what each drafter is worth at today's prices, in tokens a step.
        steps: of each drafter, what growing budgets bring: (tokens a row, rows, tokens, budget).
        trial: a proposal that waits for its text.
        tries: proposals of each drafter that were counted.
        young: whether any drafter has few of them.
        pause: steps to wait after a trial that failed, and ``rest`` what is left of them.
        idle: steps without a proposal.
    """

    sequence: Draftable
    curves: list[list[Curve]]
    shared: list[list[Curve]]
    heat: list[int]
    values: list[float]
    steps: list[list[Step]]
    news: set[int]
    tries: list[int]
    arm: int = 0
    budget: int = 0
    young: bool = True
    trial: Trial | None = None
    pause: int = 0
    rest: int = 0
    idle: int = 0


Step = tuple[float, float, float, int, "Follower"]


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
        self.drafts = [LinearTimes(3) for _ in cards]  # of a round, its depth, its sequences
        self.depth_share = [1.0] * len(cards)  # depth of a tree, against its candidates
        self.followers: dict[int, Follower] = {}
        self.tenants: dict[str, list[list[Curve]]] = {}
        self.purse = 0.0
        """Seconds that may be spent on looking."""
        self._thought = 0.0
        """Seconds that planning and learning took since drafts were last learned from."""
        self._spare = 0.0
        """Seconds that planning may take, negative after it took them."""
        self.steps = 0
        self._load: tuple[int, int] = (0, 0)
        self._costs: dict[int, float] = {}  # seconds of a step by rows, at the load
        self._prices: list[tuple[float, float, float]] = []  # of the drafters
        self._asked: list[Follower] = []
        self._drafting = 0  # candidates that were asked for in this step
        self._probing: Follower | None = None  # it drafts in this step for a trial's sake
        self._probed = 0.0  # what that costs the target
        self._rate = 0.0  # tokens a second that the last plan expected

    # ---- planning ---------------------------------------------------------------------------

    def plan(self, sequences: Sequence[Draftable], load: Load) -> list[int]:
        followers = self.followers
        asked: list[Follower] = []
        news = False
        for sequence in sequences:
            follower = followers.get(id(sequence))
            if follower is None:
                follower = followers[id(sequence)] = self._follow(sequence)
            if follower.news:
                news = True
            asked.append(follower)
        self._asked = asked
        if (load.decoding, load.rows_taken) != self._load:
            self._load, news = (load.decoding, load.rows_taken), True
            self._costs.clear()
        elif not self.steps % REFRESH:
            self._costs.clear()
        if news and self._spare >= 0:
            began = self.clock()
            self._choose(load)
            self._thought = self.clock() - began
            self._spare -= self._thought
        budgets = [follower.budget for follower in asked]
        if sum(budgets) > load.rows_left:  # chosen when there was more room
            budgets = [min(b, load.rows_left // len(budgets)) for b in budgets]
            for follower, budget in zip(asked, budgets, strict=True):
                follower.budget = budget
        if self.purse > 0:
            place = self.steps % len(asked)
            follower = asked[place]
            if not follower.budget and (follower.young or follower.idle >= PATIENCE):
                self._probe(load, budgets, place)
        self._drafting = sum(budgets)
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
        return Follower(
            sequence,
            curves,
            shared,
            [0 for _ in arms],
            [0.0 for _ in arms],
            [[] for _ in arms],
            set(arms),
            [0 for _ in arms],
        )

    def _choose(self, load: Load) -> None:
        """Raise budgets in the order of their worth a row, and keep the best point on the way."""
        if not self.passes.known:  # no look was possible: the first steps run plain
            return
        taken = load.rows_taken
        plain = self._seconds(load, taken)
        steps: list[Step] = []
        for follower in self._asked:
            if follower.news:
                self._weigh(follower, load, plain)
            follower.budget = 0
            steps += follower.steps[follower.arm]
        if len(self._asked) > 1:
            steps.sort(key=_density, reverse=True)
        tokens, more, drafting = float(load.decoding), 0.0, 0.0
        rate = best = tokens / plain * (1 + MARGIN)
        best_at = -1
        deepest = [0.0] * len(self.drafts)
        left = load.rows_left
        held: dict[int, int] = {}
        for at, (_, rows, gain, budget, follower) in enumerate(steps):
            had = held.get(id(follower), 0)
            left -= budget - had
            if left < 0:
                break
            held[id(follower)] = budget
            tokens += gain
            more += rows
            arm = follower.arm
            price, depth = self._prices[arm], budget * self.depth_share[arm]
            if depth > deepest[arm]:
                drafting += price[1] * (depth - deepest[arm])
                if not deepest[arm]:
                    drafting += price[0]
                deepest[arm] = depth
            if not had:
                drafting += price[2]
            rate = tokens / (self._seconds(load, taken + more) + drafting)
            if rate > best:
                best, best_at = rate, at
        for _, _, _, budget, follower in steps[: best_at + 1]:
            follower.budget = budget
        self._rate = best

    def _weigh(self, follower: Follower, load: Load, plain: float) -> None:
        """What a sequence's drafters are worth, and the one that is best at today's prices."""
        rate = max(self._rate, load.decoding / plain)
        most, taken = self.method.most, load.rows_taken
        for arm in follower.news:
            heat = follower.heat[arm]
            found = worth(follower.curves[arm][heat], follower.shared[arm][heat], most)
            follower.steps[arm] = [
                (gain / rows, rows, gain, budget, follower)
                for rows, gain, budget in found
                if gain > WORTHLESS * rows
            ]
            if len(self.drafts) == 1:
                break
            tokens, more, value = 0.0, 0.0, 0.0
            price = self._prices[arm]
            for _, rows, gain, budget, _ in follower.steps[arm]:
                tokens, more = tokens + gain, more + rows
                cost = self._seconds(load, taken + more) - plain + price[2]
                # a round is shared by the sequences that draft in it
                cost += (price[0] + price[1] * budget * self.depth_share[arm]) / load.decoding
                value = max(value, tokens - rate * cost)
            follower.values[arm] = value
        follower.news.clear()
        if len(self.drafts) > 1:
            values = follower.values
            best = max(values)
            if best > SWITCH * values[follower.arm]:
                self._assign(follower, values.index(best))

    def _assign(self, follower: Follower, arm: int) -> None:
        follower.arm = arm
        drafting = self.context.drafting()
        if isinstance(drafting, Portfolio):
            drafting.assign(follower.sequence, arm)

    def _seconds(self, load: Load, rows: float) -> float:
        """Of a step without its drafting."""
        whole = int(rows)
        if rows == whole:
            return self._cost(load, whole)
        below = self._cost(load, whole)
        return below + (self._cost(load, whole + 1) - below) * (rows - whole)

    def _cost(self, load: Load, rows: int) -> float:
        cost = self._costs.get(rows)
        if cost is None:
            if not self._costs:
                self._prices = [
                    tuple(max(0.0, p) for p in times.price)  # type: ignore[misc]
                    for times in self.drafts
                ]
            reads = load.context / max(load.decoding, 1)  # of a row
            terms = (1, load.decoding, rows - load.rows_taken)
            cost = self.passes.seconds(rows, rows * reads) + self.around.seconds(terms)
            cost = self._costs[rows] = max(cost, 1e-9)
        return cost

    def _probe(self, load: Load, budgets: list[int], place: int) -> None:
        """Draft for a sequence that does not, if what that costs is in the purse.

        A young sequence, whatever other texts say of its drafter, and drafters that trials cannot
        watch without harm.
        """
        follower = self._asked[place]
        budget = min(PROBE_CANDIDATES, load.rows_left - sum(budgets), self.method.most)
        if budget < 1 or not self.passes.known:
            return
        tries = follower.tries
        arms = [
            arm
            for arm, trial in enumerate(self.by_trial)
            if tries[arm] < YOUNG or (not trial and follower.idle >= PATIENCE)
        ]
        if not arms:
            return
        arm = min(arms, key=tries.__getitem__)
        taken = load.rows_taken + sum(budgets)
        cost = self._seconds(load, taken + budget) - self._seconds(load, taken)
        price = self._prices[arm]
        drafting = price[0] + price[1] * budget * self.depth_share[arm] + price[2]
        if cost + drafting <= self.purse:
            self.purse -= cost + drafting
            self._probing, self._probed = follower, cost
            if follower.arm != arm:
                self._assign(follower, arm)
            budgets[place] = budget
            follower.news.add(arm)

    def should_stop(self, progress: DraftProgress) -> bool:
        return False

    # ---- learning ---------------------------------------------------------------------------

    def observe(self, report: StepReport) -> None:
        began = self.clock() if self._drafting else 0.0
        self._learn(report)
        if self._drafting:  # what it takes to follow drafts is part of their price
            self._thought += self.clock() - began
        else:
            self._thought = 0.0

    def _learn(self, report: StepReport) -> None:
        self.steps += 1
        seconds = report.step_seconds
        share = self.method.explore * seconds
        self.purse = min(self.purse + share, max(self.purse, SAVED * share))
        share = PLANNING * seconds
        self._spare = min(self._spare + share, max(self._spare, SAVED * share))
        if self._drafting:
            self._learn_drafts(report)
        often = LEARN_OFTEN if report.candidates else LEARN_EVERY
        if not self.steps % often or self.around.seen < REFRESH:
            self._learn_times(report)
        followers = self.followers
        for outcome in report.outcomes:
            follower = followers.get(id(outcome.sequence))
            if follower is not None:
                follower.idle += 1
                trial = follower.trial
                if trial is None:
                    follower.rest -= follower.rest > 0
                elif trial.advance(outcome.sequence.tokens):
                    follower.trial = None
                    self._pause(follower, len(trial.accepted) > 0)
                    self._count(
                        follower,
                        trial.arm,
                        trial.heat,
                        trial.budget,
                        len(trial.tree) - 1,
                        trial.accepted,
                    )
        if self.purse > 0 and report.outcomes:
            outcome = report.outcomes[self.steps % len(report.outcomes)]
            follower = followers.get(id(outcome.sequence))
            if follower is not None and follower.trial is None and not follower.rest:
                self._try(follower, self.steps // len(report.outcomes))

    def _learn_times(self, report: StepReport) -> None:
        load = report.load
        reads = load.context / max(load.decoding, 1) * report.rows
        self.passes.observe(report.rows, reads, report.forward_seconds)
        if load.rows_taken == load.decoding:  # prompt chunks have costs of their own
            rest = report.step_seconds - report.forward_seconds - report.draft_seconds
            self.around.observe((1, load.decoding, report.candidates), rest)

    def _learn_drafts(self, report: StepReport) -> None:
        """Count proposals, and what drafting took."""
        arms = len(self.drafts)
        asked, deepest = [0] * arms, [0] * arms
        for outcome in report.outcomes:
            follower = self.followers.get(id(outcome.sequence))
            if follower is None:
                continue
            arm, tree = follower.arm, outcome.tree
            count = len(tree) - 1
            budget = follower.budget
            if follower is self._probing:
                budget = PROBE_CANDIDATES
            elif not budget:
                continue
            asked[arm] += 1
            if count:
                depth = tree.depth[-1]
                deepest[arm] = max(deepest[arm], depth)
                self.depth_share[arm] += 0.05 * (depth / count - self.depth_share[arm])
            self._count(
                follower, arm, follower.heat[arm], max(budget, count), count, outcome.path[1:]
            )
            follower.idle = 0
        if self._probing is not None:
            if not report.candidates:
                self.purse += self._probed  # nothing was verified
            self._probing = None
        drafting = self.context.drafting()
        for arm, times in enumerate(self.drafts):
            if asked[arm] and (times.seen < REFRESH or not self.steps % LEARN_OFTEN):
                seconds = report.draft_seconds
                if isinstance(drafting, Portfolio):
                    seconds = drafting.seconds[arm]
                times.observe((1, deepest[arm], asked[arm]), seconds + self._thought)
        self._thought = 0.0

    def _count(
        self,
        follower: Follower,
        arm: int,
        heat: int,
        budget: int,
        candidates: int,
        accepted: list[int],
    ) -> None:
        follower.curves[arm][heat].observe(budget, candidates, accepted)
        follower.shared[arm][heat].observe(budget, candidates, accepted)
        if candidates:
            heat = 0 if not accepted else 2 if accepted[-1] == candidates else 1
            follower.heat[arm] = heat
        follower.tries[arm] += 1
        if follower.young and min(follower.tries) >= YOUNG:
            follower.young = False
        if follower.budget or accepted:  # who sleeps is not woken by failure
            follower.news.add(arm)

    def _try(self, follower: Follower, turn: int) -> None:
        """Begin a trial of a drafter that a sequence does not use now, and pay for it."""
        used = follower.arm if follower.budget else None
        arms = [arm for arm, trial in enumerate(self.by_trial) if trial and arm != used]
        if not arms:
            return
        arm, sequence = arms[turn % len(arms)], follower.sequence
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
            self._pause(follower, False)
        self.purse -= self.clock() - began

    def _pause(self, follower: Follower, success: bool) -> None:
        follower.pause = 0 if success else min(2 * follower.pause + 1, PATIENCE)
        follower.rest = follower.pause

    def close(self, sequence: Draftable) -> None:
        self.followers.pop(id(sequence), None)


def _density(step: tuple[float, float, float, int, Follower]) -> float:
    return step[0]
