"""Which requests a run sends: arrivals and lengths first, prompts when a run begins.

Everything follows from the seed: the same options send the same requests at the same times to
every server they are pointed at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hasten.bench.serving import trace
from hasten.bench.serving.arrivals import Arrivals
from hasten.bench.serving.load import Planned
from hasten.bench.serving.prompts import Prompts
from hasten.bench.serving.trace import Row


@dataclass(frozen=True)
class Shape:
    """Lengths and relative arrival times of the requests; `at_rate` sets their rate.

    Attributes:
        rows: in order of arrival.
        arrivals: None where the rows keep their own times (a trace), stretched to the rate.
        rate: requests per second; None keeps a trace's own. Infinite: no times at all, a request
            arrives when there is a place for it.
        duration: seconds after which nothing arrives any more.
    """

    rows: list[Row]
    arrivals: Arrivals | None
    rate: float | None
    seed: int
    duration: float | None = None

    @property
    def closed_loop(self) -> bool:
        return self.rate == float("inf")

    def at_rate(self, rate: float | None) -> list[Row]:
        """The rows with the times of that rate."""
        rows = self.rows
        if rate == float("inf"):
            return rows
        if self.arrivals is not None:
            if rate is None:
                raise ValueError("these arrivals need a request rate")
            rows = trace.at_times(rows, self.arrivals.times(len(rows), rate, self.seed))
        elif rate is not None:
            rows = trace.at_rate(rows, rate)
        if self.duration is not None:
            rows = [row for row in rows if row.at < self.duration]
        return rows


def synthetic_rows(count: int, prompt: int, output: int, spread: float, seed: int) -> list[Row]:
    """Lengths uniform in [L·(1 - spread), L·(1 + spread)], at least 1; equal for spread 0."""
    if not 0 <= spread < 1:
        raise ValueError(f"the range ratio must lie in [0, 1), not {spread}")
    rng = np.random.default_rng([seed, 0x1E26])

    def draw(length: int) -> list[int]:
        low, high = round(length * (1 - spread)), round(length * (1 + spread))
        return [max(1, int(n)) for n in rng.integers(low, high + 1, count)]

    return [Row(0.0, p, o) for p, o in zip(draw(prompt), draw(output), strict=True)]


def plan(rows: Sequence[Row], prompts: Prompts, first_number: int = 0) -> list[Planned]:
    """The requests with their prompts."""
    return [
        Planned(row.at, prompts.make(first_number + i, row), row.prompt, row.output)
        for i, row in enumerate(rows)
    ]


PromptsOf = Callable[[int], Prompts]
"""Prompts of a seed: every run of a search has its own, or the server would have them cached."""
