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
from hasten.bench.serving.processes import (
    ServerProcess,
    family,
    free_port,
    running,
    serve_command,
)

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
        for group in text_string_to_metric_families(text):
            for sample in group.samples:
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

    def descriptors(self) -> int:
        """Open files of all processes of the server."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family(self.server.process.pid))


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
