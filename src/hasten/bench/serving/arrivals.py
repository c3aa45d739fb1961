"""When requests arrive: renewal processes with unit mean, scaled to a rate.

All processes are drawn at one request per second and stretched afterwards, so that two runs at
different rates with the same seed see the same pattern (common random numbers: a search over
rates compares rates, not draws).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Process = Literal["poisson", "gamma", "constant"]
PROCESSES: tuple[str, ...] = get_args(Process)


@dataclass(frozen=True)
class Spike:
    """``factor`` times the rate for ``seconds``, beginning ``start`` seconds into the run."""

    factor: float
    seconds: float
    start: float

    @classmethod
    def parse(cls, text: str) -> Spike:
        """``K:SECONDS@START``, such as ``5:10@30``: five times the rate from 30 s to 40 s."""
        number = r"(\d+(?:\.\d*)?)"
        match = re.fullmatch(rf"{number}:{number}@{number}", text)
        if match is None or not float(match[1]) or not float(match[2]):
            raise ValueError(
                f"'{text}' is not a spike; write K:SECONDS@START, such as 5:10@30 for five times "
                "the rate during ten seconds, 30 seconds into the run"
            )
        return cls(*(float(group) for group in match.groups()))


@dataclass(frozen=True)
class Arrivals:
    """A renewal process that begins with an arrival at 0.

    Gaps are exponential (``poisson``), equal (``constant``), or Gamma with shape 1/cv² and mean 1
    (``gamma``, as DistServe's and Sarathi-Serve's generators do): a coefficient of variation of 1
    is Poisson, more is burstier.
    """

    process: Process = "poisson"
    cv: float = 1.0
    spike: Spike | None = None

    def __post_init__(self) -> None:
        if self.process not in PROCESSES:
            raise ValueError(f"no arrival process '{self.process}': {', '.join(PROCESSES)}")
        if not 0 < self.cv < 100:
            raise ValueError(f"cv must lie between 0 and 100, not {self.cv}")
        if self.cv != 1 and self.process != "gamma":
            raise ValueError(f"cv is that of the gamma process; '{self.process}' has its own")

    def times(self, count: int, rate: float, seed: int) -> list[float]:
        """``count`` times in seconds from the start, ascending, at ``rate`` requests per second.

        With a spike, ``rate`` is the rate outside of it.
        """
        if not 0 < rate < float("inf"):
            raise ValueError(f"the rate must be positive and finite, not {rate}")
        rng = np.random.default_rng([seed, 0xA221])
        if self.process == "poisson":
            gaps = rng.exponential(1.0, count)
        elif self.process == "gamma":
            gaps = rng.gamma(1 / self.cv**2, self.cv**2, count)
        else:
            gaps = np.ones(count)
        units = np.cumsum(gaps) - gaps[:1]  # arrivals expected so far, at one per second
        times = units / rate
        if self.spike is not None:
            # within the spike time runs `factor` times as fast, so that as many more fit
            start, length, factor = self.spike.start, self.spike.seconds, self.spike.factor
            inside = np.clip(times - start, 0, length * factor)
            times = times - inside + inside / factor
        return [float(t) for t in times]
