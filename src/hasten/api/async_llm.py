"""The engine in a thread of its own, for servers and other asynchronous programs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

from hasten.api.frontend import Frontend
from hasten.api.output import Piece, RequestOutput
from hasten.decoding.params import SamplingParams
from hasten.stack import Stack

logger = logging.getLogger(__name__)


ENCODE_AT_ONCE = 2_000
"""Characters up to which a prompt is tokenized in the event loop (some 100 us); a longer one goes
to a thread of its own, and none keeps the engine waiting."""

Sink = Callable[[Piece | Exception], None]
Command = tuple[Future[Any], Callable[[], Any]]


class EngineStopped(RuntimeError):
    """The engine thread has ended; the text says why."""


class AsyncLLM:
    """Many concurrent requests over one engine.

    All methods are coroutines or safe from any thread. A consumer that goes away (a cancelled
    task, a generator that is closed) ends its request. Use ``async with`` or ``close()``.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "reference",
        *,
        stack: str | dict[str, Any] | Stack | None = None,
        **sizes: Any,
    ) -> None:
        """Load the model in the calling thread; ``sizes`` as for ``LLM``."""
        self._front = Frontend(model, stack=stack, **sizes)
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._ending = threading.Lock()
        """Held while a command is queued: none can slip in after the last was answered."""
        self._stopped: str | None = None
        """Why no command is taken any more."""
        self._thread = threading.Thread(target=self._run, name="hasten-engine", daemon=True)
        self._thread.start()

    @property
    def tokenizer(self) -> Any:
        return self._front.tokenizer

    async def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        tenant: str = "",
        priority: int = 0,
    ) -> AsyncIterator[Piece]:
        """Pieces of one request as they come, from all of its ``n`` outputs.

        Raises:
            RequestRefused: it can never run.
            EngineStopped: the engine ended while it ran.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()

        def sink(item: Piece | Exception) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, item)

        options = {"request_id": request_id, "tenant": tenant, "priority": priority}
        async with self._submitted(sink, prompt, params, options):
            open_outputs = 1 if params is None else params.n
            while open_outputs:
                item = await pieces.get()
                if isinstance(item, Exception):
                    raise item
                open_outputs -= item.finish_reason is not None
                yield item

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        tenant: str = "",
        priority: int = 0,
    ) -> RequestOutput:
        """The whole output of one request; raises as ``stream`` does."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[RequestOutput] = loop.create_future()
        open_outputs = 1 if params is None else params.n

        def settle(outcome: RequestOutput | Exception) -> None:
            if result.done():  # the caller was cancelled in the meantime
                return
            if isinstance(outcome, Exception):
                result.set_exception(outcome)
            else:
                result.set_result(outcome)

        def sink(item: Piece | Exception) -> None:
            nonlocal open_outputs
            if isinstance(item, Exception):
                loop.call_soon_threadsafe(settle, item)
                return
            open_outputs -= item.finish_reason is not None
            if not open_outputs:
                loop.call_soon_threadsafe(settle, self._front.collect(item.request_id))

        options = {"request_id": request_id, "tenant": tenant, "priority": priority}
        async with self._submitted(sink, prompt, params, options):
            output = await result
        output.prompt = prompt if isinstance(prompt, str) else None
        return output

    async def close(self) -> None:
        """End the engine thread. Requests that still run raise ``EngineStopped``."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ---- between threads --------------------------------------------------------------------

    @asynccontextmanager
    async def _submitted(
        self,
        sink: Sink,
        prompt: str | Sequence[int],
        params: SamplingParams | None,
        options: dict[str, Any],
    ) -> AsyncIterator[None]:
        """A request that runs inside the block and is ended with it. ``sink`` is called in the
        engine thread."""
        ids = await self._encode(prompt) if isinstance(prompt, str) else prompt
        if params is not None and not self._front.is_prepared(params):
            await asyncio.to_thread(self._front.prepare, params)

        def submit() -> str:
            request = self._front.submit(ids, params, **options)
            self._sinks[request.id] = sink
            return request.id

        # shielded: if the caller is cancelled here, the request still gets its id to be ended by
        submitted = self._call(submit)
        try:
            name = await asyncio.shield(asyncio.wrap_future(submitted))
        except asyncio.CancelledError:
            submitted.add_done_callback(
                lambda f: None if f.cancelled() or f.exception() else self._forget(f.result(), sink)
            )
            raise
        try:
            yield
        finally:
            self._forget(name, sink)

    async def _encode(self, text: str) -> list[int]:
        encode = self._front.tokenizer.encode
        if len(text) <= ENCODE_AT_ONCE:
            return encode(text)
        return await asyncio.to_thread(encode, text)

    def _call(self, work: Callable[[], Any]) -> Future[Any]:
        """Run ``work`` in the engine thread between two steps."""
        future: Future[Any] = Future()
        with self._ending:
            if self._stopped is not None:
                raise EngineStopped(self._stopped)
            self._commands.put((future, work))
        return future

    def _forget(self, request_id: str, sink: Sink) -> None:
        """End a request if it still runs, and drop what is kept about it. Another request may
        have taken the id in the meantime: it has another sink."""

        def work() -> None:
            if self._sinks.get(request_id) is sink:
                del self._sinks[request_id]
                self._front.discard(request_id)

        with contextlib.suppress(EngineStopped):
            self._call(work)

    def _run(self) -> None:
        reason = "it was closed"
        try:
            while self._take_commands():
                for piece in self._front.step():
                    self._deliver(piece.request_id, piece)
        except Exception as error:
            logger.exception("the engine thread failed")
            reason = f"{type(error).__name__}: {error}"
        finally:
            self._stop(f"the engine has stopped: {reason}")

    def _take_commands(self) -> bool:
        """Run queued commands; wait for one while there is no work. False = close."""
        while True:
            try:
                command = self._commands.get(block=not self._front.engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            future, work = command
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)

    def _deliver(self, request_id: str, item: Piece | Exception) -> None:
        sink = self._sinks.get(request_id)
        if sink is None:
            return
        try:
            sink(item)
        except RuntimeError:  # its event loop is closed: nobody waits any more
            del self._sinks[request_id]
            self._front.discard(request_id)

    def _stop(self, why: str) -> None:
        """Tell everybody who waits, now or later, and give the pages back."""
        with self._ending:
            self._stopped = why
        for request_id in list(self._sinks):
            self._deliver(request_id, EngineStopped(why))
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None and command[0].set_running_or_notify_cancel():
                command[0].set_exception(EngineStopped(why))
        for request_id in list(self._sinks):
            self._front.discard(request_id)
        self._sinks.clear()
