"""The client against a scripted server: bytes cut anywhere, errors, and time."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from hasten.bench.serving import metrics, session
from hasten.bench.serving.arrivals import Arrivals
from hasten.bench.serving.http import HttpClient
from hasten.bench.serving.load import Outcome, Planned, Target, run_load
from hasten.bench.serving.metrics import Slo
from hasten.bench.serving.plan import Shape, synthetic_rows
from hasten.bench.serving.prompts import RandomIds
from hasten.bench.serving.server_facts import ServerFacts, server_facts
from hasten.bench.serving.stream import StreamBroken, Timeline
from tests.bench.sse_server import (
    DONE,
    STREAM_END,
    STREAM_HEAD,
    FakeServer,
    chunked,
    cut,
    event,
    fake_server,
    piece,
    plain,
    stream_of,
    usage,
)

Answer = Callable[..., Awaitable[None]]


def planned(count: int, gap: float = 0.0, tokens: int = 4) -> list[Planned]:
    return [Planned(i * gap, [1, 2, 3], 3, tokens) for i in range(count)]


def load(answer: Answer, plan: list[Planned], timeout: float = 5.0, **options: Any) -> Any:
    """(server, outcomes) of a plan against a server that answers so."""

    async def run() -> tuple[FakeServer, list[Outcome]]:
        async with fake_server(answer) as server:
            client = HttpClient(server.url, "key")
            target = Target(client, "completions", "fake", {"x": 1, "min_tokens": None}, timeout)
            try:
                return server, await run_load(target, plan, **options)
            finally:
                client.close()
                await asyncio.sleep(0.01)

    return asyncio.run(run())


def test_a_stream_cut_at_any_byte_gives_the_same_timeline() -> None:
    rng = random.Random(5)
    whole = (
        b": ping\r\n\r\n"
        + piece("", finish=None)
        + piece("héllo ", [5])
        + piece("", [6, 7])  # tokens whose text is held back
        + b'data: {"choices": [{"text": "w\\u00f6rld"},\r\ndata: {"text": "no"}]}\r\n\r\n'
        + event({"choices": [{"text": " \U0001f600", "finish_reason": "length"}]})
        + usage(11, 5)
        + DONE
    )
    for _ in range(200):
        timeline = Timeline()
        for number, part in enumerate(cut(whole, rng)):
            timeline.feed(part, float(number))
        timeline.close()
        assert timeline.text == "héllo wörld \U0001f600"
        assert timeline.counts == [1, 2, 1, 1]
        assert timeline.times == sorted(timeline.times)
        assert (timeline.input_len, timeline.output_len, timeline.tokens) == (11, 5, 5)
        assert timeline.finish_reason == "length" and timeline.done


def test_chat_chunks_and_running_usage() -> None:
    timeline = Timeline()
    deltas: list[tuple[dict[str, Any], int]] = [
        ({"role": "assistant", "content": ""}, 0),
        ({"reasoning_content": "hm"}, 1),
        ({"content": "a"}, 4),
        ({"content": "b"}, 5),
    ]
    for at, (delta, told) in enumerate(deltas):
        counts = {"prompt_tokens": 3, "completion_tokens": told}
        timeline.feed(event({"choices": [{"delta": delta}], "usage": counts}), float(at))
    timeline.feed(event({"choices": [{"delta": {}, "finish_reason": "stop"}]}), 9.0)
    timeline.close()
    assert timeline.times == [1.0, 2.0, 3.0]  # neither the role nor the end is a token
    assert timeline.counts == [1, 3, 1] and timeline.text == "hmab"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (event({"error": {"message": "engine died"}}), "stream error"),
        (b"data: {broken\n\n", "bad stream"),
        (b"data: \xff\xfe\n\n", "bad stream"),
        (b"data: [1, 2]\n\n", "bad stream"),
        (b'data: {"choices": 5}\n\n', "bad stream"),
        (b"data: " + b"[" * 20_000 + b"\n\n", "bad stream"),
        (piece("x", [1]), "cut off"),
        (b"<html></html>", "cut off"),
        (b"", "cut off"),
    ],
)
def test_a_broken_stream_is_named(data: bytes, kind: str) -> None:
    timeline = Timeline()
    with pytest.raises(StreamBroken) as caught:
        timeline.feed(data, 0.0)
        timeline.close()
    assert caught.value.kind == kind


def test_an_endless_event_is_given_up() -> None:
    timeline = Timeline()
    with pytest.raises(StreamBroken, match="more than 16 MiB"):
        for _ in range(20):
            timeline.feed(b"x" * (1 << 20), 0.0)


def test_requests_say_what_they_should_and_answers_are_read() -> None:
    server, outcomes = load(stream_of(0), planned(5), max_concurrency=1, closed_loop=True)
    assert all(o.ok for o in outcomes)
    assert [o.timeline.tokens for o in outcomes] == [4] * 5
    assert outcomes[0].timeline.text == "t0 t1 t2 t3 "
    assert server.connections == 1  # kept alive
    body = server.bodies[0]
    assert body["prompt"] == [1, 2, 3] and body["max_tokens"] == 4 and body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True} and body["x"] == 1
    assert "min_tokens" not in body  # removed by a null
    assert server.headers[0]["authorization"] == "bearer key"


def test_bytes_cut_at_random_on_the_wire() -> None:
    async def answer(server: FakeServer, body: dict[str, Any], write: Any) -> None:
        text = b"".join(piece(f"ü{i}", [i]) for i in range(6)) + usage(3, 6) + DONE
        wire = STREAM_HEAD + b"".join(map(chunked, cut(text, random.Random(1)))) + STREAM_END
        for part in cut(wire, random.Random(len(server.bodies))):
            await write(part)
            await asyncio.sleep(0)

    _, outcomes = load(answer, planned(20))
    assert [o.timeline.text for o in outcomes] == ["ü0ü1ü2ü3ü4ü5"] * 20
    assert all(o.ok and o.timeline.counts == [1] * 6 for o in outcomes)


def test_failures_are_told_apart_and_none_stops_the_run() -> None:
    async def answer(server: FakeServer, body: dict[str, Any], write: Any) -> None:
        error = json.dumps({"error": {"message": "queue is full"}}).encode()
        turn = len(server.bodies)
        if turn == 1:
            await write(plain(429, error, "retry-after: 1\r\n"))
        elif turn == 2:
            await write(plain(500, b"oops"))
        elif turn == 3:  # closes within a stream
            await write(STREAM_HEAD + chunked(piece("x", [1])))
            raise ConnectionResetError
        elif turn == 4:  # ends the stream too early
            await write(STREAM_HEAD + chunked(piece("x", [1])) + STREAM_END)
        elif turn == 5:
            await write(STREAM_HEAD + chunked(event({"error": {"message": "late"}})) + STREAM_END)
        elif turn == 6:
            await write(b"garbage\r\n\r\n")
        elif turn == 7:
            await write(plain(200, b"{}"))  # not a stream
        elif turn == 8:
            await asyncio.sleep(3600)
        else:
            await stream_of(4)(server, body, write)

    _, outcomes = load(answer, planned(9, 0.02), timeout=1.0)
    kinds = [o.error for o in outcomes]
    assert kinds == [
        "http 429",
        "http 500",
        "connection",
        "cut off",
        "stream error",
        "connection",
        "cut off",
        "timeout",
        None,
    ]
    assert [o.message for o in outcomes[:2]] == ["queue is full", "oops"]
    assert outcomes[0].rejected and not outcomes[1].rejected
    result = metrics.summarize(outcomes, Slo(ttft=5.0))
    assert (result["completed"], result["failed"], result["rejected"]) == (1, 8, 1)
    assert result["slo_attainment"] == pytest.approx(1 / 9)


def test_nobody_there_is_an_outcome() -> None:
    async def run() -> list[Outcome]:
        client = HttpClient("http://127.0.0.1:9")
        return await run_load(Target(client, "completions", "m"), planned(2))

    outcomes = asyncio.run(run())
    assert [o.error for o in outcomes] == ["connection"] * 2
    assert "cannot connect to 127.0.0.1:9" in outcomes[0].message


def test_an_idle_connection_that_the_server_closed_costs_no_request() -> None:
    async def answer(server: FakeServer, body: dict[str, Any], write: Any) -> None:
        await stream_of(1)(server, body, write)
        raise ConnectionResetError  # closes after each answer, without saying so

    server, outcomes = load(answer, planned(6, 0.02))
    assert all(o.ok for o in outcomes) and server.connections == 6


def test_arrivals_do_not_wait_and_a_stall_is_charged_from_the_intended_time() -> None:
    """A server that answers nothing for half a second, then everything: all waited since their
    own arrival. A generator that waited for answers would have seen one slow request."""
    released = asyncio.Event()

    async def answer(server: FakeServer, body: dict[str, Any], write: Any) -> None:
        if len(server.bodies) == 1:
            asyncio.get_running_loop().call_later(0.5, released.set)
        await released.wait()
        await stream_of(1)(server, body, write)

    server, outcomes = load(answer, planned(10, 0.04))
    assert server.connections == 10
    waits = [metrics.ttft(o) for o in outcomes]
    for number, wait in enumerate(waits):
        assert 0.48 - 0.04 * number < wait < 1.5
    gaps = [b.arrived - a.arrived for a, b in itertools.pairwise(outcomes)]
    assert gaps == pytest.approx([0.04] * 9)  # intended, not actual


def test_a_late_client_is_reported() -> None:
    async def answer(server: FakeServer, body: dict[str, Any], write: Any) -> None:
        if len(server.bodies) == 3:
            time.sleep(0.2)  # in this process: the generator cannot run either
        await stream_of(1)(server, body, write)

    _, outcomes = load(answer, planned(20, 0.02))
    result = metrics.summarize(outcomes, Slo())
    assert result["late_client"] and result["p99_lateness_ms"] > 100
    assert max(metrics.ttft(o) for o in outcomes) > 0.15  # the lateness is in the latency


def test_concurrency_is_bounded_open_and_closed() -> None:
    now = most = 0

    async def answer(server: FakeServer, body: dict[str, Any], write: Any) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        await stream_of(1)(server, body, write)

    _, outcomes = load(answer, planned(12), max_concurrency=3)
    assert most == 3
    # open loop: all arrived at once, so the last waited for three others; that is latency, and no
    # lateness of the client
    last = outcomes[-1]
    assert last.due - last.arrived > 0.05 and metrics.ttft(last) > 0.07
    _, outcomes = load(answer, planned(12), max_concurrency=3, closed_loop=True)
    assert most == 3
    last = outcomes[-1]
    assert last.due == last.arrived > outcomes[0].arrived + 0.05  # it arrived when it had a place


def test_an_interrupt_keeps_what_is_done_and_drops_the_rest() -> None:
    seen: list[tuple[int, int]] = []

    async def answer(server: FakeServer, body: dict[str, Any], write: Any) -> None:
        await stream_of(0, 0.0 if len(server.bodies) <= 3 else 3600.0)(server, body, write)

    _, outcomes = load(
        answer,
        planned(1000, 0.02),
        watch=lambda so_far: seen.append((len(so_far), sum(o.ok for o in so_far))),
        interrupted=lambda: bool(seen) and seen[-1][0] >= 10 and seen[-1][1] == 3,
    )
    assert 10 <= len(outcomes) < 500
    assert [o.error for o in outcomes] == [None] * 3 + ["unfinished"] * (len(outcomes) - 3)
    assert metrics.summarize(outcomes, Slo())["error_kinds"]["unfinished"] == len(outcomes) - 3


def test_goodput_search_against_a_server_with_one_place() -> None:
    """One place of 10 ms: the rate that can be sustained lies below 100/s."""

    async def run() -> Any:
        place = asyncio.Lock()

        async def answer(server: FakeServer, body: dict[str, Any], write: Any) -> None:
            async with place:
                await asyncio.sleep(0.01)
            await stream_of(1)(server, body, write)

        async with fake_server(answer) as server:
            client = HttpClient(server.url)
            target = Target(client, "completions", "fake", timeout=20)
            shape = Shape(synthetic_rows(30, 8, 1, 0, 0), Arrivals("constant"), 40.0, 0)
            found = await session.search_goodput(
                target,
                shape,
                lambda seed: RandomIds(500, seed),
                Slo(ttft=0.1),
                start=40.0,
                grain=0.25,
            )
            client.close()
            return server, found

    server, found = asyncio.run(run())
    assert found.converged and 5 < found.rate < 200
    assert any(p.decided for p in found.probes)  # the hopeless rates were given up early
    prompts = [tuple(b["prompt"]) for b in server.bodies if b["prompt"] != "Hello"]
    assert len(set(prompts)) == len(prompts)  # no probe can be served from an earlier one's cache


def test_a_server_that_refuses_everything_is_no_measurement() -> None:
    async def answer(server: FakeServer, body: dict[str, Any], write: Any) -> None:
        await write(plain(400, b'{"error": {"message": "ignore_eos is unknown"}}'))

    async def run() -> None:
        async with fake_server(answer) as server:
            target = Target(HttpClient(server.url), "completions", "fake")
            rows = synthetic_rows(3, 4, 2, 0, 0)
            await session.warm_up(target, rows, 2, lambda seed: RandomIds(9, seed), 0)

    with pytest.raises(session.TargetRefuses, match=r"http 400.*ignore_eos is unknown"):
        asyncio.run(run())


def test_what_a_server_tells_of_itself() -> None:
    async def run(models: Any) -> ServerFacts:
        async with fake_server(stream_of(1)) as server:
            server.models = models
            return await server_facts(HttpClient(server.url + "/v1/"))

    assert asyncio.run(run({"data": [{"id": "a", "max_model_len": 7}]})) == ServerFacts("a", 7)
    assert asyncio.run(run({"data": [{"id": "a", "meta": None}]})) == ServerFacts("a")
    for bad in ({}, {"data": []}, [], {"data": [{}]}):
        with pytest.raises(ValueError, match="lists no model"):
            asyncio.run(run(bad))


def test_bad_addresses_and_keys() -> None:
    for url in ("", "127.0.0.1:8000", "ftp://x", "http://"):
        with pytest.raises(ValueError, match="not a server's address"):
            HttpClient(url)
    with pytest.raises(ValueError, match="printable"):
        HttpClient("http://x", "a\r\nb")
