"""The schedule slot: compose one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from hasten.cache.manager import CacheManager
from hasten.engine.request import Sequence


@dataclass(slots=True)
class Grant:
    """``rows`` known tokens of a sequence are computed in this step; pages are reserved."""

    sequence: Sequence
    rows: int

    @property
    def reaches_end(self) -> bool:
        """Whether the step computes the last known token, so that a new one can be chosen."""
        return self.rows == self.sequence.stream.behind


@dataclass(slots=True)
class Plan:
    """What a step does. The engine moves the sequences between its queues accordingly."""

    grants: list[Grant] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    rows: int = 0


class Scheduler(Protocol):
    """Composes steps under a token budget."""

    def plan(
        self,
        waiting: list[Sequence],
        running: list[Sequence],
        cache: CacheManager,
        budget: int,
    ) -> Plan:
        """
        Args:
            waiting: in order of rank; sequences without pages.
            running: in order of rank; sequences with pages.
            cache: reserves, attaches and releases pages. The queues are only read.
            budget: rows that the step may have.

        It must not raise: there is no step yet whose sequences could be blamed for it.
        """
        ...
