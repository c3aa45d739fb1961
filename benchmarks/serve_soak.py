"""`hasten serve` at nine tenths of its capacity for half an hour: does anything creep?

    python benchmarks/serve_soak.py --minutes 30 --out benchmarks/serve-soak

Prompts and answers of mixed lengths, half of them streamed, a third with a shared beginning, one in
twenty cancelled at a random moment. Reported: slope of the resident memory of both processes (least
squares, after a warm-up of a fifth of the time), open files, latencies of the first and the last
third, and what became of every request. The server has one core, the client the other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hasten.bench.serving.http import ConnectionFailed, HttpClient
from hasten.bench.serving.processes import (
    ServerProcess,
    family,
    free_port,
    running,
    serve_command,
)

SEQUENCES = 32
CANCELLED = 0.05


@dataclass
class Request:
    body: dict[str, Any]
    patience: float | None
    """Seconds after which its client goes away."""


@dataclass
class Sample:
    """The server at a moment; seconds, bytes."""

    at: float
    rss: list[int]
    files: list[int]


def draw(rng: random.Random, shared: Sequence[list[int]]) -> Request:
    def ids(count: int) -> list[int]:
        return [rng.randrange(16, 4000) for _ in range(count)]

    prompt = ids(min(400, 4 + int(rng.lognormvariate(3.2, 0.8))))
    if rng.random() < 1 / 3:
        prompt = (rng.choice(shared) + prompt)[:440]
    body = {
        "prompt": prompt,
        "max_tokens": min(64, 1 + int(rng.lognormvariate(2.8, 0.7))),
        "ignore_eos": True,
        "temperature": rng.choice((0.0, 1.0)),
        "stream": rng.random() < 0.5,
    }
    return Request(body, rng.random() * 2 if rng.random() < CANCELLED else None)


class Load:
    """Sends requests and counts what becomes of them."""

    def __init__(self, base_url: str, seed: int) -> None:
        self.client = HttpClient(base_url)
        self.rng = random.Random(seed)
        self.shared = [[self.rng.randrange(16, 4000) for _ in range(128)] for _ in range(8)]
        self.outcomes: Counter[str] = Counter()
        self.latencies: list[tuple[float, float]] = []
        """(sent, seconds per output token) of those that ended well."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def one(self) -> None:
        request = draw(self.rng, self.shared)
        data = self.client.encode("POST", "/v1/completions", json.dumps(request.body).encode())
        sent = time.monotonic()
        last = b""

        def take(part: bytes, _: float) -> None:
            nonlocal last
            last = (last + part)[-64:]

        stream = request.body["stream"]
        try:
            async with asyncio.timeout(request.patience):
                response = await self.client.send(data, take if stream else None)
        except TimeoutError:
            self.outcomes["cancelled"] += 1
            return
        except ConnectionFailed:
            self.outcomes["lost"] += 1
            return
        whole = last.endswith(b"data: [DONE]\n\n") if stream else bool(response.body)
        if response.status == 200 and whole:
            self.outcomes["ok"] += 1
            tokens = request.body["max_tokens"]
            self.latencies.append((sent, (response.ended - sent) / tokens))
        else:
            self.outcomes[str(response.status) if response.status != 200 else "lost"] += 1

    async def closed(self, seconds: float) -> float:
        """Requests per second with as many at once as the server runs, twice over."""
        over = time.monotonic() + seconds
        before = self.outcomes["ok"]

        async def client() -> None:
            while time.monotonic() < over:
                await self.one()

        await asyncio.gather(*(client() for _ in range(2 * SEQUENCES)))
        return (self.outcomes["ok"] - before) / seconds

    async def open(self, rate: float, seconds: float) -> None:
        """Poisson arrivals for so long, and then the end of all of them."""
        at, over = time.monotonic(), time.monotonic() + seconds
        while at < over:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            task = asyncio.create_task(self.one())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            at += self.rng.expovariate(rate)
        await asyncio.gather(*self._tasks)


async def watch(server: ServerProcess, samples: list[Sample], every: float) -> None:
    while True:
        pids = family(server.process.pid)
        page = os.sysconf("SC_PAGE_SIZE")
        rss = [int(Path(f"/proc/{p}/statm").read_text().split()[1]) * page for p in pids]
        files = [len(os.listdir(f"/proc/{p}/fd")) for p in pids]
        samples.append(Sample(time.monotonic(), rss, files))
        await asyncio.sleep(every)


def slope(samples: Sequence[Sample], process: int) -> float:
    """MB per hour of the resident memory of a process."""
    hours = [(one.at - samples[0].at) / 3600 for one in samples]
    return float(np.polyfit(hours, [one.rss[process] / 1e6 for one in samples], 1)[0])


