"""A server as a child process: start it, wait until it answers, weigh it, stop it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from hasten.bench.serving.http import ConnectionFailed, HttpClient


class ServerFailed(RuntimeError):
    """A server that did not come up; the text has the end of what it printed."""


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def serve_command(model: str, port: int, arguments: Sequence[str] = ()) -> list[str]:
    """``hasten serve`` of this installation, on the loopback interface."""
    fixed = ["--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", "hasten", "serve", model, *fixed, *arguments]


class ServerProcess:
    """A running server.

    Attributes:
        started: `time.monotonic` just before its process was made.
        ready: `time.monotonic` at which it was seen ready.
    """

    def __init__(self, process: subprocess.Popen[bytes], base_url: str, started: float) -> None:
        self.process = process
        self.base_url = base_url
        self.started = started
        self.ready = 0.0

    def rss_bytes(self) -> int:
        """Resident memory of the process and all its descendants, now.

        Pages that several of them share count for each. Needs /proc.
        """
        return sum(_rss(pid) for pid in family(self.process.pid))

    def stop(self, patience: float = 10.0) -> None:
        """SIGTERM, and SIGKILL to its whole process group after ``patience`` seconds."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@asynccontextmanager
async def running(
    command: Sequence[str],
    base_url: str,
    log: Path,
    *,
    ready: str = "/ready",
    patience: float = 120.0,
    poll: float = 0.02,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[ServerProcess]:
    """Start a server, wait until ``ready`` answers 200, stop it at the end.

    Its output goes to ``log``. SIGTERM to this process cancels the task, so that the server is
    stopped then as well.

    Raises:
        ServerFailed: it ended, or was not ready after ``patience`` seconds.
    """
    with log.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=None if environment is None else {**os.environ, **environment},
        )
    server = ServerProcess(process, base_url, started)
    client = HttpClient(base_url)
    request = client.encode("GET", ready)
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    with contextlib.suppress(ValueError, RuntimeError):  # only the main thread can
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        while True:
            with contextlib.suppress(ConnectionFailed, TimeoutError):
                async with asyncio.timeout(5):
                    if (await client.send(request)).status == 200:
                        break
            if process.poll() is not None:
                raise ServerFailed(f"the server ended with status {process.returncode}{_end(log)}")
            if time.monotonic() - started > patience:
                raise ServerFailed(f"the server was not ready after {patience:g} s{_end(log)}")
            await asyncio.sleep(poll)
        server.ready = time.monotonic()
        yield server
    finally:
        with contextlib.suppress(ValueError, RuntimeError):
            loop.remove_signal_handler(signal.SIGTERM)
        client.close()
        server.stop()


def _end(log: Path) -> str:
    """The last lines of what a server printed."""
    with contextlib.suppress(OSError):
        text = log.read_bytes()[-2000:].decode("utf-8", "replace").strip()
        if text:
            return ":\n" + "\n".join(text.splitlines()[-8:])
    return ""


def family(root: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            # the name before the last ')' may hold anything
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found, at = [root], 0
    while at < len(found):
        found += children.get(found[at], [])
        at += 1
    return found


def _rss(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
