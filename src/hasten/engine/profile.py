"""Where the time of an engine's steps goes, by operation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hasten import _native


@dataclass(slots=True)
class Operation:
    """Sums over the calls of one operation; ``bytes`` of weights, keys and values were read."""

    calls: int = 0
    seconds: float = 0.0
    bytes: int = 0


@dataclass(slots=True)
class Steps:
    """Sums over some steps.

    Attributes:
        count: steps.
        recorded: of them, those whose forward pass was one native call.
        rows: rows in all of them.
        kv_bytes: keys and values that they had to read (decode steps).
        seconds: within the steps.
        between: from the end of each to the beginning of the next, where one followed.
        operations: native operations by name; what is left of ``seconds`` is Python.
    """

    count: int = 0
    recorded: int = 0
    rows: int = 0
    kv_bytes: int = 0
    seconds: float = 0.0
    between: float = 0.0
    operations: dict[str, Operation] = field(default_factory=dict)

    @property
    def native_seconds(self) -> float:
        return sum(operation.seconds for operation in self.operations.values())


class Profile:
    """Decode steps and all others, apart. An engine that has one tells it about each step."""

    def __init__(self) -> None:
        self.decode = Steps()
        self.other = Steps()
        self._last: tuple[Steps, float] | None = None

    def begin_step(self) -> float:
        """A step begins now; the time since the last one was somebody else's."""
        now = time.perf_counter()
        if self._last is not None:
            steps, ended = self._last
            steps.between += now - ended
            self._last = None
        _native.take_profile()
        return now

    def end_step(
        self, began: float, *, decode: bool, recorded: bool, rows: int, kv_bytes: int
    ) -> None:
        now = time.perf_counter()
        steps = self.decode if decode else self.other
        steps.count += 1
        steps.recorded += recorded
        steps.rows += rows
        steps.kv_bytes += kv_bytes
        steps.seconds += now - began
        for name, (calls, seconds, nbytes) in _native.take_profile().items():
            operation = steps.operations.setdefault(name, Operation())
            operation.calls += calls
            operation.seconds += seconds
            operation.bytes += nbytes
        self._last = steps, time.perf_counter()


@contextmanager
def profiling() -> Iterator[Profile]:
    """Native operations are timed inside of the block, in the whole process."""
    _native.set_profiling(True)
    try:
        yield Profile()
    finally:
        _native.set_profiling(False)
        _native.take_profile()