def p99(values: Sequence[float]) -> float:
    return float(np.percentile(values, 99)) if values else math.nan


async def soak(minutes: float, core: int | None, share: float, seed: int) -> dict[str, Any]:
    port = free_port()
    sizes = ["--max-sequences", str(SEQUENCES), "--max-length", "512", "--threads", "1"]
    command = serve_command("reference", port, sizes)
    if core is not None:
        command = ["taskset", "-c", str(core), *command]
    seconds = 60 * minutes
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "serve.log"
        async with running(command, f"http://127.0.0.1:{port}", log) as server:
            warm = Load(server.base_url, seed)
            await warm.closed(min(5.0, seconds / 20))
            capacity = await warm.closed(min(60.0, seconds / 10))
            warm.client.close()
            load = Load(server.base_url, seed + 1)
            watching = asyncio.create_task(watch(server, samples, min(5.0, seconds / 200)))
            began = time.monotonic()
            files_before = [len(os.listdir(f"/proc/{p}/fd")) for p in family(server.process.pid)]
            await load.open(share * capacity, seconds)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await asyncio.sleep(1.5)
            stats = json.loads((await load.client.get("/hasten/stats")).body)
            load.client.close()
            await asyncio.sleep(0.5)
            files = [len(os.listdir(f"/proc/{p}/fd")) for p in family(server.process.pid)]
            server.process.terminate()
            status = await asyncio.to_thread(server.process.wait, 30)
        errors = [line for line in log.read_text().splitlines() if " INFO " not in line]
    settled = [one for one in samples if one.at > began + seconds / 5]
    third = seconds / 3
    first = [took for sent, took in load.latencies if sent < began + third]
    last = [took for sent, took in load.latencies if sent > began + 2 * third]
    return {
        "minutes": minutes,
        "capacity": capacity,
        "rate": share * capacity,
        "outcomes": dict(load.outcomes),
        "slope_mb_per_hour": {"http": slope(settled, 0), "engine": slope(settled, 1)},
        "rss_mb": {
            name: [round(one.rss[i] / 1e6, 1) for one in (samples[0], settled[0], samples[-1])]
            for i, name in enumerate(("http", "engine"))
        },
        "files": {
            name: [files_before[i], max(one.files[i] for one in samples), files[i]]
            for i, name in enumerate(("http", "engine"))
        },
        "p99_first_third": p99(first),
        "p99_last_third": p99(last),
        "drift": p99(last) / p99(first) - 1,
        "left": {name: stats[name] for name in ("running", "waiting", "pages_used")},
        "leaked_pages": stats["leaked_pages"],
        "exit_status": status,
        "log_errors": errors[:20],
        "samples": [[round(one.at - began, 1), *one.rss, *one.files] for one in samples],
    }


def report(found: dict[str, Any]) -> str:
    rows = {
        "minutes": f"{found['minutes']:g}",
        "capacity, requests/s": f"{found['capacity']:.2f}",
        "rate, requests/s": f"{found['rate']:.2f}",
        "requests": ", ".join(f"{v} {k}" for k, v in sorted(found["outcomes"].items())),
        "lost": str(found["outcomes"].get("lost", 0)),
    }
    for name, value in found["slope_mb_per_hour"].items():
        rows[f"memory slope, {name}, MB/h"] = f"{value:+.2f}"
        rows[f"memory, {name}, MB (start, settled, end)"] = str(found["rss_mb"][name])
        rows[f"open files, {name} (before, at most, without clients)"] = str(found["files"][name])
    rows |= {
        "p99 of seconds per token, first third": f"{found['p99_first_third']:.4f}",
        "p99 of seconds per token, last third": f"{found['p99_last_third']:.4f}",
        "drift": f"{100 * found['drift']:+.1f} %",
        "left in the server": str(found["left"]),
        "leaked pages": str(found["leaked_pages"]),
        "exit status": str(found["exit_status"]),
        "log lines above INFO": str(len(found["log_errors"])),
    }
    lines = ["# Soak", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--share", type=float, default=0.9, help="of the capacity")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--any-core", action="store_true", help="pin nothing")
    parser.add_argument("--out", type=Path, default=Path("serve-soak"))
    given = parser.parse_args()
    if not given.any_core:
        if shutil.which("taskset") is None:
            parser.error("taskset is not installed: say --any-core")
        os.sched_setaffinity(0, {given.client_core})
    core = None if given.any_core else given.server_core
    found = asyncio.run(soak(given.minutes, core, given.share, given.seed))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "result.json").write_text(json.dumps(found) + "\n")
    (given.out / "report.md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
