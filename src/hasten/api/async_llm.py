"""The engine in a thread of its own, for servers and other asynchronous programs."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any

from hasten.api.frontend import Frontend
from hasten.api.output import Piece, RequestOutput
from hasten.decoding.params import SamplingParams
from hasten.stack import Stack

logger = logging.getLogger(__name__)


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
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sinks: dict[str, Callable[[Piece | Exception], None]] = {}
        self._failure: Exception | None = None
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

        def submit() -> str:
            request = self._front.submit(
                prompt, params, request_id=request_id, tenant=tenant, priority=priority
            )
            self._sinks[request.id] = sink
            return request.id

        # shielded: if the caller is cancelled here, the request still gets its id to be ended by
        submitted = self._call(submit)
        try:
            name = await asyncio.shield(asyncio.wrap_future(submitted))
        except asyncio.CancelledError:
            submitted.add_done_callback(
                lambda f: None if f.cancelled() or f.exception() else self._forget(f.result())
            )
            raise
        open_outputs = (params or SamplingParams()).n
        try:
            while open_outputs:
                item = await pieces.get()
                if isinstance(item, Exception):
                    raise item
                open_outputs -= item.finish_reason is not None
                yield item
        finally:
            self._forget(name)

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        **options: Any,
    ) -> RequestOutput:
        """The whole output of one request."""
        result: Future[RequestOutput] = Future()
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def submit() -> str:
            request = self._front.submit(prompt, params, **options)

            def sink(item: Piece | Exception) -> None:
                if isinstance(item, Exception):
                    result.set_exception(item)
                elif request.finished and not result.done():
                    result.set_result(self._front.collect(request.id))
                else:
                    return
                self._sinks.pop(request.id, None)
                loop.call_soon_threadsafe(done.set)

            self._sinks[request.id] = sink
            return request.id

        name = await asyncio.wrap_future(self._call(submit))
        try:
            await done.wait()
        except asyncio.CancelledError:
            self._forget(name)
            raise
        return result.result()

    async def close(self) -> None:
        """End all requests and the engine thread."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ---- between threads --------------------------------------------------------------------

    def _call(self, work: Callable[[], Any]) -> Future[Any]:
        """Run ``work`` in the engine thread between two steps."""
        if self._failure is not None or not self._thread.is_alive():
            raise EngineStopped(f"the engine has stopped: {self._failure or 'closed'}")
        future: Future[Any] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)

        self._commands.put(run)
        return future

    def _forget(self, request_id: str) -> None:
        """End a request if it still runs, and drop what is kept about it."""

        def work() -> None:
            self._sinks.pop(request_id, None)
            self._front.abort(request_id)
            self._front.forget(request_id)

        if self._thread.is_alive():
            self._commands.put(work)

    def _run(self) -> None:
        try:
            while self._take_commands():
                for piece in self._front.step():
                    sink = self._sinks.get(piece.request_id)
                    if sink is not None:
                        sink(piece)
        except Exception as error:
            logger.exception("the engine thread failed")
            self._failure = error
        finally:
            stopped = EngineStopped(f"the engine has stopped: {self._failure or 'closed'}")
            for sink in list(self._sinks.values()):
                sink(stopped)

    def _take_commands(self) -> bool:
        """Run queued commands; wait for one while there is no work. False = close."""
        while True:
            try:
                command = self._commands.get(block=not self._front.engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
