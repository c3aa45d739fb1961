"""Where the engine reads the time, so that a simulator can run the same classes."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds on a monotonic scale."""
        ...


class WallClock:
    """Real time, on the scale that all processes of a machine share."""

    def now(self) -> float:
        return time.monotonic()


class VirtualClock:
    """Time that passes only when told to."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError("time does not run backwards")
        self._now += seconds
