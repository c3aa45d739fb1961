"""Send requests at their times, whatever the server does, and note what comes back when.

Open loop: an arrival never waits for another request's completion, and latency counts from the
intended arrival even where the generator was late. So a server that stalls is charged for all that
arrived meanwhile ("coordinated omission" would leave them out), and a generator that cannot keep up
does not flatter the server: how late it was is part of the result.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from hasten.bench.serving.http import ConnectionFailed, HttpClient, Response
from hasten.bench.serving.stream import StreamBroken, Timeline, error_text

ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True)
class Planned:
    """A request to send: seconds after the start, its prompt, and the lengths that are wanted."""

    at: float
    prompt: list[int] | str
    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Outcome:
    """What became of a request. All times are `time.monotonic` seconds.

    Attributes:
        arrived: the intended arrival: what latency is counted from.
        due: when it was to be sent: ``arrived``, or later where it waited for a free place under
            a limit of concurrency.
        sent, ended: when it was sent, and when its answer was complete or given up.
        error: None, or the kind of failure: "http 429", "connection", "timeout", "stream error",
            "cut off", "bad stream", "unfinished" (the run ended first).
    """

    number: int
    planned: Planned
    arrived: float
    due: float = 0.0
    sent: float | None = None
    ended: float | None = None
    timeline: Timeline = field(default_factory=Timeline)
    status: int | None = None
    error: str | None = "unfinished"
    message: str = ""

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def rejected(self) -> bool:
        return self.status == 429


class Target:
    """A server's completion or chat endpoint, with the fields that force an output's length.

    ``extra`` is merged into every request; a null there removes a field, for servers that refuse
    what they do not know.
    """

    def __init__(
        self,
        client: HttpClient,
        endpoint: str,
        model: str,
        extra: dict[str, Any] | None = None,
        timeout: float = 600.0,
    ) -> None:
        if endpoint not in ENDPOINTS:
            raise ValueError(f"no endpoint '{endpoint}': {', '.join(ENDPOINTS)}")
        self.client = client
        self.endpoint = endpoint
        self.model = model
        self.timeout = timeout
        self._extra = extra or {}

    def encode(self, planned: Planned) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": planned.output_tokens,
            "min_tokens": planned.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        if self.endpoint == "chat":
            if not isinstance(planned.prompt, str):
                raise ValueError("the chat endpoint takes text: use --prompts text")
            body["messages"] = [{"role": "user", "content": planned.prompt}]
        else:
            body["prompt"] = planned.prompt
        body |= self._extra
        kept = {key: value for key, value in body.items() if value is not None}
        return self.client.encode("POST", ENDPOINTS[self.endpoint], msgspec.json.encode(kept))

    async def run(self, outcome: Outcome, data: bytes) -> None:
        """Send one request and fill in its outcome. Failures are outcomes: nothing is raised."""
        outcome.sent = time.monotonic()
        timeline = outcome.timeline
        try:
            async with asyncio.timeout(self.timeout):
                response = await self.client.send(data, timeline.feed)
            outcome.status = response.status
            if response.status == 200:
                timeline.close()
                outcome.error = None
            else:
                outcome.error = f"http {response.status}"
                outcome.message = _body_text(response)
            outcome.ended = response.ended
            return
        except StreamBroken as error:
            outcome.status = 200
            outcome.error, outcome.message = error.kind, str(error)
        except ConnectionFailed as error:
            outcome.error, outcome.message = "connection", str(error)
        except TimeoutError:
            outcome.error = "timeout"
            outcome.message = f"no complete answer within {self.timeout:g} s"
        outcome.ended = time.monotonic()


def _body_text(response: Response) -> str:
    try:
        return error_text(json.loads(response.body))
    except (ValueError, RecursionError):
        return response.body[:200].decode("utf-8", "replace")


async def run_load(
    target: Target,
    plan: Iterable[Planned],
    *,
    max_concurrency: int | None = None,
    closed_loop: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
    watch: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run a plan to its end (the drain included) and return one outcome per request sent.

    Args:
        max_concurrency: requests in flight at most. A request that waits for a place keeps its
            intended arrival.
        closed_loop: ignore the plan's times: a request arrives when there is a place for it.
        interrupted: asked every 50 ms; once true, nothing more is sent and what is in flight is
            given up, as "unfinished".
        watch: shown the outcomes so far, as often.
    """
    outcomes: list[Outcome] = []
    tasks: set[asyncio.Task[None]] = set()
    places = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    over = asyncio.Event()

    async def one(outcome: Outcome, data: bytes) -> None:
        try:
            if places is not None and not closed_loop:
                await places.acquire()
                outcome.due = max(outcome.due, time.monotonic())
            await target.run(outcome, data)
        finally:
            if places is not None and (closed_loop or outcome.sent is not None):
                places.release()

    async def dispatch(start: float) -> None:
        for number, planned in enumerate(plan):
            data = target.encode(planned)  # before its time comes
            if closed_loop:
                if places is not None:
                    await places.acquire()
                arrived = time.monotonic()
            else:
                arrived = start + planned.at
                # also where it is late already: others must get their turn
                await asyncio.sleep(max(0.0, arrived - time.monotonic()))
            outcome = Outcome(number, planned, arrived, due=arrived)
            outcomes.append(outcome)
            task = asyncio.create_task(one(outcome, data))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def look() -> None:
        while not over.is_set():
            watch(outcomes)
            if interrupted():
                dispatcher.cancel()
                for task in list(tasks):
                    task.cancel()
            await asyncio.sleep(0.05)

    with _no_collections():
        dispatcher = asyncio.create_task(dispatch(time.monotonic()))
        looker = asyncio.create_task(look())
        try:
            await asyncio.wait([dispatcher])
            if not dispatcher.cancelled():
                dispatcher.result()
            while tasks:
                await asyncio.wait(set(tasks))
        finally:
            over.set()
            dispatcher.cancel()
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(looker, *tasks, return_exceptions=True)
    watch(outcomes)
    return outcomes


@contextmanager
def _no_collections() -> Iterator[None]:
    """A full garbage collection over thousands of prompts stalls the generator for a while."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
