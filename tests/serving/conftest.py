"""One engine process for all tests of the server that do not end it."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import uvicorn

from hasten.serving.app import create_app
from hasten.serving.config import Effective, ServeConfig
from hasten.serving.engine_client import EngineClient
from hasten.serving.protocol import protocol_of
from hasten.serving.server import bind
from hasten.serving.service import Service

SIZES: dict[str, Any] = {"max_sequences": 32, "max_length": 512, "kv_bytes": 48 << 20}
"""Enough for these tests, and quick to clear."""

T = TypeVar("T")


class Loop:
    """An event loop in a thread of its own: clients belong to one loop, tests come and go."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], seconds: float = 60) -> T:
        """The result of a coroutine; hanging is a failure."""
        bounded = asyncio.wait_for(work, seconds)
        return asyncio.run_coroutine_threadsafe(bounded, self.loop).result()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def engine_client(loop: Loop) -> Iterator[EngineClient]:
    """The reference model in an engine process; started in the main thread, used in ``loop``."""
    client = EngineClient("reference", **SIZES)
    loop.run(client.start())
    yield client
    loop.run(client.close())


@pytest.fixture
def own_engine(loop: Loop) -> Iterator[Callable[..., EngineClient]]:
    """Start engines that a test may end; what is left of them is closed after it."""
    started: list[EngineClient] = []

    def start(model: str = "reference", **sizes: Any) -> EngineClient:
        started.append(EngineClient(model, **{**SIZES, **sizes}))
        return started[-1]

    yield start
    for client in started:
        loop.run(client.close())


# ---- HTTP servers --------------------------------------------------------------------------------


class SharedEngine:
    """One engine process behind several servers: their ids must differ, and none may close it."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.name = f"s{next(_NUMBERS)}-"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    async def start(self) -> Any:
        return self.client.facts

    def stream(self, *args: Any, request_id: str, **options: Any) -> Any:
        return self.client.stream(*args, request_id=self.name + request_id, **options)

    async def close(self) -> None:
        """Stays open for the others."""


_NUMBERS = itertools.count()


class Live:
    """A server on a free port, in the tests' loop."""

    def __init__(self, loop: Loop, engine: Any, **settings: Any) -> None:
        self.loop = loop
        settings = {"port": 0, **settings}
        self.service = Service(Effective(ServeConfig(**settings), {}), engine)
        self.app = create_app(self.service)
        listener = bind("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self.app,
            http=protocol_of(self.service),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
        )
        self.server = uvicorn.Server(config)
        self.server.config.load()

        async def start() -> None:
            await self.service.load()
            self._task = asyncio.create_task(self.server.serve(sockets=[listener]))
            while not self.server.started:
                await asyncio.sleep(0.01)

        loop.run(start())
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def close(self) -> None:
        async def stop() -> None:
            self.server.should_exit = self.server.force_exit = True
            await self._task
            await self.service.close()

        self.http.close()
        self.loop.run(stop())

    def idle(self) -> None:
        """Wait until the engine holds nothing for anybody."""

        async def wait() -> None:
            while (snapshot := self.service.engine.snapshot).running or snapshot.waiting:
                await asyncio.sleep(0.02)

        self.loop.run(wait(), 20)


@pytest.fixture(scope="session")
def live(loop: Loop, engine_client: EngineClient) -> Iterator[Live]:
    """A server with the default settings."""
    server = Live(loop, SharedEngine(engine_client))
    yield server
    server.close()


@pytest.fixture
def serve(loop: Loop, engine_client: EngineClient) -> Iterator[Callable[..., Live]]:
    """Start servers with other settings; closed after the test."""
    started: list[Live] = []

    def start(engine: Any = None, **settings: Any) -> Live:
        started.append(Live(loop, engine or SharedEngine(engine_client), **settings))
        return started[-1]

    yield start
    for server in started:
        server.close()


class Command:
    """``hasten serve`` as a process of its own."""

    def __init__(self, folder: Path, *options: str, environment: dict[str, str] | None = None):
        self.log_path = folder / "serve.log"
        command = [sys.executable, "-m", "hasten", "serve", "--port", "0", "--kv-bytes", "48M"]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *options], stderr=log, env={**os.environ, **(environment or {})}
            )
        found = self.wait_for(r"ready at (http://\S+?),")
        self.url = found[1]
        self.http = httpx.Client(base_url=self.url, timeout=60)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Wait until a line of the log matches."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if found := re.search(pattern, self.log):
                return found
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        self.process.kill()
        raise AssertionError(f"{pattern!r} is not in the log:\n{self.log}")

    def resident(self) -> int:
        """Bytes of memory of the HTTP process."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
