"""How long a server takes from its process's start to its first answers, and what it weighs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hasten.bench.serving import metrics, processes
from hasten.bench.serving.http import HttpClient
from hasten.bench.serving.load import Outcome, Planned, Target
from hasten.bench.serving.server_facts import server_facts

FIELDS = {
    "ready_seconds": "process start to /ready (s)",
    "first_token_seconds": "process start to first token (s)",
    "rss_mib": "resident memory, all processes (MiB)",
}


@dataclass(frozen=True)
class Start:
    """One start. Times in seconds since the process was made; memory after the first token."""

    ready_seconds: float
    first_token_seconds: float
    rss_mib: float


async def measure(
    model: str,
    arguments: Sequence[str],
    repeats: int,
    on_start: Callable[[int, Start], None] = lambda number, start: None,
) -> list[Start]:
    """Start ``hasten serve`` again and again, one request each.

    The first start finds the files wherever they lie; later ones find them in memory.
    """
    starts = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats):
            start = await _once(model, arguments, Path(folder) / "server.log")
            starts.append(start)
            on_start(number, start)
    return starts


async def _once(model: str, arguments: Sequence[str], log: Path) -> Start:
    port = processes.free_port()
    url = f"http://127.0.0.1:{port}"
    command = processes.serve_command(model, port, arguments)
    async with processes.running(command, url, log) as server:
        client = HttpClient(url)
        try:
            facts = await server_facts(client)
            target = Target(client, "completions", facts.model)
            outcome = Outcome(0, Planned(0.0, "Hello", 1, 1), arrived=time.monotonic())
            await target.run(outcome, target.encode(outcome.planned))
        finally:
            client.close()
        if not outcome.ok:
            raise processes.ServerFailed(
                f"the first request failed ({outcome.error}): {outcome.message}"
            )
        first = outcome.arrived + metrics.ttft(outcome)
        return Start(
            server.ready - server.started, first - server.started, server.rss_bytes() / 2**20
        )


def as_json(starts: Sequence[Start]) -> dict[str, Any]:
    """Per figure all values and their median, minimum and maximum."""
    result: dict[str, Any] = {}
    for name in FIELDS:
        values = [getattr(start, name) for start in starts]
        result[name] = {
            "median": median(values),
            "min": min(values),
            "max": max(values),
            "values": values,
        }
    return result


def table(starts: Sequence[Start]) -> str:
    """Median (min-max) of each figure."""
    lines = []
    for name, label in FIELDS.items():
        values = [getattr(start, name) for start in starts]
        digits = 0 if name == "rss_mib" else 2
        lines.append(
            f"{label:<40} {median(values):.{digits}f} "
            f"({min(values):.{digits}f}-{max(values):.{digits}f})"
        )
    return "\n".join(lines)
