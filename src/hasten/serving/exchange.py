"""One generation request over HTTP, from its first byte to its last: read, prepare, admit, run,
answer. A client that goes away ends it at any point."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from hasten.decoding.params import SamplingParams
from hasten.serving.admission import Space, Ticket
from hasten.serving.engine_client import EngineStopped, RequestRefused
from hasten.serving.errors import ApiError, internal, invalid
from hasten.serving.events import RequestRecord
from hasten.serving.messages import Piece
from hasten.serving.openai_responses import DONE, PING, event
from hasten.serving.service import Body, Service, clean_id

logger = logging.getLogger(__name__)

SILENCE = 15.0
"""Seconds without an event after which a stream gets a comment."""
BODY_SECONDS = 60.0
"""A body must come at least this fast, whole."""


class Writer(Protocol):
    """Turns pieces into an answer. For a stream, what it returns is sent as it comes."""

    def events(self, prompt: int, piece: Piece) -> bytes:
        """Events of a piece of a stream; may be empty. The first ones open the stream."""
        ...

    def closing(self) -> bytes:
        """Events after the last piece, such as the usage."""
        ...

    def collect(self, prompt: int, piece: Piece) -> None:
        """Add a piece to the whole answer."""
        ...

    def whole(self) -> bytes:
        """The JSON of the whole answer."""
        ...


class Job:
    """A request that was found good: what the engine is to run, and how the answer is written.

    Attributes:
        writer: makes the `Writer`, given the id of the answer and its time in seconds since 1970.
        ignored: names of fields that nobody knows.
        structure: the field that says what the text must be, if one does.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        writer: Callable[[str, int], Writer],
        *,
        stream: bool,
        prefix: str,
        request_id: str | None,
        cache_salt: str | None,
        priority: int | None,
        ignored: list[str],
        embed: bool = False,
        structure: str | None = None,
    ) -> None:
        self.prompts = prompts
        self.params = params
        self.writer = writer
        self.stream = stream
        self.id = f"{prefix}-{clean_id(request_id) or secrets.token_hex(12)}"
        self.cache_salt = cache_salt
        self.priority = max(-(2**31), min(2**31 - 1, priority or 0))
        self.ignored = ignored
        self.embed = embed
        self.structure = structure


class ClientGone(Exception):
    """The client closed its connection."""


