"""The dearest requests that the limits let through: memory stays bounded, what runs beside them
runs on, and once their client goes away nothing is left. (What limits stop is in test_limits.py.)
"""

from __future__ import annotations

import asyncio
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hasten.bench.serving.http import HttpClient
from tests.serving.live import Live, live

EXTRA_BYTES = 256 << 20
SECONDS = 2.0
"""That each of them may go on before its client loses patience."""

WORDS = "some words of a prompt "


def bombs(longest: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """name -> (route, body); ``longest`` = tokens of the context."""
    completions, chat = "/v1/completions", "/v1/chat/completions"
    ids = [5 + i % 4000 for i in range(longest - 64)]
    everything = {"logprobs": 20, "prompt_logprobs": 20, "echo": True, "max_tokens": 64}
    return {
        "outputs": (completions, {"prompt": ids[:64], "n": 128, "max_tokens": 400}),
        "prompts": (completions, {"prompt": [ids] * 100, "max_tokens": 1}),
        "logprobs": (completions, {"prompt": [ids] * 64, "n": 4, **everything}),
        "stop": (
            completions,
            {
                "prompt": "x",
                "n": 64,
                "max_tokens": 400,
                "ignore_eos": True,
                "stop": ["ab" * 498 + str(i) for i in range(16)],
            },
        ),
        "bias": (
            completions,
            {
                "prompt": "x",
                "n": 64,
                "max_tokens": 400,
                "ignore_eos": True,
                "logit_bias": {str(i): 1.0 for i in range(1024)},
                "allowed_token_ids": list(range(4096)),
                "stop_token_ids": [4000] * 4096,
            },
        ),
        "bad words": (
            completions,
            {
                "prompt": "x",
                "n": 32,
                "max_tokens": 400,
                "ignore_eos": True,
                "bad_words": [f"{WORDS * 42}{i}" for i in range(256)],
            },
        ),
        "bad words of prompts": (
            completions,
            {
                "prompt": ["x"] * 100,
                "max_tokens": 400,
                "ignore_eos": True,
                "bad_words": [f"{WORDS * 42}{i}" for i in range(256)],
            },
        ),
        "messages": (
            chat,
            {"messages": [{"role": "user", "content": "x"}] * 2048, "truncate_prompt_tokens": 400},
        ),
        "text": (completions, {"prompt": WORDS * 90_000, "truncate_prompt_tokens": 16}),
        "deep": (
            chat,
            {
                "messages": [{"role": "user", "content": "x"}],
                "chat_template_kwargs": {"x": [[[[list(range(50_000))]]]]},
            },
        ),
        "fields": (completions, {"prompt": "x", **{f"unknown_{i}": i for i in range(100_000)}}),
    }


async def explode(one: Live, route: str, body: dict[str, Any]) -> dict[str, float]:
    """Send one while another request's tokens and /health come; returns what was measured."""
    client = HttpClient(one.server.base_url)
    data = client.encode("POST", route, json.dumps(body).encode())
    tokens: list[float] = []
    health: list[float] = []
    start = peak = one.server.rss_bytes()

    async def beside() -> None:
        """A stream that begins before and is there to the end."""
        text = {"prompt": "beside", "max_tokens": 500, "ignore_eos": True, "stream": True}
        request = one.client.encode("POST", "/v1/completions", json.dumps(text).encode())
        await one.client.send(request, lambda part, at: tokens.append(at))

    async def weigh() -> None:
        nonlocal peak
        while True:
            peak = max(peak, one.server.rss_bytes())
            await asyncio.sleep(0.05)

    async def ask() -> None:
        probe = HttpClient(one.server.base_url)
        request = probe.encode("GET", "/health")
        while True:
            began = time.monotonic()
            health.append((await probe.send(request)).ended - began)
            await asyncio.sleep(0.01)

    tasks = [asyncio.create_task(work()) for work in (beside, ask, weigh)]
    while not tokens:
        await asyncio.sleep(0.01)
    began = time.monotonic()
    status = 0
    try:
        async with asyncio.timeout(SECONDS):
            response = await client.send(data)
            status = response.status
            assert status in (200, 400, 429), response.body[:500]
    except TimeoutError:
        pass
    took = time.monotonic() - began
    await asyncio.sleep(0.1)
    for task in tasks:
        if task.done():
            task.result()
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "status": status,
        "seconds": took,
        "gap_max": max(b - a for a, b in pairwise(tokens)),
        "health_p90": sorted(health)[int(0.9 * len(health))],
        "health_max": max(health),
        "extra": peak - start,
    }


@pytest.mark.timeout(280)
def test_dear_requests_hurt_nobody_else(tmp_path: Path) -> None:
    async def run() -> None:
        async with live(tmp_path, "--max-length", "512", "--max-sequences", "32") as one:
            await one.complete(prompt="warm", max_tokens=4)
            for name, (route, body) in bombs(512).items():
                found = await explode(one, route, body)
                if found["gap_max"] >= 0.7:  # another process had the cores, or it does so again
                    found = await explode(one, route, body)
                print(name, {key: round(value, 3) for key, value in found.items()})
                metrics = await one.idle(2.0)
                assert metrics["leaked_pages_total",] == 0
                assert found["extra"] < EXTRA_BYTES, name
                assert found["health_p90"] < 0.1 and found["health_max"] < 1.0, name
                assert found["gap_max"] < 0.7, name

    asyncio.run(run())
