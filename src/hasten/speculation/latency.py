"""What steps cost: learned from the engine's own steps, after a short look at the idle engine.

A step's time has three parts that behave differently. The forward pass depends on its rows, in
jumps (few rows share the reading of the weights, many compute), and on the positions that they
read: `PassTimes`. Drafting, and what surrounds a pass, are sums of few terms: `LinearTimes`.
Every part believes a single odd measurement little: a step may have been interrupted.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from hasten.engine.recording import MAX_ROWS

# dense where few rows are, where the recorded passes end, and doubling from there
KNOTS = (1, 2, 3, 4, 6, 8, 12, MAX_ROWS, MAX_ROWS + 1, 24, 32, 48, 64, 96, 128, 192, 256, 512)
LOOK_SECONDS = 0.8
"""Time for the look at the idle engine, without the first pass of all and the long context."""
LOOKS = (1, 2, 4, 8, MAX_ROWS, MAX_ROWS + 1, 32, 64, 128, 256, 512)
CONTEXT = 16
"""Positions before the rows that are timed."""
LONG_CONTEXTS = (1024, 512, 256, 128)
"""Positions before a row, for the price of reading one: the first that fits the engine."""
OUTLIER = 3.0
"""Deviations, in units of the usual one, that a measurement may have at most; more is cut."""
LEAST_NOISE, MOST_NOISE = 0.02, 0.1
"""Relative errors that a measurement has at least, and that explain how far it is off at most."""
DRIFT, SHAPE_DRIFT = 0.02, 0.003
"""How much the machine's speed changes from one measurement to the next, and how much what a number
of rows takes beside the others: a machine is shared, and its clock changes."""
LOOKED, IDLE, UNKNOWN = 0.03, 0.1, 1.0
"""Relative doubt in a time after the look, in the speed of a machine that was idle then, and in a
time that was never measured."""


class PassTimes:
    """Seconds of a forward pass by rows and by positions read.

    Linear between knots in the number of rows, plus a price for each position that a row reads,
    all times how slow the machine is now. A Kalman filter over the logarithms of the knots and of
    the slowness divides what surprises between them: where the machine has become slower all pass
    sizes have, also those that were not seen since. A knot that was never measured lies on the line
    through the measured ones beside it.
    """

    def __init__(self, most_rows: int) -> None:
        self.knots = [k for k in KNOTS if k < most_rows]
        self.knots.append(most_rows if most_rows > 1 else 2)
        self.value = [0.0] * len(self.knots)
        self.measured = [False] * len(self.knots)
        self.slowness = 1.0
        self.per_read = 0.0
        """From the look alone: online it could not be told from other slow changes, which the
        knots follow."""
        self.deviation = 0.0
        """The usual relative error of a prediction."""
        # covariance of the logarithms: of the knots, then of the slowness
        self._doubt = np.diag([UNKNOWN**2] * len(self.knots) + [IDLE**2])
        self._variance = self._doubt.reshape(-1)[:: len(self._doubt) + 1]  # its diagonal
        self._drift = np.array([SHAPE_DRIFT**2] * len(self.knots) + [DRIFT**2])

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self.value[0] > 0

    def look(self, time_step: Callable[[int, int], float]) -> None:
        """Time passes of an idle engine: rows in doubling order, then a long context.

        The first pass of a size may be recorded or allocate, so the others count; the first of all
        may have to read the weights from a disk.
        """
        spent = last = 0.0
        for rows in LOOKS:
            place = bisect_right(self.knots, rows) - 1
            if self.knots[place] != rows or spent + 3 * last > LOOK_SECONDS:
                continue
            try:
                first = time_step(rows, CONTEXT)
            except ValueError:  # the engine is smaller than that
                break
            last = min(time_step(rows, CONTEXT) for _ in range(2))
            spent += 2 * last + (first if rows > 1 else 0.0)
            self.value[place], self.measured[place] = last, last > 0
            self._doubt[place, place] = LOOKED**2
        for context in LONG_CONTEXTS:
            with suppress(ValueError):
                # a small difference of large times: in turns, and often
                turns = [[time_step(1, c) for c in (context, CONTEXT)] for _ in range(6)]
                far, near = (min(times) for times in zip(*turns, strict=True))
                self.per_read = max(0.0, far - near) / (context - CONTEXT)
                break
        self._fill()

    def seconds(self, rows: float, reads: float = 0.0) -> float:
        """Of a pass of so many rows that read so many positions together; 0 if nothing is known."""
        return self.usual(rows, reads) * self.slowness

    def usual(self, rows: float, reads: float = 0.0) -> float:
        """Those seconds where the slowness is 1."""
        low, high, share = self._place(rows)
        below, above = self.value[low], self.value[high]
        return below + (above - below) * share + self.per_read * reads

    def observe(self, rows: int, reads: float, seconds: float) -> None:
        """Learn from a pass."""
        low, high, share = self._place(rows)
        nearest = low if share < 0.5 else high
        if seconds <= 0:  # of a clock that stands still
            return
        fresh, self.measured[nearest] = not self.measured[nearest], True
        usual = self.usual(rows, reads)
        if usual <= 0:
            self.value[nearest] = seconds
            self._fill()
            return
        relative = seconds / (usual * self.slowness) - 1
        if not fresh:
            limit = OUTLIER * max(self.deviation, LEAST_NOISE)
            # the cut value counts, so a lasting change widens the limit step by step
            self.deviation += 0.05 * (min(abs(relative), 2 * limit) - self.deviation)
            relative = min(relative, limit)  # interruptions lengthen a step, nothing shortens it
        doubt, diagonal = self._doubt, self._variance
        diagonal += self._drift
        np.minimum(diagonal, UNKNOWN**2, out=diagonal)
        below = (1 - share) * self.value[low] / usual
        above = share * self.value[high] / usual
        along = below * doubt[low] + doubt[-1]
        if above:
            along += above * doubt[high]
        noise = min(max(self.deviation, LEAST_NOISE), MOST_NOISE)
        total = float(below * along[low] + above * along[high] + along[-1]) + noise**2
        doubt -= along[:, None] * (along / total)
        *shape, speed = np.exp(along * (math.log1p(relative) / total)).tolist()
        self.value = [v * g for v, g in zip(self.value, shape, strict=True)]
        self.slowness *= speed
        if fresh or not (self.measured[low] and self.measured[high]):
            self._fill()

    def _fill(self) -> None:
        """Give the knots that were not measured what the measured ones say."""
        known = [place for place, measured in enumerate(self.measured) if measured]
        for place, measured in enumerate(self.measured):
            if measured or not known:
                continue
            right = bisect_right(known, place)
            if right == 0:
                self.value[place] = self.value[known[0]]
                continue
            low = known[right - 1]
            high = known[right] if right < len(known) else low
            if high == low and right > 1:
                low = known[right - 2]
            slope = 0.0
            if high > low:
                slope = (self.value[high] - self.value[low]) / (self.knots[high] - self.knots[low])
            away = self.knots[place] - self.knots[low]
            self.value[place] = self.value[low] + max(0.0, slope) * away

    def _place(self, rows: float) -> tuple[int, int, float]:
        """Knots around a number of rows and how far it is from the first to the second."""
        knots = self.knots
        high = min(max(bisect_right(knots, rows), 1), len(knots) - 1)
        low = high - 1
        share = (rows - knots[low]) / (knots[high] - knots[low])
        return low, high, max(0.0, share)


IGNORANCE = 1e3
"""Variance of a price that nothing is known of, in units of what a measurement says of it."""
SURE = 8
"""Measurements after which those that are far off are cut."""


class LinearTimes:
    """Seconds as a sum of terms with prices that are not negative, by recursive least squares.

    ``sizes`` are the terms' usual values: of terms that vary together, the larger pays less for
    each. ``memory`` is how many measurements count, about.
    """

    def __init__(self, sizes: Sequence[float], memory: float = 100.0) -> None:
        self.price = [0.0] * len(sizes)
        self.seen = 0
        self._keep = 1 - 1 / memory
        self._sizes = sizes
        self._gain = self._ignorance()
        self._usual = 0.0

    def doubt(self) -> None:
        """Believe the next measurement more than all that was learned."""
        self._gain = self._ignorance()
        self.seen = min(self.seen, SURE - 1)

    def _ignorance(self) -> list[list[float]]:
        sizes = self._sizes
        return [
            [IGNORANCE / s**2 * (i == j) for j in range(len(sizes))] for i, s in enumerate(sizes)
        ]

    def seconds(self, terms: Sequence[float]) -> float:
        return sum(p * t for p, t in zip(self.price, terms, strict=True))

    def observe(self, terms: Sequence[float], seconds: float) -> None:
        """Learn from a measurement; cut where it is far from what was expected."""
        gain = self._gain
        along = [sum(g * t for g, t in zip(row, terms, strict=True)) for row in gain]
        total = self._keep + sum(a * t for a, t in zip(along, terms, strict=True))
        error = seconds - self.seconds(terms)
        self.seen += 1
        if self.seen > SURE:
            limit = OUTLIER * self._usual
            error = min(max(error, -limit), limit)
            self._usual += 0.05 * (min(abs(error) * 1.5, 2 * limit) - self._usual) + 1e-9
        else:
            self._usual += (abs(error) - self._usual) / self.seen if self.seen > 1 else 0.0
        self._correct(terms, error)
        trace = sum(gain[i][i] for i in range(len(terms)))
        keep = self._keep if trace < 1e4 * len(terms) else 1.0  # terms that never vary stay put
        for i, a in enumerate(along):
            for j, b in enumerate(along):
                gain[i][j] = (gain[i][j] - a * b / total) / keep

    def _correct(self, terms: Sequence[float], error: float) -> None:
        """Change the prices by an error. Those that would be negative end at 0, and the others take
        what is left: a negative price would hide behind another that is too high, for good."""
        free = [i for i, term in enumerate(terms) if term]
        while free:
            along = [sum(self._gain[i][j] * terms[j] for j in free) for i in free]
            total = self._keep + sum(a * terms[i] for a, i in zip(along, free, strict=True))
            fresh = {i: self.price[i] + a * error / total for a, i in zip(along, free, strict=True)}
            below = [i for i in free if fresh[i] < 0]
            if not below:
                for i in free:
                    self.price[i] = fresh[i]
                return
            for i in below:
                error += self.price[i] * terms[i]
                self.price[i] = 0.0
                free.remove(i)
