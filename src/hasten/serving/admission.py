"""Who gets in: a bounded queue in front of the engine.

What waits is counted in sequences and in prompt tokens, from arrival until the first token. A
request that finds the queue full is told so at once, before its body is read, with the time after
which there should be room. Bodies that are being read are bounded by their bytes.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from hasten.serving.errors import ApiError

WINDOW = 10.0
"""Seconds over which the rate of starts is measured."""
MAX_RETRY = 60
BODIES = 4
"""Bodies of the largest size that may be in memory at the same time."""


class Admission:
    """Counts of what waits and what is under way. Used from the event loop only."""

    def __init__(
        self,
        max_requests: int,
        max_body_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_requests = max_requests
        self.max_tokens = math.inf
        """Set once the model is known."""
        self.max_bytes = BODIES * max_body_bytes
        self.waiting = 0
        self.tokens = 0
        self.bytes = 0
        self.open = 0
        """Requests under way, from admission to the end of their answer."""
        self.preparing = 0
        """Of these, not yet handed to the engine."""
        self._clock = clock
        self._arrivals: dict[int, float] = {}
        self._number = 0
        self._starts: deque[tuple[float, int]] = deque()

    @property
    def crowded(self) -> bool:
        """Whether nothing more can wait."""
        return self.waiting >= self.max_requests or self.tokens >= self.max_tokens

    def check_room(self) -> None:
        """Raises ApiError (429) if nothing more can wait."""
        if self.waiting >= self.max_requests:
            raise self.full(
                f"{self.waiting} sequences wait already (max_queued_requests="
                f"{self.max_requests}); try again later"
            )
        if self.tokens >= self.max_tokens:
            raise self.full(
                f"{self.tokens} prompt tokens wait already (max_queued_tokens="
                f"{self.max_tokens}); try again later"
            )

    def full(self, why: str) -> ApiError:
        """The refusal of a request for want of room (429)."""
        return ApiError(429, why, code="queue_full", retry_after=self.retry_after())

    def enter(self) -> Ticket:
        """A place for a request whose size is not known yet."""
        self.check_room()
        return Ticket(self)

    @property
    def oldest(self) -> float | None:
        """When the request that waits longest came, on the admission's clock."""
        return next(iter(self._arrivals.values()), None)

    def retry_after(self) -> int:
        """Seconds after which a place should be free, at the rate of the last seconds."""
        now = self._clock()
        while self._starts and self._starts[0][0] < now - WINDOW:
            self._starts.popleft()
        started = sum(count for _, count in self._starts)
        if not started:
            return int(WINDOW)
        rate = started / max(1.0, now - self._starts[0][0])
        # Room for one is there soon; the queue turns over in waiting / rate. In between lies when
        # a client that comes back will find room without all of them coming at the same time.
        return min(MAX_RETRY, max(1, math.ceil(self.waiting / rate / 2)))

    # ---- called by tickets --------------------------------------------------------------------

    def _arrive(self) -> int:
        self._number += 1
        self._arrivals[self._number] = self._clock()
        self.open += 1
        self.preparing += 1
        return self._number

    def _started(self, count: int) -> None:
        self._starts.append((self._clock(), count))
        if len(self._starts) > 4096:
            self._starts.popleft()


class Space:
    """Memory for one body while it is read and decoded."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._bytes = 0

    def reserve(self, count: int) -> None:
        """Have room for a body of so many bytes. Raises ApiError (429) if there is none."""
        more = count - self._bytes
        if more <= 0:
            return
        if self._admission.bytes + more > self._admission.max_bytes:
            raise self._admission.full("too many large requests at the same time")
        self._admission.bytes += more
        self._bytes = count

    def release(self) -> None:
        self._admission.bytes -= self._bytes
        self._bytes = 0


class Ticket:
    """The place of one request. Close it when the request ends, however it ends."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._number = admission._arrive()
        self._waiting = 1
        self._tokens = 0
        self.space = Space(admission)
        self._lengths: dict[int, int] = {}
        self._begun: set[tuple[int, int]] = set()
        self._preparing = 1
        self._closed = False
        admission.waiting += 1

    def resize(self, n: int, lengths: list[int]) -> None:
        """What the request needs: ``n`` sequences for each prompt of so many tokens.

        A request alone always has room: it was checked against the limits of one request.
        Raises ApiError (429) if the others leave none.
        """
        admission = self._admission
        count, tokens = n * len(lengths), sum(lengths)
        others = admission.waiting - self._waiting
        if others and others + count > admission.max_requests:
            raise admission.full(
                f"{others} sequences wait already and this request has {count} "
                f"(max_queued_requests={admission.max_requests}); try again later"
            )
        if admission.tokens and admission.tokens + tokens > admission.max_tokens:
            raise admission.full(
                f"{admission.tokens} prompt tokens wait already and this request has {tokens} "
                f"(max_queued_tokens={admission.max_tokens}); try again later"
            )
        admission.waiting += count - self._waiting
        admission.tokens += tokens
        self._waiting, self._tokens = count, tokens
        self._lengths = dict(enumerate(lengths))
        self._prepared()

    def began(self, prompt: int, index: int) -> None:
        """Something came of one output: it waits no more."""
        key = (prompt, index)
        if key in self._begun:
            return
        self._begun.add(key)
        admission = self._admission
        self._waiting -= 1
        admission.waiting -= 1
        admission._started(1)
        length = self._lengths.pop(prompt, 0)
        self._tokens -= length
        admission.tokens -= length
        if not self._waiting:
            admission._arrivals.pop(self._number, None)

    def _prepared(self) -> None:
        self._admission.preparing -= self._preparing
        self._preparing = 0

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        admission = self._admission
        if self._waiting and self._lengths:
            admission._started(self._waiting)  # cancelled while it waited: room all the same
        admission._arrivals.pop(self._number, None)
        admission.waiting -= self._waiting
        admission.tokens -= self._tokens
        admission.open -= 1
        self._prepared()
        self.space.release()