class Exchange(Response):
    """The answer to a generation request; all work happens while it is being sent."""

    def __init__(self, service: Service, route: Any, prepare: Callable[[Body], Job]) -> None:
        self.service = service
        self.route = route
        self.prepare = prepare
        self.background = None
        self._started = False
        self._ended = False
        self._last_sent = 0.0
        self._extra: list[tuple[bytes, bytes]] = []
        self._cut: ApiError | None = None
        self._work: asyncio.Task[None] | None = None

    def cut(self, error: ApiError) -> None:
        """End the request now; its client gets the error."""
        self._cut = error
        if self._work is not None:
            self._work.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self.service
        state = scope["state"]
        record = RequestRecord(id=state["request_id"], route=self.route, model=service.name)
        record.arrived = state["arrived"]
        service.exchanges.add(self)
        ticket: Ticket | None = None
        outcome: tuple[Any, int | None, str | None] = ("ok", 200, None)
        try:
            ticket = service.admission.enter()
            job = await self._read(scope, receive, ticket)
            await self._attended(job, record, ticket, state["tenant"], receive, send)
        except ApiError as error:
            outcome = await self._refuse(error, send)
        except ClientGone:
            outcome = ("cancelled", 200 if self._started else 499, "client_disconnected")
        except asyncio.CancelledError:
            outcome = ("cancelled", None, "server_stopped")
            raise
        except Exception:
            logger.exception("request %s failed", record.id)
            outcome = await self._refuse(internal(), send)
        finally:
            service.exchanges.discard(self)
            if ticket is not None:
                ticket.close()
            record.close(*outcome)
            service.recorder.finished(record)

    # ---- reading ------------------------------------------------------------------------------

    async def _read(self, scope: Scope, receive: Receive, ticket: Ticket) -> Job:
        body = await read_body(scope, receive, self.service, ticket.space)
        job = await self.service.aside(self.prepare, body)
        ticket.space.release()
        for name, value in self.service.ignored(job.ignored).items():
            self._extra.append((name.encode(), value.encode()))
        return job

    # ---- running ------------------------------------------------------------------------------

    async def _attended(
        self,
        job: Job,
        record: RequestRecord,
        ticket: Ticket,
        tenant: str,
        receive: Receive,
        send: Send,
    ) -> None:
        """Run a job while its client is there. It was let in: a drain waits for it."""
        if self._cut is not None:
            raise self._cut
        ticket.resize(job.params.n, [len(prompt) for prompt in job.prompts])
        record.stream = job.stream
        record.n = job.params.n
        record.max_tokens = job.params.max_tokens
        record.prompt_tokens = sum(map(len, job.prompts))
        self._work = asyncio.create_task(self._run(job, record, ticket, tenant, send))
        watch = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({self._work, watch}, return_when=asyncio.FIRST_COMPLETED)
            # an answer that is out ends the watch as well
            if not self._work.done() and not self._ended and self._cut is None:
                self._work.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._work
                raise ClientGone
            try:
                await self._work
            except asyncio.CancelledError:
                if self._cut is None:
                    raise
                raise self._cut from None
        finally:
            watch.cancel()
            self._work.cancel()

    async def _run(
        self, job: Job, record: RequestRecord, ticket: Ticket, tenant: str, send: Send
    ) -> None:
        writer = job.writer(job.id, int(record.started))
        salted = f"{tenant}/{job.cache_salt}" if job.cache_salt else tenant
        pinging = asyncio.create_task(self._ping(send)) if job.stream else None
        record.submitted = time.monotonic()
        try:
            async with aclosing(self._pieces(job, salted)) as pieces:
                async for prompt, piece in pieces:
                    record.take(piece, prompt=prompt)
                    ticket.began(prompt, piece.index)
                    if piece.finish_reason == "error":
                        raise _engine_error(piece.error or "", record.id, job.structure)
                    if not job.stream:
                        writer.collect(prompt, piece)
                    elif events := writer.events(prompt, piece):
                        await self._start_stream(send)
                        await self._send_events(send, events)
        except RequestRefused as error:
            if not error.client_error:
                logger.error("request %s: the engine failed to take it: %s", record.id, error)
                raise internal() from None
            at_fault = job.structure if str(error).startswith("structured_outputs") else None
            raise invalid(str(error), at_fault) from None
        except EngineStopped:
            raise self.service.stopped() from None
        finally:
            if pinging is not None:
                pinging.cancel()
        if job.stream:
            await self._start_stream(send)
            await self._send_events(send, writer.closing() + DONE, last=True)
        else:
            await self._send_whole(send, 200, writer.whole())

    async def _pieces(self, job: Job, tenant: str) -> AsyncGenerator[tuple[int, Piece], None]:
        """(prompt, piece) of all prompts of a job, as they come. Ids in the engine are its own."""
        streams = [
            self.service.engine.stream(
                prompt,
                job.params,
                request_id=self.service.next_id(),
                tenant=tenant,
                priority=job.priority,
                embed=job.embed,
            )
            for prompt in job.prompts
        ]
        if len(streams) == 1:
            async with aclosing(streams[0]) as stream:
                async for piece in stream:
                    yield 0, piece
            return
        queue: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue()

        async def feed(number: int) -> None:
            try:
                async with aclosing(streams[number]) as stream:
                    async for piece in stream:
                        queue.put_nowait((number, piece))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(feed(number)) for number in range(len(streams))]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if item is None:
                    left -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # ---- answering ----------------------------------------------------------------------------

    async def _start_stream(self, send: Send) -> None:
        if self._started:
            return
        self._started = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            *self._extra,
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _send_events(self, send: Send, events: bytes, last: bool = False) -> None:
        self._last_sent = time.monotonic()
        self._ended = last
        await send({"type": "http.response.body", "body": events, "more_body": not last})

    async def _ping(self, send: Send) -> None:
        """Break silence with comments, also before the first token."""
        self._last_sent = time.monotonic()
        while True:
            left = self._last_sent + SILENCE - time.monotonic()
            if left > 0:
                await asyncio.sleep(left)
                continue
            await self._start_stream(send)
            await self._send_events(send, PING)

    async def _send_whole(
        self, send: Send, status: int, body: bytes, extra: list[tuple[bytes, bytes]] | None = None
    ) -> None:
        self._started = self._ended = True
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *self._extra,
            *(extra or []),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _refuse(self, error: ApiError, send: Send) -> tuple[Any, int, str | None]:
        """Send an error, in the stream if there is one; returns how the request ended."""
        status, reason = error.status, error.code or "invalid_request"
        if self._ended:  # cut off while the end of its answer was on the way
            status = 200
        elif self._started:
            status = 200
            await self._send_events(send, event(error.body()) + DONE, last=True)
        else:
            await self._send_whole(send, status, error.body(), error.headers())
        if error.status == 429:
            return "rejected", status, reason
        return ("failed" if error.status >= 500 else "refused"), status, reason


async def read_body(scope: Scope, receive: Receive, service: Service, space: Space) -> Body:
    """The JSON of a request, at most as long as the limit says and as there is memory for.

    A web page may send forms and plain text to any address without asking, JSON it may not.
    """
    kind = header(scope, b"content-type") or ""
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send JSON, with the header Content-Type: application/json")
    most = service.config.max_body_bytes
    declared = header(scope, b"content-length") or ""
    size = int(declared) if declared.isdigit() and len(declared) < 19 else 0
    if size > most:
        raise _too_large(most)
    space.reserve(size)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message: Message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > most:
                    raise _too_large(most)
                space.reserve(len(body))
                if not message.get("more_body", False):
                    return body
    except TimeoutError:
        raise ApiError(
            408, f"the body did not come within {BODY_SECONDS:g} seconds", code="body_timeout"
        ) from None


def header(scope: Scope, wanted: bytes) -> str | None:
    for name, value in scope["headers"]:
        if name == wanted:
            return bytes(value).decode("latin-1")
    return None


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than max_body_bytes={most}", code="body_too_large")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _engine_error(text: str, request_id: str, structure: str | None) -> ApiError:
    """What a piece with an error means: the request leaves nothing to choose, or we failed."""
    if text.startswith("structured_outputs"):
        return invalid(text, structure, "structure_failed")
    if text.startswith("no token can be chosen"):
        return invalid(text, code="no_token_left")
    logger.error("request %s failed in the engine: %s", request_id, text)
    return internal()
