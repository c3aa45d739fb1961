"""What ten times too many requests do to `hasten serve`.

    python benchmarks/serve_overload.py --seconds 300 --out benchmarks/serve-overload

Phases, all against one server: closed loop (its maximum), open loop at that rate, open loop at ten
times that rate, and a 20 MB prompt. /health is asked all the while. The server has one core for
both of its processes and the client another, so that turning a request away costs the requests that
are served, and the client costs nobody anything. The maximum is the better of the first two phases.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hasten.bench.serving.http import HttpClient
from hasten.bench.serving.load import Outcome, Planned, Target, run_load
from hasten.bench.serving.processes import ServerProcess, free_port, running, serve_command

FACTOR = 10
PROMPT, OUTPUT = 32, 64
SEQUENCES = 32


@dataclass
class Phase:
    """What a phase showed; seconds, requests per second, bytes."""

    name: str
    seconds: float
    offered: float
    goodput: float
    ok: int
    rejected: int
    failed: int
    reject_p50: float
    reject_p99: float
    ttft_p95: float
    health_p50: float
    health_p99: float
    health_max: float
    rss_start: int
    rss_peak: int
    sent_late_p99: float


class Watch:
    """Asks /health every 20 ms on one connection, and weighs the server every half second."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.times: list[float] = []
        self.start = self.peak = server.rss_bytes()

    async def __aenter__(self) -> Watch:
        self._tasks = [asyncio.create_task(self._ask()), asyncio.create_task(self._weigh())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(self) -> None:
        client = HttpClient(self.server.base_url)
        request = client.encode("GET", "/health")
        while True:
            asked = time.monotonic()
            response = await client.send(request)
            assert response.status == 200, response.body
            self.times.append(response.ended - asked)
            await asyncio.sleep(0.02)

    async def _weigh(self) -> None:
        while True:
            self.peak = max(self.peak, self.server.rss_bytes())
            await asyncio.sleep(0.5)


def percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, 100 * share)) if values else math.nan


def requests(rate: float | None, seconds: float, seed: int) -> list[Planned]:
    """Poisson arrivals at a rate; without one, more than a closed loop will need."""
    rng = np.random.default_rng(seed)
    count = 100_000 if rate is None else round(rate * seconds)
    gaps = np.zeros(count) if rate is None else rng.exponential(1 / rate, count)
    ids = rng.integers(16, 4000, (min(count, 512), PROMPT)).tolist()
    return [
        Planned(float(at), ids[i % len(ids)], PROMPT, OUTPUT)
        for i, at in enumerate(np.cumsum(gaps))
    ]


async def phase(
    name: str, server: ServerProcess, rate: float | None, seconds: float, seed: int
) -> Phase:
    """Load for so many seconds; what was served after that does not count."""
    client = HttpClient(server.base_url)
    target = Target(client, "completions", "reference", {"return_token_ids": None}, timeout=120)
    began = time.monotonic()
    over = began + seconds
    async with Watch(server) as watch:
        outcomes = await run_load(
            target,
            requests(rate, seconds, seed),
            max_concurrency=2 * SEQUENCES if rate is None else None,
            closed_loop=rate is None,
            interrupted=lambda: time.monotonic() > over,
        )
    client.close()
    return summary(name, outcomes, began, seconds, watch)


def summary(
    name: str, outcomes: Sequence[Outcome], began: float, seconds: float, watch: Watch
) -> Phase:
    # the queue fills and the first outputs take their time: what counts begins later
    settled = began + min(seconds / 3, 15.0)
    over = began + seconds
    ended = [o for o in outcomes if o.ended is not None and settled <= o.ended <= over]
    ok = [o for o in ended if o.ok]
    rejected = [o for o in ended if o.rejected]
    failed = [o for o in ended if not o.ok and not o.rejected and o.error != "unfinished"]
    times = [o.ended - o.sent for o in rejected if o.ended is not None and o.sent is not None]
    ttft = [o.timeline.times[0] - o.arrived for o in ok if o.timeline.times]
    late = [o.sent - o.arrived for o in outcomes if o.sent is not None]
    return Phase(
        name,
        seconds,
        len(outcomes) / seconds,
        len(ok) / (over - settled),
        len(ok),
        len(rejected),
        len(failed),
        percentile(times, 0.5),
        percentile(times, 0.99),
        percentile(ttft, 0.95),
        percentile(watch.times, 0.5),
        percentile(watch.times, 0.99),
        max(watch.times, default=math.nan),
        watch.start,
        watch.peak,
        percentile(late, 0.99),
    )


