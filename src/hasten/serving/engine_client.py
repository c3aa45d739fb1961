"""The HTTP process's side of the engine process: starts it, talks to it, notices its end.

Never imports torch. All of it belongs to one event loop, the one in which ``start`` ran.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from hasten.decoding.params import SamplingParams
from hasten.serving.frames import HEADER, framed, length
from hasten.serving.messages import (
    Abort,
    Command,
    EngineFacts,
    Failed,
    Piece,
    Ping,
    Report,
    Snapshot,
    Step,
    Stop,
    Submit,
)

READ_AHEAD = 1 << 20
"""Bytes that are read ahead of what is decoded; beyond twice that the engine has to wait."""
PING_SECONDS = 1.0
EXIT_SECONDS = 1.0
"""How long an engine that has closed its end may take to be gone."""
STOP_SECONDS = 5.0
"""How long it may take to end the step it is in when it is told to stop."""


class EngineStopped(RuntimeError):
    """The engine process has ended; the text says why."""


class RequestRefused(ValueError):
    """A request that can never run; the text says why.

    ``client_error`` is False where the engine is at fault, not the request.
    """

    def __init__(self, message: str, client_error: bool = True) -> None:
        super().__init__(message)
        self.client_error = client_error


class EngineClient:
    """One engine process.

    Attributes:
        facts: what it has loaded; from ``start`` on.
        snapshot: the engine after its last step or ping; from ``start`` on.
        dead: set when the process has ended, for whatever reason.
    """

    facts: EngineFacts
    snapshot: Snapshot

    def __init__(
        self,
        model: str,
        *,
        stack: str | None = None,
        max_sequences: int = 64,
        max_batch_tokens: int | None = None,
        max_length: int | None = None,
        kv_bytes: int | None = None,
        prefix_reuse: bool = True,
        threads: int | None = None,
    ) -> None:
        """Start the process and return at once; sizes as for ``LLM``.

        The process ends with the thread that calls this (Linux ties a child to the thread that
        started it), so call it from one that lives as long as the engine is wanted.
        """
        self._socket, theirs = socket.socketpair()
        settings = {
            "fd": theirs.fileno(),
            "parent": os.getpid(),
            "model": model,
            "stack": stack,
            "max_sequences": max_sequences,
            "max_batch_tokens": max_batch_tokens,
            "max_length": max_length,
            "kv_bytes": kv_bytes,
            "prefix_reuse": prefix_reuse,
            "threads": threads,
        }
        command = [
            sys.executable,
            "-P",  # a file torch.py in the current folder is not torch
            "-m",
            "hasten.serving.engine_process",
            msgspec.json.encode(settings).decode(),
        ]
        # Ctrl-C reaches the whole terminal group; the child is deaf to it from its first moment
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),)
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
            theirs.close()
        self.dead = asyncio.Event()
        self._why = ""  # of its end, once that is known
        self._progress: float | None = None
        self._pinged = self._answered = 0
        # What waits here is bounded by what its request may generate (max_tokens * n).
        self._queues: dict[str, asyncio.Queue[Piece | Exception]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Report).decode

    async def start(self) -> EngineFacts:
        """Wait until the model is loaded.

        Raises:
            EngineStopped: it could not be; with the engine's reason.
        """
        self._reader, self._writer = await asyncio.open_connection(
            sock=self._socket, limit=READ_AHEAD
        )
        try:
            facts = await self._receive()
            if isinstance(facts, Failed):
                self._why = facts.message
                raise EngineStopped(facts.message)
            assert isinstance(facts, EngineFacts)
            first = await self._receive()
            assert isinstance(first, Step)
        except Exception as error:
            await self._end(error)
            raise EngineStopped(self._why) from None
        self.facts, self.snapshot = facts, first.snapshot
        self._progress = time.monotonic()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._ping())]
        return facts

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the engine has loaded and runs."""
        return self._progress is not None and not self.dead.is_set()

    @property
    def why(self) -> str:
        """Why the process has ended; empty while it lives."""
        return self._why

    @property
    def stalled(self) -> float:
        """Seconds since the last proof of progress: a step, or the answer to a ping. Pings are
        sent every second, so that it stays near one second unless a step takes long or hangs."""
        return 0.0 if self._progress is None else time.monotonic() - self._progress

    async def stream(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        tenant: str = "",
        priority: int = 0,
        embed: bool = False,
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of one request as they come, from all of its ``n`` outputs.

        Closing or cancelling it ends the request in the engine. An id is not used twice: pieces of
        a request that was closed may still be on their way.

        Raises:
            RequestRefused: it can never run.
            EngineStopped: the engine has ended.
        """
        if self._why:
            raise EngineStopped(self._why)
        if request_id in self._queues:
            raise RequestRefused(f"request id '{request_id}' is in use")
        submit = self._frame(Submit(request_id, prompt, params, tenant, priority, embed))
        queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._queues[request_id] = queue
        open_outputs = 1 if embed else params.n
        try:
            await self._send(submit)
            while open_outputs:
                item = await queue.get()
                if isinstance(item, Exception):
                    open_outputs = 0
                    raise item
                open_outputs -= item.finish_reason is not None
                yield item
        finally:
            del self._queues[request_id]
            if open_outputs:
                self._tell(Abort(request_id))

    def kill(self, why: str) -> None:
        """End a process that does not answer; all who wait for it hear why."""
        self._why = self._why or why
        self._process.kill()

    async def close(self) -> None:
        """Stop the process: it ends its step first, or is killed after some seconds; while it
        loads there is nothing to wait for."""
        self._why = self._why or "the engine was closed"
        self._tell(Stop())
        await self._exited(STOP_SECONDS if self.alive else 0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._mourn()

    # ---- out --------------------------------------------------------------------------------

    def _frame(self, command: Command) -> bytes:
        """Raises ``RequestRefused`` for what the engine could not read: integers beyond 64 bits,
        half characters, more than a message may hold."""
        try:
            return framed(self._encode(command))
        except (ValueError, OverflowError, TypeError) as error:
            raise RequestRefused(f"the request cannot be passed on: {error}") from None

    async def _send(self, frame: bytes) -> None:
        """Send a request; waits while the engine does not come to read."""
        assert self._writer is not None, "start() comes first"
        self._writer.write(frame)
        with contextlib.suppress(OSError):  # the end of the engine is told by the reader
            await self._writer.drain()

    def _tell(self, command: Command) -> None:
        """Send a small command without waiting."""
        if self._writer is not None and not self.dead.is_set():
            self._writer.write(self._frame(command))

    async def _ping(self) -> None:
        while True:
            if self._answered == self._pinged:  # else it would only pile up
                self._pinged += 1
                self._tell(Ping(self._pinged))
            await asyncio.sleep(PING_SECONDS)

    # ---- in ---------------------------------------------------------------------------------

    async def _receive(self) -> Any:
        header = await self._reader.readexactly(HEADER.size)
        return self._decode(await self._reader.readexactly(length(header)))

    async def _read(self) -> None:
        try:
            while True:
                report = await self._receive()
                if isinstance(report, Step):
                    self._take(report)
                elif isinstance(report, Failed):
                    self._why = self._why or report.message
        except Exception as error:
            await self._end(error)

    def _take(self, step: Step) -> None:
        self._progress = time.monotonic()
        self.snapshot = step.snapshot
        if step.answers is not None:
            self._answered = step.answers
        queues = self._queues
        for piece in step.pieces:
            queue = queues.get(piece.request_id)
            if queue is not None:  # else its consumer went away in the meantime
                queue.put_nowait(piece)
        for refused in step.refused:
            queue = queues.get(refused.request_id)
            if queue is not None:
                queue.put_nowait(RequestRefused(refused.message, refused.client_error))

    # ---- the end ----------------------------------------------------------------------------

    async def _end(self, error: Exception) -> None:
        """Its end of the socket is closed, or what came from it cannot be read."""
        closed = isinstance(error, (asyncio.IncompleteReadError, OSError))
        await self._exited(EXIT_SECONDS if closed or self._why else 0)
        if not self._why:
            self._why = (
                _epitaph(self._process.returncode)
                if closed
                else f"what the engine process says cannot be read: {type(error).__name__}: {error}"
            )
        self._mourn()

    async def _exited(self, seconds: float) -> None:
        """Wait for the process, kill it after that time, and reap it."""
        until = time.monotonic() + seconds
        while self._process.poll() is None:
            if time.monotonic() > until:
                self._process.kill()
            await asyncio.sleep(0.01)

    def _mourn(self) -> None:
        """Tell everybody who waits."""
        self.dead.set()
        if self._writer is None:
            self._socket.close()
        else:
            self._writer.close()
        for queue in self._queues.values():
            queue.put_nowait(EngineStopped(self._why))


def _epitaph(status: int) -> str:
    if status >= 0:
        return f"the engine process ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (the system kills what takes too much memory)" if -status == signal.SIGKILL else ""
    return f"the engine process was ended by {name}{hint}"
