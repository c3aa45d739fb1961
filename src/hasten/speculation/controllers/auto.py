"""Drafts where they pay, by measurement: per sequence, per step, per drafter."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hasten.methods import Card, method
from hasten.speculation.acceptance import RUNGS, Curve, Trial, Worth, presence, worth
from hasten.speculation.base import (
    GRADES,
    ControlContext,
    Draftable,
    DraftProgress,
    Load,
    StepReport,
)
from hasten.speculation.drafters.any import AnyOf, Portfolio
from hasten.speculation.prices import Prices

OWN, SHARED = 0.96, 0.98
"""What a sequence's and a tenant's curves keep with each proposal."""
HEATS = 3
"""How the last proposal went: not at all, partly, to its end. Acceptance comes in runs. Where a
drafter grades its proposals, the grade says more."""
TRIAL_CANDIDATES, PROBE_CANDIDATES = 4, 2
YOUNG = 3
"""Proposals of its own below which a sequence is probed: others' texts are no proof."""
CROWD = 2
"""Sequences that may draft for each proposal that a drafter has made: what nobody knows yet is
not tried by all at once."""
PATIENCE = 8
"""Steps between two trials of a drafter that fails, or two probes of one that cannot be tried."""
MARGIN = 0.03
"""Gain in tokens a second below which drafting is not worth its risk."""
TEXT = 64.0
"""Tokens of an output before any ended: what a drafter has to read first must pay within it."""
WORTHLESS = 0.03
"""Tokens a row below which a candidate is not even weighed."""
TENANTS = 1024
"""Tenants whose curves are kept (3 to 5 KiB each and drafter); the one longest unused goes."""
DEAR = 0.003
"""Price of a round, as a share of a plain step, above which it is checked who pays for it."""
CAPS = (1.0, 2.0, 4.0, 8.0)
"""Depths at which a drafter with dear rounds may be stopped for all."""
TRUST = 20.0
"""Candidates that weigh for an expectation, a draft model's or our own, before it is tested."""
CALIBRATE = 50
"""Steps, or drafts of a model, over which what they brought is held against what was expected."""
PLANNING, PLANNED = 0.01, 0.1
"""Share of the time that weighing budgets may take, of n sequences together 1/sqrt(n) of it;
between two times, they stay as they are. And share of the time that drafts save which it may take
as well."""
WEARY = 0.7
"""What is kept of the zeal to plan, look and try with each plan that finds nothing to draft, down
to 1/sqrt(n) of n sequences. A new one of them and the best of grades restore it, an accepted
candidate a step of it."""
NEW = 64
"""Steps until batches are explored less."""
FORGETTING = 100.0
"""Steps after which what a sequence did is believed by half, if nothing came to it since: bad luck
put to sleep would otherwise never be found out."""
LOOKING = 0.005
"""Share of the time that looking at the grades of sequences that do not draft may take, of n
together 1/sqrt(n) of it."""
SAVED, SAVED_PLANNING = 200, 32
"""Steps whose shares may be saved up, for trials and for planning."""
REFRESH = 32
"""Steps between two looks at what passes cost."""
LEARNING = 0.001
"""Share of the time that learning what steps cost may take, four times that with candidates."""
LEARN_SECONDS = 3e-5
"""That it takes once."""
LEARN_OFTEN = 4
"""Steps between two that the drafters' times learn from."""
PLAINLY = 64
"""Steps with candidates after which one runs without, to see again what that takes. It loses what
candidates save, so the more that is, the more steps: this number of what plain ones would be."""


