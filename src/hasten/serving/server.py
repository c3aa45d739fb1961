"""Running the server: engine process first, then the HTTP side; signals, draining, status lines."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from hasten.serving.config import Effective
from hasten.serving.engine_client import EngineClient, EngineStopped
from hasten.stack import with_weights

logger = logging.getLogger("hasten.serving")

STATUS_SECONDS = 5.0
BACKLOG = 2048
DEATH_SECONDS = 10.0
"""After the engine's death the server answers 503 for so long, so that probes and clients hear
why, and then exits."""


def run(effective: Effective) -> int:
    """Serve until a signal or the engine's end; returns the exit status.

    0 after a drain in which every request finished; 1 if the engine failed, if requests were cut
    off, or if a second signal came.
    """
    config = effective.config
    set_up_logs(config.log_format)
    config.keys()  # what is wrong is told before anything starts
    if config.request_log is not None:
        open(config.request_log, "ab").close()
    listener = bind(config.host, config.port)
    # The engine's imports and its model take longest: they start before this process's own.
    engine = EngineClient(
        config.model,
        stack=with_weights(config.stack, config.weights),
        max_sequences=config.max_sequences,
        max_batch_tokens=config.max_batch_tokens,
        max_length=config.max_length,
        kv_bytes=config.kv_bytes,
        prefix_reuse=config.prefix_reuse,
        threads=config.threads,
    )
    import uvicorn

    from hasten.serving.app import create_app
    from hasten.serving.protocol import protocol_of
    from hasten.serving.service import Service

    sys.setswitchinterval(0.001)  # threads that tokenize give way to the event loop sooner
    service = Service(effective, engine)
    settings = uvicorn.Config(
        create_app(service),
        http=protocol_of(service),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,  # clients drop idle connections sooner, so that none breaks on use
        backlog=BACKLOG,
        timeout_graceful_shutdown=5,
    )
    with asyncio.Runner(loop_factory=settings.get_loop_factory()) as runner:
        return runner.run(_Running(service, settings, listener).run())


class _Running:
    """One run of the server."""

    def __init__(self, service: Any, settings: Any, listener: socket.socket) -> None:
        import uvicorn

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # signals are ours

        self.service = service
        self.listener = listener
        self.server = Server(settings)
        self.stop = asyncio.Event()
        self.force = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, self._signalled)
        for line in self.service.effective.lines():
            logger.info("setting %s", line)
        serving = asyncio.create_task(self.server.serve(sockets=[self.listener]))
        helpers = [asyncio.create_task(self.service.metrics.watch_loop())]
        try:
            status = await self._serve(helpers)
        finally:
            for task in helpers:
                task.cancel()
            self.server.should_exit = True
            self.server.force_exit = self.force.is_set()
            if self.force.is_set():
                serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.service.close(), 0.5 if self.force.is_set() else None)
        return status

    async def _serve(self, helpers: list[asyncio.Task[None]]) -> int:
        """Load, serve until something ends it, drain."""
        service = self.service
        loading = asyncio.create_task(service.load())
        stopped = asyncio.create_task(self.stop.wait())
        await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            loading.cancel()
            return 0
        try:
            loading.result()
        except (EngineStopped, ValueError, OSError) as error:
            logger.error("%s", error)
            return 1
        gc.collect()
        gc.freeze()  # what is loaded stays: to look through it again would hold the loop up
        self._announce()
        helpers.append(asyncio.create_task(self._status()))
        dead = asyncio.create_task(service.engine.dead.wait())
        await asyncio.wait({stopped, dead}, return_when=asyncio.FIRST_COMPLETED)
        if dead.done():
            logger.error("the engine has stopped: %s", service.engine.why)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), DEATH_SECONDS)
            return 1
        return await self._drain(dead)

    async def _drain(self, dead: asyncio.Task[Any]) -> int:
        """Let what runs finish; nothing new is taken."""
        service, timeout = self.service, self.service.config.drain_timeout
        service.draining = True
        logger.info(
            "shutting down: %d requests may finish within %g s; a second signal stops at once",
            service.admission.open,
            timeout,
        )
        until = time.monotonic() + timeout
        while service.admission.open and time.monotonic() < until:
            if self.force.is_set() or dead.done():
                break
            await asyncio.sleep(0.02)
        cut = service.admission.open
        if cut:
            logger.warning("%d requests are cut off", cut)
            service.cut_all(service.away("the server has shut down", "shutdown"))
            await asyncio.sleep(0.1)
        else:
            logger.info("all requests have finished")
        return 1 if cut or self.force.is_set() else 0

    def _signalled(self) -> None:
        if self.stop.is_set():
            self.force.set()
        self.stop.set()

    def _announce(self) -> None:
        config, facts = self.service.config, self.service.engine.facts
        host, port = self.listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        logger.info(
            "ready at http://%s:%d, model %s (%s), stack %s, context %d, %d sequences, %d pages of "
            "%d tokens, loaded in %.1f s%s",
            shown,
            port,
            ", ".join(config.names),
            facts.architecture,
            facts.stack or "plain",
            facts.max_length,
            facts.max_sequences,
            facts.pages,
            facts.page_size,
            facts.load_seconds,
            "" if self.service.keys else ", no API key",
        )

    async def _status(self) -> None:
        """One line every few seconds while there is work."""
        engine = self.service.engine
        before, hung = engine.snapshot, 0
        while not engine.dead.is_set():
            await asyncio.sleep(STATUS_SECONDS)
            if self.service.stalled:
                logger.warning("no progress of the engine for %.0f seconds", engine.stalled)
                hung += 1  # once may mean that both processes were stopped, as by Ctrl-Z
                if hung > 1 and engine.stalled > (limit := self.service.config.hang_limit):
                    engine.kill(f"it hung for more than hang_limit={limit:g} seconds")
                continue
            hung = 0
            now = engine.snapshot
            tokens, seconds = now.tokens - before.tokens, now.time - before.time
            before = now
            if tokens or now.running or now.waiting:
                logger.info(
                    "running %d, waiting %d, pages %.1f %%, %.1f tokens/s",
                    now.running,
                    now.waiting + self.service.admission.preparing,
                    100 * now.pages_used / max(1, now.pages),
                    tokens / seconds if seconds > 0 else 0.0,
                )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError with the address in its text."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
        listener.bind(address)
        listener.listen(BACKLOG)  # now, so that a second server on this port is told at once
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
        ) from error
    listener.set_inheritable(False)
    return listener


def set_up_logs(kind: str) -> None:
    """Log lines on standard error: ours from INFO on, those of libraries from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if kind == "json" else _Text())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("hasten").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # each malformed request warns


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
