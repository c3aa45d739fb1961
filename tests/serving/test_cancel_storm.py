"""Clients that go away at any moment: nothing of theirs stays behind, nobody else notices, and the
server's counters are what the clients saw."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.serving.live import Live, live

TEXTS = (
    "import os\nimport sys\n",
    "def add(a, b):\n    return",
    "class Stack:\n    def __init__(self):\n",
    "The quick brown fox jumps over",
    "for key, value in sorted(",
    "# größer, 東京, 🙂\nprint(",
)


def body(number: int, rng: random.Random) -> dict[str, Any]:
    """A request whose text is fixed by its own fields: greedy, or with a seed."""
    long = rng.random() < 0.2
    prompt = TEXTS[number % len(TEXTS)] * (rng.randint(8, 25) if long else 1) + f" #{number % 50}"
    return {
        "prompt": prompt,
        "max_tokens": rng.choice((1, 4, 16, 48)),
        "n": rng.choice((1, 1, 1, 2)),
        "temperature": rng.choice((0.0, 1.0)),
        "seed": number % 7,
        "ignore_eos": True,
        "stream": rng.random() < 0.5,
    }


@dataclass
class Seen:
    """What a client saw of its request."""

    status: int | None = None
    text: dict[int, str] = field(default_factory=dict)
    tokens: int = 0
    complete: bool = False


async def send(
    one: Live, request: dict[str, Any], patience: float | None, cut: float | None
) -> Seen:
    """A request on a connection of its own, which breaks after ``patience`` seconds; with ``cut``
    already when that part of the bytes is sent."""
    seen = Seen()
    data = json.dumps(request).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    ).encode()
    whole = head + data
    reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
    try:
        async with asyncio.timeout(patience):
            writer.write(whole if cut is None else whole[: int(cut * len(whole))])
            await writer.drain()
            if cut is not None:
                await asyncio.sleep(0.02)
                return seen
            answer = await reader.read()
    except TimeoutError:
        return seen
    finally:
        writer.transport.abort()
    headers, _, rest = answer.partition(b"\r\n\r\n")
    seen.status = int(headers.split(b" ", 2)[1])
    if b"transfer-encoding: chunked" in headers.lower():
        rest = unchunked(rest)
    if seen.status == 200:
        read_answer(seen, rest, request["stream"])
    return seen


def unchunked(data: bytes) -> bytes:
    found = []
    while data:
        size, _, data = data.partition(b"\r\n")
        found.append(data[: int(size, 16)])
        data = data[int(size, 16) + 2 :]
    return b"".join(found)


def read_answer(seen: Seen, data: bytes, stream: bool) -> None:
    if not stream:
        answer = json.loads(data)
        seen.text = {choice["index"]: choice["text"] for choice in answer["choices"]}
        seen.tokens = answer["usage"]["completion_tokens"]
        seen.complete = True
        return
    events = [e.removeprefix(b"data: ") for e in data.split(b"\n\n") if e.startswith(b"data: ")]
    seen.complete = events[-1:] == [b"[DONE]"]
    for event in events:
        if event == b"[DONE]":
            continue
        chunk = json.loads(event)
        assert "error" not in chunk, chunk
        for choice in chunk["choices"]:
            index = choice["index"]
            seen.text[index] = seen.text.get(index, "") + choice["text"]


async def storm(one: Live, count: int, seed: int) -> None:
    """``count`` requests that are cancelled, and one that is not for every four of them."""
    rng = random.Random(seed)
    alone = {}
    kept = [body(number, rng) for number in range(24)]
    for number, request in enumerate(kept):
        alone[number] = (await send(one, request, None, None)).text
    before = await one.idle(2)
    files = one.descriptors()
    outcomes: Counter[str] = Counter()
    changed = []
    lasted = [0.5]  # seconds of requests that nobody cancelled
    places = asyncio.Semaphore(64)

    async def cancelled(number: int) -> None:
        request = body(number, rng)
        kind = rng.random()
        cut = rng.random() if kind < 0.15 else None
        async with places:
            recent = sum(lasted[-8:]) / len(lasted[-8:])
            patience = None if cut is not None else rng.random() * 1.2 * recent
            seen = await send(one, request, patience, cut)
        outcomes["gone" if seen.status is None else str(seen.status)] += 1

    async def undisturbed(number: int) -> None:
        async with places:
            began = time.monotonic()
            seen = await send(one, kept[number], None, None)
            lasted.append(time.monotonic() - began)
        outcomes[f"kept {seen.status}"] += 1
        if seen.status == 200 and (seen.text != alone[number] or not seen.complete):
            changed.append((kept[number], alone[number], seen))

    work = []
    for number in range(count):
        work.append(cancelled(number))
        if number % 4 == 0:
            work.append(undisturbed(rng.randrange(len(kept))))
    await asyncio.gather(*work)
    ended = time.monotonic()
    after = await one.idle(1.0)
    while one.descriptors() > files:
        assert time.monotonic() < ended + 5, "connections of clients that are gone stay open"
        await asyncio.sleep(0.05)
    print(f"{dict(outcomes)}, idle after {time.monotonic() - ended:.2f} s")
    assert not changed, changed[0]
    assert outcomes["kept 200"] == sum(v for k, v in outcomes.items() if k.startswith("kept"))
    assert outcomes["gone"] > count / 4, "too few were cancelled: the storm is none"
    assert after["leaked_pages_total",] == 0

    def grown(*key: str) -> float:
        return after.get(key, 0) - before.get(key, 0)

    # A client that goes away while its answer is on the way may count as either.
    answered = outcomes["200"] + outcomes["kept 200"]
    ok, gone = (
        grown("requests_total", "ok", "completions"),
        grown("requests_total", "cancelled", "completions"),
    )
    assert ok >= answered
    assert ok + gone <= answered + outcomes["gone"]
    assert grown("requests_total", "failed", "completions") == 0
    # Nothing is left in the queue that a next one could not have.
    assert (await send(one, kept[0], None, None)).text == alone[0]


async def drain(one: Live) -> None:
    """SIGTERM with 200 requests in flight: each gets its whole and right answer, exit 0."""
    rng = random.Random(5)
    kinds = [body(number, rng) | {"n": 1, "max_tokens": 40} for number in range(10)]
    alone = [(await send(one, request, None, None)).text for request in kinds]
    before = await in_hand(one)
    flying = [
        asyncio.create_task(send(one, kinds[number % len(kinds)], None, None))
        for number in range(200)
    ]
    until = time.monotonic() + 30
    while await in_hand(one) < before + len(flying):  # who comes later is refused, rightly
        assert time.monotonic() < until
    await asyncio.sleep(0.2)  # the gauges are some steps old: one that ended may count twice
    assert sum(not task.done() for task in flying) > 50, "too few are left to drain"
    one.server.process.terminate()
    for number, seen in enumerate(await asyncio.gather(*flying)):
        assert seen.status == 200 and seen.complete
        assert seen.text == alone[number % len(kinds)]
    assert await asyncio.to_thread(one.server.process.wait, 20) == 0


async def in_hand(one: Live) -> float:
    """Requests that the server took up since it began, ended or not."""
    metrics = await one.metrics()
    ended = sum(value for key, value in metrics.items() if key[0] == "requests_total")
    return ended + metrics["num_requests_running",] + metrics["num_requests_waiting",]


def test_cancelled_at_random_moments(tmp_path: Path) -> None:
    async def run() -> None:
        async with live(tmp_path) as one:
            await storm(one, 1000, seed=1)
            await drain(one)

    asyncio.run(run())


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_cancelled_at_random_moments(tmp_path: Path) -> None:
    async def run() -> None:
        async with live(tmp_path) as one:
            await storm(one, 10_000, seed=random.SystemRandom().randrange(2**32))

    asyncio.run(run())


def test_counters_are_what_clients_saw(tmp_path: Path) -> None:
    """1,000 requests that end well, are refused, or find no room; none goes away, so that the
    counts must be equal to the last."""

    async def run() -> None:
        sizes = ("--max-length", "512", "--kv-bytes", "48M", "--max-sequences", "16")
        async with live(tmp_path, *sizes, "--max-queued-requests", "24") as one:
            await reconcile(one)

    asyncio.run(run())


async def reconcile(one: Live) -> None:
    rng = random.Random(3)
    counts: Counter[str] = Counter()
    places = asyncio.Semaphore(60)

    def used(usage: dict[str, Any]) -> None:
        counts["prompt"] += usage["prompt_tokens"]
        counts["output"] += usage["completion_tokens"]
        counts["cached"] += usage["prompt_tokens_details"]["cached_tokens"]

    async def leave(request: dict[str, Any]) -> int:
        """Go away at the first token of many: too early for an end."""
        first = asyncio.Event()
        request |= {"prompt": "x", "max_tokens": 500, "stream": True, "n": 1}
        data = one.client.encode("POST", "/v1/completions", json.dumps(request).encode())
        sending = asyncio.create_task(one.client.send(data, lambda *_: first.set()))
        seen = asyncio.create_task(first.wait())
        await asyncio.wait({sending, seen}, return_when=asyncio.FIRST_COMPLETED)
        if not first.is_set():
            seen.cancel()
            return (await sending).status
        sending.cancel()
        return 0

    async def ask(number: int) -> None:
        request = body(number, rng) | {"max_tokens": 4}
        if number % 10 == 0:
            request["n"] = 1000
        async with places:
            if number % 10 == 1:
                status = await leave(request)
            elif request["stream"]:
                status = await streamed(request)
            else:
                response, answer = await one.post("/v1/completions", request)
                status = response.status
                if status == 200:
                    used(answer["usage"])
                elif status == 429:
                    assert 1 <= int(response.headers["retry-after"]) <= 60
            counts[str(status)] += 1
            if status == 429:  # or all requests are soon spent on a full queue
                await asyncio.sleep(0.2 + rng.random())

    async def streamed(request: dict[str, Any]) -> int:
        request["stream_options"] = {"include_usage": True}
        parts: list[bytes] = []
        data = one.client.encode("POST", "/v1/completions", json.dumps(request).encode())
        response = await one.client.send(data, lambda part, _: parts.append(part))
        if response.status == 200:
            events = b"".join(parts).strip().split(b"\n\n")
            assert events[-1] == b"data: [DONE]"
            used(json.loads(events[-2].removeprefix(b"data: "))["usage"])
        return response.status

    await asyncio.gather(*(ask(number) for number in range(1000)))
    metrics = await one.idle(2)
    print(dict(counts))
    assert sum(counts[status] for status in ("200", "400", "429", "0")) == 1000
    for status, outcome in (
        ("200", "ok"),
        ("400", "refused"),
        ("429", "rejected"),
        ("0", "cancelled"),
    ):
        assert counts[status] >= 20, "too few to say anything"
        assert metrics["requests_total", outcome, "completions"] == counts[status]
    for status, count in (("400", counts["400"]), ("429", counts["429"])):
        assert metrics["http_requests_total", "/v1/completions", status] == count
    # a request that was left had its status already
    assert metrics["http_requests_total", "/v1/completions", "200"] == counts["200"] + counts["0"]
    assert sum(v for k, v in metrics.items() if k[0] == "requests_total") == 1000
    wasted = metrics["generation_tokens_not_ok_total",]
    assert wasted >= counts["0"]
    assert metrics["generation_tokens_total",] - wasted == counts["output"]
    assert metrics["request_prompt_tokens_sum",] == counts["prompt"]
    assert metrics["prefix_cache_hits_total",] >= counts["cached"]
