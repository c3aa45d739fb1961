"""What candidates and their drafting cost at the moment, for a controller that weighs them."""

from __future__ import annotations

from typing import NamedTuple

from hasten.speculation.base import ControlContext, Load, StepReport
from hasten.speculation.latency import LinearTimes, PassTimes

FADING = 200.0
"""Steps after which a price that was not learned again is believed by half, and counts for little
once it is."""


class RoundPrice(NamedTuple):
    """Seconds that a drafter takes.

    Attributes:
        round: each time that it is asked, whoever drafts.
        depth: for each candidate of the deepest path; sequences draft side by side.
        sequence: for each sequence that drafts.
        reading: for each token of a sequence that it has to read first.
    """

    round: float
    depth: float
    sequence: float
    reading: float


class Prices:
    """Times of steps by their rows, and of rounds of several drafters.

    All are learned as what they would take at the machine's usual speed.

    Attributes:
        passes: seconds of a forward pass.
        around: seconds of the rest: of a step, its sequences, its candidates.
        rounds: what the drafters take.
        depth_share: depth of a drafter's trees, against their candidates.
    """

    def __init__(self, context: ControlContext, drafters: int) -> None:
        self.passes = PassTimes(context.max_batch_tokens)
        if context.time_step is not None:
            self.passes.look(context.time_step)
        self.around = LinearTimes((1, 1, 1))
        # usual sizes: one who drafts first has most often a prompt to read; that others would
        # take the same again is found out where they draft
        self._drafts = [LinearTimes((1, 8, 8, 64)) for _ in range(drafters)]
        self.rounds = [RoundPrice(0.0, 0.0, 0.0, 0.0)] * drafters
        self.depth_share = [1.0] * drafters
        self._learned = [0] * drafters
        """The step in which a drafter's times were last learned."""
        self._steps: list[float] = []
        """Usual seconds of a step with 0, 1, 2, ... candidates."""

    def refresh(self) -> None:
        """From now on, go by what was learned until now, for the load of the next step."""
        self._steps.clear()
        for drafter in range(len(self.rounds)):
            self._refresh_round(drafter)

    def _refresh_round(self, drafter: int) -> None:
        slow = self.passes.slowness
        self.rounds[drafter] = RoundPrice(*(slow * p for p in self._drafts[drafter].price))

    def plain(self, load: Load) -> float:
        """Seconds of a step without drafts, and without the prompts' rows, which it computes
        anyway."""
        usual = self.passes.usual(load.decoding, load.context)
        return (usual + self.around.seconds((1, load.decoding, 0))) * self.passes.slowness

    def extra(self, load: Load, rows: float) -> float:
        """Seconds that candidates add to a step, without their drafting."""
        whole, steps = int(rows), self._steps
        while len(steps) < whole + 2:
            steps.append(self._usual(load, len(steps)))
        more = steps[whole] - steps[0]
        if rows != whole:
            more += (steps[whole + 1] - steps[whole]) * (rows - whole)
        return max(0.0, more) * self.passes.slowness  # no row makes a pass faster

    def _usual(self, load: Load, candidates: int) -> float:
        rows = load.rows_taken + candidates
        reads = rows * load.context / max(load.decoding, 1)
        return self.passes.usual(rows, reads) + self.around.seconds((1, load.decoding, candidates))

    def lone(self, drafter: int, candidates: int, unread: int, step: int) -> float:
        """Seconds that a drafter takes for one sequence in a round of its own.

        The longer nobody asked it, the less its price is believed: that may come from a bad
        moment, and would otherwise keep itself from being corrected.
        """
        price = self.rounds[drafter]
        seconds = price.round + price.sequence + price.reading * unread
        seconds += price.depth * candidates * self.depth_share[drafter]
        return float(seconds * 0.5 ** ((step - self._learned[drafter]) / FADING))

    def observe(self, report: StepReport) -> None:
        """Learn from a step."""
        load = report.load
        reads = load.context / max(load.decoding, 1) * report.rows
        self.passes.observe(report.rows, reads, report.forward_seconds)
        if load.rows_taken == load.decoding:  # prompt chunks have costs of their own
            rest = report.step_seconds - report.forward_seconds - report.draft_seconds
            terms = (1, load.decoding, report.candidates)
            self.around.observe(terms, rest / self.passes.slowness)

    def observe_round(
        self, drafter: int, deepest: int, sequences: int, unread: int, seconds: float, step: int
    ) -> None:
        """Learn from what a drafter took; not from its first time of all, when it allocates."""
        if self._learned[drafter]:
            terms = (1, deepest, sequences, unread)
            if step - self._learned[drafter] > FADING:
                self._drafts[drafter].doubt()
            self._drafts[drafter].observe(terms, seconds / self.passes.slowness)
            self._refresh_round(drafter)
        self._learned[drafter] = step

    def rounds_seen(self, drafter: int) -> int:
        return self._drafts[drafter].seen