async def large_prompts(server: ServerProcess, count: int) -> dict[str, Any]:
    """Bodies of 20 MB, one after the other: answered 400, since no such text fits."""
    client = HttpClient(server.base_url)
    text = json.dumps({"prompt": "some words " * (20_000_000 // 11), "max_tokens": 1}).encode()
    request = client.encode("POST", "/v1/completions", text)
    times = []
    async with Watch(server) as watch:
        await asyncio.sleep(0.5)
        for _ in range(count):
            asked = time.monotonic()
            response = await client.send(request)
            assert response.status == 400, response.body
            times.append(response.ended - asked)
        await asyncio.sleep(0.5)
    client.close()
    return {
        "answered_max": max(times),
        "health_p99": percentile(watch.times, 0.99),
        "health_max": max(watch.times),
        "rss_extra": watch.peak - watch.start,
    }


async def measure(
    seconds: float, calm: float, server_core: int | None, *arguments: str
) -> dict[str, Any]:
    """All phases: ``calm`` seconds for each of the first two, ``seconds`` of overload."""
    port = free_port()
    command = serve_command(
        "reference",
        port,
        ["--max-sequences", str(SEQUENCES), "--max-length", "512", "--threads", "1", *arguments],
    )
    if server_core is not None:
        command = ["taskset", "-c", str(server_core), *command]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "serve.log"
        async with running(command, f"http://127.0.0.1:{port}", log) as server:
            await phase("warm-up", server, None, 2.0, 0)
            closed = await phase("closed loop", server, None, calm, 1)
            at_once = await phase("1x", server, closed.goodput, calm, 2)
            most = max(closed.goodput, at_once.goodput)
            over = await phase(f"{FACTOR}x", server, FACTOR * most, seconds, 3)
            after = await phase("1x again", server, closed.goodput, calm, 4)
            large = await large_prompts(server, 5)
    return {
        "maximum": most,
        "kept": over.goodput / most,
        "phases": [asdict(one) for one in (closed, at_once, over, after)],
        "large_prompt": large,
    }


def report(found: dict[str, Any], conditions: dict[str, Any]) -> str:
    lines = [
        "# Overload",
        "",
        *(f"- {name}: {value}" for name, value in conditions.items()),
        "",
        "| phase | s | offered/s | served/s | 429 | failed | 429 p50 ms | 429 p99 ms | TTFT p95 s "
        "| health p99 ms | health max ms | RSS MB before, peak | sent late p99 ms |",
        "|---|" + "---:|" * 12,
    ]
    for one in found["phases"]:
        lines.append(
            f"| {one['name']} | {one['seconds']:.0f} | {one['offered']:.1f} "
            f"| {one['goodput']:.2f} | {one['rejected']} | {one['failed']} "
            f"| {1e3 * one['reject_p50']:.1f} | {1e3 * one['reject_p99']:.1f} "
            f"| {one['ttft_p95']:.2f} | {1e3 * one['health_p99']:.1f} "
            f"| {1e3 * one['health_max']:.1f} "
            f"| {one['rss_start'] / 1e6:.0f}, {one['rss_peak'] / 1e6:.0f} "
            f"| {1e3 * one['sent_late_p99']:.1f} |"
        )
    large = found["large_prompt"]
    lines += [
        "",
        f"Served at {FACTOR}x: {100 * found['kept']:.1f} % of the maximum "
        f"({found['maximum']:.2f} requests/s).",
        "",
        f"20 MB prompts: answered in at most {large['answered_max']:.2f} s, /health p99 "
        f"{1e3 * large['health_p99']:.1f} ms, at most {1e3 * large['health_max']:.1f} ms, "
        f"{large['rss_extra'] / 1e6:.0f} MB more.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300, help="of overload")
    parser.add_argument("--calm", type=float, default=60, help="seconds of the other phases")
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--any-core", action="store_true", help="pin nothing")
    parser.add_argument("--out", type=Path, default=Path("serve-overload"))
    given = parser.parse_args()
    pinned = not given.any_core
    if pinned:
        if shutil.which("taskset") is None:
            parser.error("taskset is not installed: say --any-core")
        os.sched_setaffinity(0, {given.client_core})
    found = asyncio.run(measure(given.seconds, given.calm, given.server_core if pinned else None))
    cores = f"server {given.server_core}, client {given.client_core}" if pinned else "not pinned"
    conditions = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "cores": cores,
        "model": "reference, one engine thread",
        "requests": f"{PROMPT} tokens in, {OUTPUT} out, streamed, {SEQUENCES} at once",
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "result.json").write_text(json.dumps({**conditions, **found}, indent=1) + "\n")
    text = report(found, conditions)
    (given.out / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
