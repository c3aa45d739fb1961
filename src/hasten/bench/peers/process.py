"""An engine in a process of its own, which is stopped whenever it is not its turn."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RUNNERS = Path(__file__).parent / "runners"


class PeerError(ValueError):
    """An engine that could not do what it was asked to; the text says which and why."""


class EngineProcess:
    """A runner (see ``runners/answering.py`` for the messages), started and asked line by line.

    Between two questions the process is paused by a signal: threads that spin for work after
    their last step would take time from whoever is measured next.

    Args:
        name: what errors call it.
        command: interpreter and runner.
        environment: variables beside those of this process.
        timeout: seconds that one answer may take.

    Raises (every method): ``PeerError`` with the last line that the process wrote.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.name = name
        self.timeout = timeout
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (close does)
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | (environment or {}),
            start_new_session=True,  # so that pauses reach its children, and Ctrl-C does not
        )
        self._unread = b""

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send a question and wait for its answer."""
        process = self._process
        assert process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(self._line())
        except BrokenPipeError:
            raise self._ended() from None
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return dict(answer)

    def close(self) -> None:
        """End the process, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        end = time.monotonic() + self.timeout
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not ready.select(max(0.0, end - time.monotonic())):
                    self.close()
                    raise PeerError(f"{self.name}: no answer within {self.timeout:.0f} s")
                piece = os.read(self._process.stdout.fileno(), 1 << 20)
                if not piece:
                    raise self._ended()
                self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _ended(self) -> PeerError:
        status = self._process.wait()
        self._log.seek(0)
        said = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        return PeerError(f"{self.name}: ended with status {status}: {said[-1] if said else ''}")

    def _signal(self, what: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, what)