@method("auto", slot="control", exact="bitwise", does=("sets-budgets",))
@dataclass(frozen=True)
class Auto:
    """Gives each sequence the drafters and budgets that make a step yield most tokens a second.

    What a candidate is worth is learned per sequence, leaning on the tenant's other texts; what it
    costs is learned from the time of the steps, drafting and planning included. Of several
    drafters a sequence has those that pay in the order of what their proposals are worth: the next
    one is asked where one before it has nothing to propose. The others are watched with trials,
    proposals that are held against the text as it comes, unverified; also where no drafts pay.
    Trials and probes take at most ``explore`` of the time of a lone sequence. Of the time of n that
    run together they take 1/n of that share, and less where nothing comes of them.
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
class Arm:
    """What is known of one drafter for one sequence.

    Attributes:
        curves: by heat or grade, and ``shared`` the tenant's.
        state: heat of its last proposal, or grade of its next one.
        presence: chance that it proposes anything.
        steps: what growing budgets of a proposal bring: (rows, tokens, budget).
        value: what a proposal is worth at today's prices, in tokens.
        budget: of its next proposal.
        read: tokens of the sequence when it was last asked. It has to read what came since, which
            costs ``reading`` seconds for each token to come.
        trial: a proposal that waits for its text.
        tries: proposals that were counted.
        counted: the step in which the last of them was.
        since: tokens of the sequence when it was first asked, and ``brought`` those that came in
            steps in which it was.
        pause: steps to wait after a trial that failed, ``until`` a step.
    """

    curves: list[Curve]
    shared: list[Curve]
    state: int = 0
    presence: float = 1.0
    steps: Worth = field(default_factory=list)
    value: float = 0.0
    budget: int = 0
    read: int = 0
    reading: float = 0.0
    news: bool = True
    trial: Trial | None = None
    tries: int = 0
    counted: int = 0
    pause: int = 0
    until: int = 0
    since: int = -1
    brought: int = 0


@dataclass(slots=True, eq=False)
class Follower:
    """What is known of one sequence.

    Attributes:
        sequence: itself, as its drafts' state is assigned through it.
        arms: its drafters.
        ladder: how they are best asked.
        shares: the drafters that are asked, in this order, with their budgets.
        budget: the largest of these.
        news: whether any of them changed since they were weighed.
    """

    sequence: Draftable
    arms: list[Arm]
    ladder: Ladder = field(default_factory=lambda: Ladder())
    shares: list[tuple[int, int]] = field(default_factory=list)
    budget: int = 0
    news: bool = True


Step = tuple[float, float, float, int, int, float, float, Follower]
"""Tokens a row, rows, tokens; drafter, budget, depth; the chance that it is asked; whose."""


@dataclass(slots=True)
class Ladder:
    """Drafters of a sequence that pay, best first; what they are worth together, in tokens; and
    what growing budgets bring."""

    order: list[int] = field(default_factory=list)
    value: float = 0.0
    steps: list[Step] = field(default_factory=list)


class AutoControl:
    """`Controlling` by expected tokens a second."""

    def __init__(self, method: Auto, context: ControlContext) -> None:
        self.method = method
        self.context = context
        self.clock = time.perf_counter
        draft: Any = context.draft
        arms: tuple[Any, ...] = draft.of if isinstance(draft, AnyOf) else (draft,)
        cards: list[Card] = [arm.card for arm in arms]
        self.graded = [at for at, card in enumerate(cards) if "grades-proposals" in card.does]
        self.states = [GRADES + 1 if at in self.graded else HEATS for at in range(len(cards))]
        self.by_trial = ["drafts-from-text" in card.does for card in cards]
        self.prices = Prices(context, len(cards))
        self.followers: dict[int, Follower] = {}
        self.tenants: dict[str, list[list[Curve]]] = {}
        self.length = TEXT
        """Tokens of the outputs that ended, on average."""
        self.use = [1.0] * len(cards)
        """Share of the tokens behind the first time that a drafter is asked that come from steps in
        which it is."""
        self.purse = 0.0
        """Seconds that may be spent on looking."""
        self._thought = 0.0
        """Seconds that planning and learning took since drafts were last learned from."""
        self._look_seconds = 0.0
        """Seconds that it takes to see the grades of a sequence's drafters."""
        self._step = math.inf
        """Seconds of a step."""
        self._zeal = 1.0
        """To plan and to look, see ``WEARY``."""
        self._saved = 0.0
        """Share of a plain step's time that the last plan expected to save."""
        self._spare = 0.0
        """Seconds that planning may take, negative after it took them."""
        self.steps = 0
        self._load: tuple[int, int] = (0, 0)
        self._asked: list[Follower] = []
        self._drafting = 0  # candidates that were asked for in this step
        self._tried: list[Follower] = []  # those with trials that wait for their text
        self._drafted = 0  # steps with candidates since one had none
        self._probing: Follower | None = None  # it drafts in this step for a trial's sake
        self._probed = (0, 0.0, 0.0)  # which, and the target's and the draft's time paid for it
        self._rate = 0.0  # tokens a second that the last plan expected
        self._row = math.inf  # seconds of a candidate's row beside those of other sequences
        self._least = 0.0  # what a candidate of a draft model must bring, in tokens
        # chances that draft models give their paths: of the last candidate, of all together
        self._hopes: dict[int, tuple[float, float]] = {}
        self._hoped = self._kept = TRUST  # such candidates, expected and accepted
        # tokens that budgets were chosen for, and those that came: the best of many estimates is
        # too good on average
        self._awaited = self._gained = TRUST
        self._await = 0.0

    # ---- planning ---------------------------------------------------------------------------

    def plan(self, sequences: Sequence[Draftable], load: Load) -> list[int]:
        followers = self.followers
        asked: list[Follower] = []
        news = False
        for sequence in sequences:
            follower = followers.get(id(sequence))
            if follower is None:
                follower = followers[id(sequence)] = self._follow(sequence)
                self._zeal = 1.0
            asked.append(follower)
        self._asked = asked
        if self.graded:
            self._look()
        for follower in asked:
            if follower.news:
                news = True
                break
        if (load.decoding, load.rows_taken) != self._load:
            self._load, news = (load.decoding, load.rows_taken), True
            self.prices.refresh()
            self._rate = 0.0
            if len(self.prices.rounds) > 1:  # which of them pay hangs on the load
                for follower in asked:
                    follower.news = True
        elif not self.steps % REFRESH:
            self.prices.refresh()
            news = True
            for follower in asked:
                if not follower.budget:  # what it is judged by is older now
                    follower.news = True
                    for arm in follower.arms:
                        arm.news = True
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
        if self._drafted * (1 - self._saved) >= PLAINLY:  # a step to see what plain ones take
            budgets = [0] * len(budgets)
        elif self.purse > 0:
            self._probe(load, budgets, self.steps % len(asked))
        self._drafting = sum(budgets)
        return budgets

    def _follow(self, sequence: Draftable) -> Follower:
        shared = self.tenants.pop(sequence.tenant, None)
        if shared is None:
            shared = [[Curve(SHARED) for _ in range(states)] for states in self.states]
            if len(self.tenants) >= TENANTS:
                del self.tenants[next(iter(self.tenants))]
        self.tenants[sequence.tenant] = shared  # now the latest
        return Follower(sequence, [Arm([Curve(OWN) for _ in s], s) for s in shared])

    def _look(self) -> None:
        """See how good the next proposals would be: of all who draft, and of those who do not by
        turns, as far as the time goes that may be spent on it."""
        began = self.clock()
        asked, turn = self._asked, self.steps
        sleeping = sum(not follower.budget for follower in asked)
        affordable = LOOKING * self._zeal * self._step / math.sqrt(len(asked))
        affordable = max(affordable, 1e-9)  # a clock may stand still
        stride = max(1, math.ceil(sleeping * self._look_seconds / affordable))
        looks = 0
        for place, follower in enumerate(asked):
            looked = follower.budget or not (place + turn) % stride
            for at in self.graded:
                arm = follower.arms[at]
                grade = self._grade(follower.sequence, at) if looked else 0
                if grade != arm.state:
                    arm.state = grade
                    arm.news = follower.news = True
                    if grade == GRADES:
                        self._zeal = 1.0
            looks += bool(looked)
        if looks:
            seconds = (self.clock() - began) / looks
            self._look_seconds += 0.05 * (seconds - self._look_seconds)

    def _grade(self, sequence: Draftable, at: int) -> int:
        drafting: Any = self.context.drafting()
        if isinstance(drafting, Portfolio):
            return drafting.grade(at, sequence)
        return int(drafting.grade(sequence))

    def _choose(self, load: Load) -> None:
        """Drafters and budgets for this step, with and without what is shared by several."""
        prices = self.prices
        if not prices.passes.known:  # no look was possible: the first steps run plain
            return
        plain = prices.plain(load)
        for place, follower in enumerate(self._asked):
            if follower.news:
                self._weigh(follower, place, load, plain)
        ladders = [follower.ladder for follower in self._asked]
        self._rate, steps = self._allocate(ladders, load, plain)
        dear = [at for at, p in enumerate(prices.rounds) if p.round + p.depth > DEAR * plain]
        if load.decoding > 1 and dear:
            # a round's price is shared by all, but perhaps too few want it, or want it so deep
            for cap in CAPS:
                rate, fewer = self._allocate(ladders, load, plain, dear, cap)
                if rate > self._rate:
                    self._rate, steps = rate, fewer
            for barred in dear if len(prices.rounds) > 1 else ():
                without = [self._ladder(f, load, barred) for f in self._asked]
                rate, fewer = self._allocate(without, load, plain)
                if rate > self._rate:
                    self._rate, steps, ladders = rate, fewer, without
        self._allot(steps, ladders)
        self._await = sum(step[2] for step in steps)
        self._saved = max(0.0, 1 - load.decoding / plain / self._rate) if steps else 0.0
        self._zeal = 1.0 if steps else max(1 / math.sqrt(load.decoding), WEARY * self._zeal)
        more = sum(step[1] for step in steps)
        extra = prices.extra(load, more)
        row = prices.extra(load, more + 1) - extra
        # alone, a sequence pays for its rows what they cost behind its own
        shared = load.decoding > 1 and more > 0
        self._row = extra / more if shared else math.inf
        models = zip(prices.rounds, self.by_trial, strict=True)
        token = min((price.depth for price, trial in models if not trial), default=0.0)
        self._least = self._rate * (row + token / load.decoding)

    def _allocate(
        self,
        ladders: list[Ladder],
        load: Load,
        plain: float,
        capped: Sequence[int] = (),
        cap: float = math.inf,
    ) -> tuple[float, list[Step]]:
        """Raise budgets in the order of their worth a row, and keep the best point on the way;
        returns the tokens a second that are expected there. Some drafters go to a depth at most."""
        steps = [
            step
            for ladder in ladders
            for step in ladder.steps
            if step[5] <= cap or step[3] not in capped
        ]
        if len(ladders) > 1:
            steps.sort(key=_density, reverse=True)
        decoding = load.decoding
        tokens, more, drafting = float(decoding), 0.0, 0.0
        best = tokens / plain * (1 + MARGIN)
        best_at = -1
        deepest = [0.0] * len(self.prices.rounds)
        left = load.rows_left
        held: dict[int, int] = {}
        for at, (_, rows, gain, arm, budget, depth, chance, follower) in enumerate(steps):
            had = held.get(id(follower), 0)
            if budget > had:  # one of its drafters will use the rows
                left -= budget - had
                if left < 0:
                    break
                held[id(follower)] = budget
            tokens += gain
            more += rows
            price = self.prices.rounds[arm]
            reading = follower.arms[arm].reading
            drafting += reading * gain
            if depth > deepest[arm]:  # a round is shared by those who draft in it
                drafting += min(1.0, chance * decoding) * price.depth * (depth - deepest[arm])
                if not deepest[arm]:
                    drafting += min(1.0, chance * decoding) * price.round
                deepest[arm] = depth
            if budget == follower.arms[arm].steps[0][2]:
                drafting += chance * (price.sequence + reading)
            rate = tokens / (plain + self.prices.extra(load, more) + drafting)
            if rate > best:
                best, best_at = rate, at
        return best, steps[: best_at + 1]

    def _allot(self, steps: list[Step], ladders: list[Ladder]) -> None:
        for follower in self._asked:
            follower.budget = 0
            for arm in follower.arms:
                arm.budget = 0
        for _, _, _, at, budget, _, _, follower in steps:
            follower.arms[at].budget = budget
            follower.budget = max(follower.budget, budget)
        if len(self.prices.rounds) > 1:
            for follower, ladder in zip(self._asked, ladders, strict=True):
                shares = [(at, follower.arms[at].budget) for at in ladder.order]
                shares = [(at, budget) for at, budget in shares if budget]
                follower.shares = shares
                self._assign(follower, shares)

    def _weigh(self, follower: Follower, place: int, load: Load, plain: float) -> None:
        """What a sequence's drafters are worth at today's prices."""
        rate = max(self._rate, load.decoding / plain)
        follower.news = False
        for at, arm in enumerate(follower.arms):
            if place > CROWD * sum(curve.asked for curve in arm.shared):
                arm.steps, arm.value, arm.presence = [], 0.0, 0.0
                arm.news = follower.news = True
                continue
            if arm.news:
                own, shared = arm.curves[arm.state], arm.shared[arm.state]
                graded = at in self.graded
                if graded and not arm.state:
                    arm.steps, arm.value, arm.presence, arm.news = [], 0.0, 0.0, False
                    continue
                arm.presence = 1.0 if graded else presence(own, shared)
                luck = min(1.0, self._gained / self._awaited)
                trust = 0.5 ** ((self.steps - arm.counted) / FORGETTING)
                arm.steps = [
                    (rows, gain * luck, budget)
                    for rows, gain, budget in worth(own, shared, self.method.most, trust)
                    if gain > WORTHLESS * rows
                ]
                arm.news = False
            arm.reading = self._reading(follower, at)
            if len(follower.arms) > 1:
                arm.value = self._value(follower, at, load, rate)
        follower.ladder = self._ladder(follower, load)

    def _ladder(self, follower: Follower, load: Load, barred: int = -1) -> Ladder:
        """The drafters of a sequence that pay, best first."""
        arms, ladder = follower.arms, Ladder()
        if len(arms) == 1:
            ladder.order = [0]
        else:
            for at in sorted(range(len(arms)), key=lambda at: arms[at].value):
                if at == barred:
                    continue
                # worth asking before the better of those so far?
                chance, price = arms[at].presence, self.prices.rounds[at]
                in_vain = self._rate * (price.round / load.decoding + price.sequence)
                value = chance * arms[at].value + (1 - chance) * (ladder.value - in_vain)
                if value > ladder.value:
                    ladder.value = value
                    ladder.order.insert(0, at)
        chance = 1.0
        for at in ladder.order:
            found = chance * arms[at].presence
            depth = 0.0
            for rows, gain, budget in arms[at].steps:
                depth += rows * self.prices.depth_share[at]
                ladder.steps.append(
                    (gain / rows, rows * found, gain * found, at, budget, depth, chance, follower)
                )
            chance -= found
        if len(ladder.order) > 1:
            ladder.steps.sort(key=_density, reverse=True)
        return ladder

    def _reading(self, follower: Follower, arm: int) -> float:
        """Seconds of reading for each token to come: it is read once, and what the drafter missed
        is paid for by those that it is used for."""
        sequence = follower.sequence
        written = len(sequence.tokens) - sequence.num_prompt
        left = max(self.length - written, self.length / 4) * self.use[arm]
        unread = len(sequence.tokens) - follower.arms[arm].read
        return self.prices.rounds[arm].reading * (1 + unread / left)

    def _value(self, follower: Follower, arm: int, load: Load, rate: float) -> float:
        """Tokens that a proposal brings, less those that could be had in the time it takes."""
        state = follower.arms[arm]
        price, depth_share = self.prices.rounds[arm], self.prices.depth_share[arm]
        tokens, more, best = 0.0, 0.0, 0.0
        for rows, gain, _ in state.steps:
            tokens, more = tokens + gain, more + rows
            cost = min(self.prices.extra(load, more), more * self._row)
            cost += price.sequence
            cost += (price.round + price.depth * more * depth_share) / load.decoding
            cost += state.reading * (1 + tokens)
            best = max(best, tokens - rate * cost)
        return best

    def _assign(self, follower: Follower, shares: list[tuple[int, int]]) -> None:
        drafting, sequence = self.context.drafting(), follower.sequence
        if isinstance(drafting, Portfolio) and sequence.draft_state is not None:  # it has not ended
            drafting.assign(sequence, shares)

    def _probe(self, load: Load, budgets: list[int], place: int) -> None:
        """Let a drafter propose that is not asked, if what that costs is in the purse.

        One that a sequence has hardly tried, whatever other texts say of it, and those that trials
        cannot watch without harm.
        """
        follower = self._asked[place]
        budget = min(PROBE_CANDIDATES, load.rows_left - sum(budgets), self.method.most)
        if budget < 1 or not self.prices.passes.known:
            return
        sleeps = not follower.budget
        arms = [
            at
            for at, (arm, trial) in enumerate(zip(follower.arms, self.by_trial, strict=True))
            if not arm.budget
            and (arm.state or at not in self.graded)
            and (sleeps or not trial)
            and (arm.tries < YOUNG or (not trial and self.steps - arm.counted >= PATIENCE))
        ]
        if not arms:
            return
        at = min(arms, key=lambda at: follower.arms[at].tries)
        arm, prices = follower.arms[at], self.prices
        taken = sum(budgets)
        cost = prices.extra(load, taken + budget) - prices.extra(load, taken)
        unread = len(follower.sequence.tokens) - arm.read
        drafting = prices.lone(at, budget, unread, self.steps)
        missed = 0.0  # what the others would have brought
        if not sleeps and self._rate:
            missed = follower.ladder.value / self._rate
        if cost + drafting + missed <= self.purse:
            self.purse -= cost + drafting + missed
            self._probing, self._probed = follower, (at, cost, drafting)
            self._assign(follower, [(at, budget)])
            budgets[place] = budget

    def should_stop(self, progress: DraftProgress) -> bool:
        """Whether the next candidate is worth less than its step of the draft and its row."""
        key, depth = id(progress.sequence), progress.depth
        hope, hopes = self._hopes.get(key, (1.0, 0.0)) if depth > 1 else (1.0, 0.0)
        hope *= progress.probability
        self._hopes[key] = hope, hopes + hope
        return float(hope ** (1 + 1 / depth)) * self._kept / self._hoped < self._least

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
        self._step = seconds if self._step == math.inf else 0.9 * self._step + 0.1 * seconds
        many = max(report.load.decoding, 1)
        share = self.method.explore * seconds
        if self.steps > NEW:  # what is learned of one sequence serves the others
            share *= self._zeal / many
        self.purse = min(self.purse + share, SAVED * share)
        share = (PLANNING * self._zeal / math.sqrt(many) + PLANNED * self._saved) * seconds
        self._spare = min(self._spare + share, SAVED_PLANNING * share)
        self._awaited += (TRUST - self._awaited) / CALIBRATE
        self._gained += (TRUST - self._gained) / CALIBRATE
        if self._drafting and self._await and self._probing is None:
            self._awaited += self._await
            self._gained += sum(len(o.path) - 1 for o in report.outcomes)
        if self._drafting:
            self._learn_drafts(report)
        plainly = self._drafted > 0 and not report.candidates
        if report.candidates:
            self._drafted += 1
        elif plainly and seconds > (1 - MARGIN) * self.prices.plain(report.load):
            self._drafted = 0  # else it took less than was thought: another one
        often = LEARN_SECONDS / max(LEARNING * seconds, 1e-9) / (4 if report.candidates else 1)
        if not self.steps % math.ceil(often) or plainly or self.prices.around.seen < REFRESH:
            self.prices.observe(report)
        for follower in list(self._tried):
            for at, arm in enumerate(follower.arms):
                if arm.trial is not None and arm.trial.advance(follower.sequence.tokens):
                    self._judge(follower, at, arm.trial)
        if self.purse > 0 and report.outcomes:
            outcome = report.outcomes[self.steps % len(report.outcomes)]
            turn = self.followers.get(id(outcome.sequence))
            if turn is not None:
                self._try(turn)

    def _learn_drafts(self, report: StepReport) -> None:
        """Count proposals, and what drafting took."""
        prices, arms = self.prices, len(self.prices.rounds)
        asked, deepest, reading = [0] * arms, [0] * arms, [0] * arms
        drafting = self.context.drafting()
        turns = drafting.take_turns() if isinstance(drafting, Portfolio) else None
        for outcome in report.outcomes:
            follower = self.followers.get(id(outcome.sequence))
            if follower is None:
                continue
            tree, probing = outcome.tree, follower is self._probing
            if (hopes := self._hopes.pop(id(outcome.sequence), None)) is not None:
                self._hoped += hopes[1] - self._hoped / CALIBRATE
                self._kept += len(outcome.path) - 1 - self._kept / CALIBRATE
            if turns is not None:
                places = turns.get(id(outcome.sequence), [])
            else:
                places = [0] if follower.budget or probing else []
            for at in places:
                arm = follower.arms[at]
                # the last one asked is the one that proposed, if any did
                count = len(tree) - 1 if at == places[-1] else 0
                budget = PROBE_CANDIDATES if probing else min(arm.budget, follower.budget)
                asked[at] += 1
                reading[at] += outcome.start + 1 - arm.read
                arm.read = outcome.start + 1
                if arm.since < 0:
                    arm.since = arm.read
                arm.brought += len(outcome.tokens)
                if count:
                    depth = tree.depth[-1]
                    deepest[at] = max(deepest[at], depth)
                    prices.depth_share[at] += 0.05 * (depth / count - prices.depth_share[at])
                accepted = outcome.path[1:] if count else []
                self._count(follower, at, arm.state, max(budget, count), count, accepted)
        if self._probing is not None:
            self._assign(self._probing, self._probing.shares)
            at, cost, paid = self._probed
            spent = report.draft_seconds
            if isinstance(drafting, Portfolio):
                spent = drafting.seconds[at]
            self.purse += paid - spent
            if not report.candidates:
                self.purse += cost  # nothing was verified
            self._probing = None
        for at in range(arms):
            if asked[at] and (prices.rounds_seen(at) < REFRESH or not self.steps % LEARN_OFTEN):
                seconds = report.draft_seconds
                if isinstance(drafting, Portfolio):
                    seconds = drafting.seconds[at]
                seconds += self._thought
                prices.observe_round(at, deepest[at], asked[at], reading[at], seconds, self.steps)
                self._thought = 0.0
        self._thought = 0.0

    def _count(
        self,
        follower: Follower,
        at: int,
        state: int,
        budget: int,
        candidates: int,
        accepted: list[int],
    ) -> None:
        arm = follower.arms[at]
        arm.curves[state].observe(budget, candidates, accepted)
        arm.shared[state].observe(budget, candidates, accepted)
        if candidates and at not in self.graded:
            arm.state = 0 if not accepted else 2 if accepted[-1] == candidates else 1
        if accepted:
            self._zeal = min(1.0, self._zeal / WEARY)
        arm.tries += 1
        arm.counted = self.steps
        if follower.budget or accepted:  # who sleeps is not woken by failure
            arm.news = follower.news = True

    def _try(self, follower: Follower) -> None:
        """Begin trials of drafters that did not propose now, and pay for them."""
        drafting, sequence = self.context.drafting(), follower.sequence
        budget = min(TRIAL_CANDIDATES, self.method.most)
        for at, arm in enumerate(follower.arms):
            if not self.by_trial[at] or arm.trial is not None or self.steps < arm.until:
                continue
            if arm.counted == self.steps or self.purse <= 0:
                continue
            began, state = self.clock(), arm.state
            if at in self.graded:
                state = self._grade(sequence, at)
            if state or at not in self.graded:
                if isinstance(drafting, Portfolio):
                    (tree,) = drafting.ask(at, [sequence], [budget])
                else:
                    (tree,) = drafting.propose([sequence], [budget])
                arm.read = len(sequence.tokens)
                if len(tree) > 1:
                    arm.trial = Trial(state, budget, tree, len(sequence.tokens))
                    if follower not in self._tried:
                        self._tried.append(follower)
                else:
                    self._count(follower, at, state, budget, 0, [])
                    self._pause(arm, False)
            self.purse -= self.clock() - began

    def _judge(self, follower: Follower, at: int, trial: Trial) -> None:
        """Count a trial that is decided."""
        arm = follower.arms[at]
        arm.trial = None
        if all(other.trial is None for other in follower.arms):
            self._tried.remove(follower)
        self._pause(arm, len(trial.accepted) > 0)
        candidates = len(trial.tree) - 1
        self._count(follower, at, trial.state, trial.budget, candidates, trial.accepted)

    def _pause(self, arm: Arm, success: bool) -> None:
        arm.pause = 0 if success else min(2 * arm.pause + 1, PATIENCE)
        arm.until = self.steps + arm.pause

    def close(self, sequence: Draftable) -> None:
        self._hopes.pop(id(sequence), None)  # of a draft that was never verified
        if (follower := self.followers.pop(id(sequence), None)) is not None:
            if follower in self._tried:
                self._tried.remove(follower)
            for at, arm in enumerate(follower.arms):
                after = len(sequence.tokens) - arm.since
                if arm.since >= 0 and after > 0:
                    self.use[at] += 0.1 * (arm.brought / after - self.use[at])
                else:  # what is not used may have become useful
                    self.use[at] += 0.02 * (1.0 - self.use[at])
            written = len(sequence.tokens) - sequence.num_prompt
            self.length += 0.1 * (written - self.length)


def _density(step: Step) -> float:
    return step[0]
