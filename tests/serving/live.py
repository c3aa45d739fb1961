"""A real server, two processes and a port, for tests that need sockets, signals or weights."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from hasten.bench.serving.http import HttpClient, Response
from hasten.bench.serving.processes import ServerProcess, free_port, running, serve_command

SMALL = ("--max-length", "512", "--kv-bytes", "48M", "--max-sequences", "32")
"""Sizes that are quick to clear and soon full."""


class Live:
    """A running server and a client for it."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.client = HttpClient(server.base_url)
        self.port = int(server.base_url.rpartition(":")[2])

    async def get(self, path: str) -> Response:
        return await self.client.get(path)

    async def post(self, path: str, body: dict[str, Any]) -> tuple[Response, Any]:
        response = await self.client.send(
            self.client.encode("POST", path, json.dumps(body).encode())
        )
        return response, json.loads(response.body)

    async def complete(self, **body: Any) -> Any:
        """A completion that must succeed, as a whole."""
        response, answer = await self.post("/v1/completions", body)
        assert response.status == 200, answer
        return answer

    async def metrics(self) -> dict[tuple[str, ...], float]:
        """Samples of /metrics: (name, label values without the model's) -> value."""
        text = (await self.get("/metrics")).body.decode()
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = [v for k, v in sorted(sample.labels.items()) if k != "model_name"]
                found[sample.name.removeprefix("hasten:"), *labels] = sample.value
        return found

    async def idle(self, seconds: float) -> dict[tuple[str, ...], float]:
        """The metrics as soon as nothing is in the server; fails if that takes too long."""
        until = time.monotonic() + seconds
        while True:
            metrics = await self.metrics()
            left = {name: metrics[name,] for name in GAUGES if metrics[name,]}
            if not left:
                return metrics
            assert time.monotonic() < until, f"not idle after {seconds} s: {left}"
            await asyncio.sleep(0.02)

    def pids(self) -> list[int]:
        """The HTTP process and its descendants."""
        parents = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
        found = [self.server.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def descriptors(self) -> int:
        """Open files of all processes of the server."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.pids())


GAUGES = (
    "num_requests_running",
    "num_requests_waiting",
    "queued_requests",
    "queued_prompt_tokens",
    "kv_pages_used",
)


@asynccontextmanager
async def live(folder: Path, *arguments: str, model: str = "reference") -> AsyncIterator[Live]:
    """Serve until the end of the block. What the server prints is in ``folder/serve.log``."""
    port = free_port()
    command = serve_command(model, port, arguments or SMALL)
    async with running(command, f"http://127.0.0.1:{port}", folder / "serve.log") as server:
        one = Live(server)
        try:
            yield one
        finally:
            one.client.close()


async def percentile_of_health(one: Live, until: asyncio.Event, every: float = 0.01) -> list[float]:
    """Seconds that /health took, again and again, on a connection of its own, sorted."""
    probe = HttpClient(one.server.base_url)
    request = probe.encode("GET", "/health")
    times = []
    while not until.is_set():
        asked = time.monotonic()
        response = await probe.send(request)
        assert response.status == 200
        times.append(response.ended - asked)
        await asyncio.sleep(every)
    probe.close()
    return sorted(times)
