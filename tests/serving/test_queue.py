"""The bounded queue, disconnects, and silence in streams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import httpx
import pytest

from hasten.serving import exchange
from hasten.serving.admission import Admission
from hasten.serving.errors import ApiError
from hasten.serving.messages import Piece
from tests.serving.conftest import Live, SharedEngine


def test_sequences_and_tokens_are_counted_until_they_begin() -> None:
    admission = Admission(4, 1 << 20)
    admission.max_tokens = 100
    one = admission.enter()
    one.resize(2, [30])
    two = admission.enter()
    assert (admission.waiting, admission.tokens, admission.open) == (3, 30, 2)
    with pytest.raises(ApiError, match="max_queued_requests=4") as error:
        two.resize(3, [1])
    assert error.value.status == 429 and (error.value.retry_after or 0) >= 1
    with pytest.raises(ApiError, match="max_queued_tokens=100"):
        two.resize(1, [71])
    two.resize(2, [70])
    with pytest.raises(ApiError):
        admission.enter()
    one.began(0, 0)
    one.began(0, 0)
    assert (admission.waiting, admission.tokens) == (3, 70)
    one.close()
    one.close()
    two.close()
    assert (admission.waiting, admission.tokens, admission.open, admission.bytes) == (0, 0, 0, 0)
    assert admission.oldest is None and admission.preparing == 0


def test_a_request_alone_is_never_turned_away() -> None:
    admission = Admission(1, 1 << 20)
    admission.max_tokens = 10
    ticket = admission.enter()
    ticket.resize(8, [50])
    ticket.close()
    assert admission.waiting == 0


def test_retry_after_follows_the_rate_of_starts() -> None:
    now = [0.0]
    admission = Admission(100, 1 << 20, clock=lambda: now[0])
    waiting = [admission.enter() for _ in range(100)]
    for ticket in waiting:
        ticket.resize(1, [1])
    slow = admission.retry_after()
    for ticket in waiting[:50]:
        now[0] += 0.02
        ticket.began(0, 0)
    assert 1 <= admission.retry_after() < slow


def test_bodies_in_memory_are_bounded() -> None:
    admission = Admission(100, 1000)
    tickets = [admission.enter() for _ in range(5)]
    for ticket in tickets[:4]:
        ticket.space.reserve(1000)
    with pytest.raises(ApiError) as error:
        tickets[4].space.reserve(1)
    assert error.value.status == 429
    tickets[0].space.release()
    tickets[4].space.reserve(1000)


class Stuck(SharedEngine):
    """An engine that gives nothing until it is told to."""

    def __init__(self, client: Any) -> None:
        super().__init__(client)
        self.go = asyncio.Event()
        self.closed = 0

    def stream(self, *args: Any, request_id: str, **options: Any) -> Any:
        return self._stream(request_id)

    async def _stream(self, request_id: str) -> AsyncGenerator[Piece, None]:
        try:
            await self.go.wait()
            yield Piece(request_id, 0, "x", [5], finish_reason="stop")
        finally:
            self.closed += 1


def test_full_queue_is_told_before_the_body(serve: Callable[..., Live], engine_client: Any) -> None:
    engine = Stuck(engine_client)
    live = serve(engine, max_queued_requests=2)

    async def run() -> None:
        body = {"prompt": "x"}
        async with httpx.AsyncClient(base_url=live.url, timeout=30) as client:
            waiting = [
                asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(2)
            ]
            while live.service.admission.waiting < 2:
                await asyncio.sleep(0.01)
            times = []
            for _ in range(50):
                began = time.perf_counter()
                answer = await client.post("/v1/completions", json=body)
                times.append(time.perf_counter() - began)
                assert answer.status_code == 429
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["type"] == "rate_limit_error"
            assert sorted(times)[25] < 0.05
            assert (await client.get("/ready")).status_code == 200
            live.loop.loop.call_soon_threadsafe(engine.go.set)
            for answer in await asyncio.gather(*waiting):
                assert answer.json()["choices"][0]["text"] == "x"

    asyncio.run(run())
    assert live.service.admission.waiting == live.service.admission.open == 0
    assert live.service.metrics.stats()["requests"] == {"ok": 2, "rejected": 50}


@pytest.mark.parametrize("cors", [(), ("https://example.org",)])
def test_turned_away_on_a_connection_that_goes_on(
    serve: Callable[..., Live], engine_client: Any, cors: tuple[str, ...]
) -> None:
    """The refusal is whole, comes before the body, and the next requests of the connection are
    answered; a wrong key is told first, and HTTP/1.0 closes."""
    engine = Stuck(engine_client)
    live = serve(engine, max_queued_requests=1, api_key=("secret",), cors_origin=cors)
    key = {"authorization": "Bearer secret"}

    async def run() -> None:
        async with httpx.AsyncClient(base_url=live.url, timeout=30, headers=key) as client:
            waiting = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x"}))
            while live.service.admission.waiting < 1:
                await asyncio.sleep(0.01)
            reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
            post = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
            body = b"content-type: application/json\r\ncontent-length: 300000\r\n\r\n"
            named = b"authorization: Bearer secret\r\nx-request-id: mine\r\n"
            for head, status in ((post + body, 401), (post + named + body, 429)):
                writer.write(head)
                answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
                assert answer.startswith(b"HTTP/1.1 %d " % status), answer
                assert (b"x-request-id: mine" in answer) == (status == 429)
                assert (b"retry-after: " in answer) == (status == 429)
                length = int(answer.lower().partition(b"content-length: ")[2].split()[0])
                assert b'"error"' in await reader.readexactly(length)
                writer.write(b"x" * 300000)
                writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                answer = await asyncio.wait_for(reader.readuntil(b"}"), 5)
                assert answer.startswith(b"HTTP/1.1 200 "), answer
            writer.write(post.replace(b"1.1", b"1.0") + named + b"content-length: 0\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(), 5)  # to the end of the connection
            assert answer.startswith(b"HTTP/1.1 429 ") and b"connection: close" in answer
            writer.close()
            live.loop.loop.call_soon_threadsafe(engine.go.set)
            assert (await waiting).status_code == 200

    asyncio.run(run())
    assert live.service.metrics.stats()["requests"] == {"ok": 1, "rejected": 2}
    assert live.service.admission.open == 0


def test_silence_is_broken_by_comments(
    serve: Callable[..., Live], engine_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "SILENCE", 0.05)
    engine = Stuck(engine_client)
    live = serve(engine)
    lines = []
    with live.http.stream(
        "POST", "/v1/completions", json={"prompt": "x", "stream": True}
    ) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            if len(lines) == 4:
                live.loop.loop.call_soon_threadsafe(engine.go.set)
    assert lines[:4] == [": ping", "", ": ping", ""]
    assert lines[-2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_ends_the_request(live: Live, stream: bool) -> None:
    """Both in the middle of an answer: the engine holds nothing soon after."""
    live.idle()
    body = {"prompt": ["a", "b"], "n": 4, "max_tokens": 500, "ignore_eos": True, "stream": stream}
    before = live.service.metrics.stats()["requests"].get("cancelled", 0)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=live.url, timeout=30) as client:
            if stream:
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    async for _ in answer.aiter_lines():
                        break
            else:
                task = asyncio.create_task(client.post("/v1/completions", json=body))
                while live.service.engine.snapshot.running < 8:
                    await asyncio.sleep(0.005)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    began = time.monotonic()
    while live.service.admission.open:
        assert time.monotonic() - began < 2
        time.sleep(0.01)
    live.idle()
    assert time.monotonic() - began < 2
    assert live.service.engine.snapshot.pages_used == 0
    assert live.service.metrics.stats()["requests"]["cancelled"] == before + 1


def test_disconnect_while_waiting(serve: Callable[..., Live], engine_client: Any) -> None:
    engine = Stuck(engine_client)
    live = serve(engine)
    with pytest.raises(httpx.ReadTimeout):
        live.http.post("/v1/completions", json={"prompt": "x"}, timeout=0.3)
    until = time.monotonic() + 2
    while live.service.admission.open and time.monotonic() < until:
        time.sleep(0.01)
    assert live.service.admission.open == live.service.admission.waiting == 0
    assert engine.closed == 1


def test_drain_waits_for_what_was_let_in(serve: Callable[..., Live], engine_client: Any) -> None:
    """A request whose body is still on its way when the shutdown begins is served."""
    engine = Stuck(engine_client)
    live = serve(engine)
    engine.go.set()
    body = b'{"prompt": "x"}'

    def slowly() -> Iterator[bytes]:
        yield body[:5]
        until = time.monotonic() + 5
        while not live.service.admission.open:
            assert time.monotonic() < until
            time.sleep(0.01)
        live.service.draining = True
        assert live.http.post("/v1/completions", json={"prompt": "x"}).status_code == 503
        yield body[5:]

    with httpx.Client(base_url=live.url, timeout=10) as client:
        headers = {"content-type": "application/json"}
        answer = client.post("/v1/completions", content=slowly(), headers=headers)
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == "x"


def test_a_hang_is_told_after_the_time_that_was_set(
    serve: Callable[..., Live], engine_client: Any
) -> None:
    class Hung(SharedEngine):
        stalled = 20.0

    assert serve(Hung(engine_client), hang_seconds=30.0).http.get("/ready").status_code == 200
    answer = serve(Hung(engine_client)).http.get("/ready")
    assert answer.status_code == 503 and "no progress for 20 seconds" in answer.json()["reason"]
