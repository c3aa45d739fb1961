"""Request bombs: refused by name, quickly, in bounded memory, while others are served."""

from __future__ import annotations

import contextlib
import json
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from hasten.serving import bodies, protocol
from hasten.serving.bodies import check_bulk, check_depth
from hasten.serving.errors import ApiError
from tests.serving.conftest import Command, Live

SECONDS = 1.0
EXTRA_BYTES = 256 << 20
LAG = 0.2
"""Seconds that /health may take meanwhile, on a machine that other tests share."""


class Peak:
    """Watches the server's memory, and how long it leaves callers of /health waiting."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.start = self.peak = command.resident()
        self.lags = [0.0]

    def _watch(self) -> None:
        with httpx.Client(base_url=self._command.url) as client:
            while not self._stop.wait(0.005):
                asked = time.perf_counter()
                client.get("/health")
                self.lags.append(time.perf_counter() - asked)
                self.peak = max(self.peak, self._command.resident())

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    server = Command(tmp_path_factory.mktemp("serve"), "--max-length", "512")
    yield server
    server.close()


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGE = '{"role": "user", "content": "x"}'


def fields(**values: Any) -> str:
    return json.dumps({"prompt": "x", "max_tokens": 1, **values})


def messages(extra: str, message: str = MESSAGE) -> str:
    return f'{{"messages": [{message}]{extra}}}'


BOMBS: dict[str, tuple[str, Callable[[], bytes | str]]] = {
    "n": (COMPLETIONS, lambda: fields(n=10**9)),
    "best_of": (COMPLETIONS, lambda: fields(best_of=10**9)),
    "prompt_logprobs": (COMPLETIONS, lambda: fields(prompt_logprobs=-1)),
    "logprobs": (COMPLETIONS, lambda: fields(logprobs=10**6)),
    "integer": (COMPLETIONS, lambda: '{"prompt": "x", "seed": ' + "9" * 10_000 + "}"),
    "logit_bias": (COMPLETIONS, lambda: fields(logit_bias=dict.fromkeys(range(10**6), 1.0))),
    "stop": (COMPLETIONS, lambda: fields(stop=["x"] * 10**4)),
    "stop-length": (COMPLETIONS, lambda: fields(stop="x" * 10**6)),
    "stop-tokens": (COMPLETIONS, lambda: fields(stop_token_ids=list(range(10**5)))),
    "bad-words": (COMPLETIONS, lambda: fields(bad_words=["x"] * 10**5)),
    "prompts": (COMPLETIONS, lambda: fields(prompt=["x"] * 10**5)),
    "empty-lists": (COMPLETIONS, lambda: '{"prompt": [' + "[]," * 10**7 + "[]]}"),
    "ids": (COMPLETIONS, lambda: '{"prompt": [' + "999," * (7 << 20) + "1]}"),
    "text": (COMPLETIONS, lambda: fields(prompt="x " * (10 << 20))),
    "escaped": (COMPLETIONS, lambda: fields(prompt="日本" * (2 << 20))),
    "quotes": (COMPLETIONS, lambda: fields(prompt='"' * (14 << 20))),
    "backslashes": (COMPLETIONS, lambda: fields(prompt="\\" * (14 << 20))),
    "depth": (COMPLETIONS, lambda: '{"prompt": ' + deep(10**4) + "}"),
    "depth-unknown": (COMPLETIONS, lambda: '{"x": ' + deep(10**4) + ', "prompt": "x"}'),
    "depth-refused": (COMPLETIONS, lambda: '{"guided_json": ' + deep(10**4) + ', "prompt": "x"}'),
    "depth-message": (CHAT, lambda: messages("", MESSAGE[:-1] + ', "y": ' + deep(10**4) + "}")),
    "depth-900": (CHAT, lambda: messages("", MESSAGE[:-1] + ', "y": ' + deep(900) + "}")),
    "depth-100": (CHAT, lambda: messages("", MESSAGE[:-1] + ', "y": ' + deep(100) + "}")),
    "depth-kwargs": (CHAT, lambda: messages(', "chat_template_kwargs": {"a":' + deep(900) + "}")),
    "depth-tools": (CHAT, lambda: messages(', "tools": [{"a":' + deep(900) + "}]")),
    "messages": (CHAT, lambda: messages("", ",".join([MESSAGE] * 10**5))),
    "regex": (CHAT, lambda: messages(', "guided_regex": "' + "a|" * 10**5 + '"')),
    "structure": (
        CHAT,
        lambda: messages(', "structured_outputs": {"regex": "' + "a|" * 10**5 + '"}'),
    ),
    "structure-depth": (
        COMPLETIONS,
        lambda: '{"structured_outputs": {"json": {"not": ' + deep(10**4) + '}}, "prompt": "x"}',
    ),
    "structure-costly": (
        COMPLETIONS,
        lambda: fields(prompt="x", structured_outputs={"regex": "(a|aa|aaa)*" * 1500}),
    ),
    "no-json": (COMPLETIONS, lambda: b"\xff\xfe"),
    "half-a-character": (COMPLETIONS, lambda: '{"prompt": "\\ud800"}'),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb(command: Command, name: str) -> None:
    route, build = BOMBS[name]
    body = build()
    data = body.encode() if isinstance(body, str) else body
    for attempt in range(3):  # a busy machine is not the server's fault, slow three times is
        with Peak(command) as peak:
            began = time.perf_counter()
            answer = command.http.post(
                route, content=data, headers={"content-type": "application/json"}
            )
            took = time.perf_counter() - began
        assert answer.status_code == 400, answer.text[:300]
        error = answer.json()["error"]
        assert error["message"] and len(answer.content) < 1500, "large inputs are not sent back"
        assert peak.peak - peak.start < EXTRA_BYTES
        if (took < SECONDS and max(peak.lags) < LAG) or attempt == 2:
            break
    assert took < SECONDS
    assert max(peak.lags) < LAG, "the event loop was held up"


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_a_body_of_100_mb_is_refused_on_the_way(command: Command, declared: bool) -> None:
    length = b"content-length: %d" % (100 << 20) if declared else b"transfer-encoding: chunked"
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        + length
        + b"\r\n\r\n"
    )
    part = b" " * (1 << 20)
    if not declared:
        part = b"%x\r\n" % len(part) + part + b"\r\n"
    answer, sent = b"", 0
    with (
        Peak(command) as peak,
        socket.create_connection(("127.0.0.1", int(command.url.rpartition(":")[2]))) as connection,
    ):
        connection.sendall(head)
        while not answer and sent < 100:
            connection.sendall(part)
            sent += 1
            if select.select([connection], [], [], 0.001)[0]:
                answer = connection.recv(65536)
        while answer and b"}}" not in answer:
            answer += connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413") and b"max_body_bytes" in answer
    assert sent < (10 if declared else 50)
    assert peak.peak - peak.start < EXTRA_BYTES


def test_caps_name_the_limit_and_its_value(serve: Callable[..., Live]) -> None:
    live = serve(
        max_n=2, max_logprobs=3, max_stop=1, max_logit_bias=1, max_best_of=2, max_prompts=2
    )
    for field, value, limit in (
        ("n", 3, "max_n=2"),
        ("logprobs", 4, "max_logprobs=3"),
        ("stop", ["a", "b"], "max_stop=1"),
        ("logit_bias", {"1": 1, "2": 1}, "max_logit_bias=1"),
        ("best_of", 3, "max_best_of=2"),
        ("prompt", ["a", "b", "c"], "max_prompts=2"),
        ("prompt", "1 " * 600, "max_length=512"),
    ):
        answer = live.http.post("/v1/completions", json={"prompt": "x", field: value})
        assert answer.status_code == 400
        assert limit in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == field


def test_max_tokens_alone_beyond_the_context_is_named(live: Live) -> None:
    """The prompt is not at fault: nobody should be told to shorten it."""
    message = {"role": "user", "content": "hi"}
    for route, rest in (
        ("/v1/completions", {"prompt": "hi", "max_tokens": 512}),
        ("/v1/chat/completions", {"messages": [message], "max_completion_tokens": 10**15}),
    ):
        error = live.http.post(route, json=rest).json()["error"]
        assert error["param"] == "max_tokens" and error["code"] == "context_length_exceeded"
        assert "max_length=512" in error["message"] and "shorten" not in error["message"]
        most = int(error["message"].rpartition(" ")[2])
    answer = live.http.post("/v1/completions", json={"prompt": "hi", "max_tokens": most})
    assert answer.status_code == 200


def raw(live: Live, head: bytes, parts: int = 1) -> bytes:
    """What the server says to bytes that no HTTP library would send."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as connection:
        try:
            for _ in range(parts):
                connection.sendall(head)
        except OSError:
            pass  # it closed: what it said is still there
        return connection.recv(65536)


def test_headers_are_bounded(live: Live) -> None:
    began = time.perf_counter()
    many = b"".join(b"x-%d: 1\r\n" % i for i in range(10**4))
    assert raw(live, b"GET /health HTTP/1.1\r\nhost: x\r\n" + many + b"\r\n").startswith(
        b"HTTP/1.1 431"
    )
    long = b"GET /health HTTP/1.1\r\nhost: x\r\nlong: " + b"x" * (100 << 10) + b"\r\n\r\n"
    assert raw(live, long).startswith(b"HTTP/1.1 431")
    assert time.perf_counter() - began < SECONDS


def test_a_head_without_end_is_cut_off(live: Live) -> None:
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nlong: ")
        with pytest.raises(OSError):
            for _ in range(1000):
                connection.sendall(b"x" * 65536)
                time.sleep(0.001)
    assert live.http.get("/health").status_code == 200


def answered(connection: socket.socket) -> None:
    """Read one good answer, a JSON object."""
    got = b""
    while not got.endswith(b"}"):
        part = connection.recv(65536)
        assert part, "closed without an answer"
        got += part
    assert got.startswith(b"HTTP/1.1 200")


def test_a_head_that_does_not_come_is_cut_off(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at the start of a connection nor byte by byte nor after a first request; what is
    quiet between two requests, and what waits for its answer, stays."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    whole = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    for begun in (b"", b"GET /health HTTP/1.1\r\nlong: ", whole + whole[:9]):
        with socket.create_connection(("127.0.0.1", live.port), timeout=5) as connection:
            began = time.monotonic()
            connection.sendall(begun)
            if begun.startswith(whole):
                answered(connection)
                connection.sendall(whole[9:10])
            while select.select([connection], [], [], 0.05)[0] == []:
                assert time.monotonic() - began < 3
                if begun:
                    connection.send(b"x")
            with contextlib.suppress(ConnectionResetError):  # a byte was on its way
                assert connection.recv(65536) == b""
    body = b'{"prompt": "x", "max_tokens": 300, "ignore_eos": true}'
    post = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    post += b"content-length: %d\r\n\r\n" % len(body) + body + b"\r\n"  # some add a line
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as connection:
        connection.sendall(post)
        answered(connection)
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as connection:
        for _ in range(2):
            connection.sendall(whole)
            answered(connection)
            time.sleep(0.5)


def test_bulk_check_finds_long_texts_only() -> None:
    filler = b'"a": "' + b"x " * 200_000 + b'", '
    short = b"{" + filler + b'"b": "' + b'\\"' * 50_000 + b'"}'
    check_bulk(short, 400_000)
    with pytest.raises(ApiError, match="too long"):
        check_bulk(short, 399_999)
    escaped = b'{"a": "' + b"\\u0041" * 60_000 + b'"}'  # 60,000 characters in 360,000 bytes
    check_bulk(escaped, 60_000)
    with pytest.raises(ApiError):
        check_bulk(escaped, 59_000)
    for slashes in (1, 2, 3, 63, 64, 65, 5000):  # an odd number escapes the quote after it
        text = b'{"a": "' + b"\\" * slashes + b'"' + b"y" * 300_000 + b'"}'
        if slashes % 2:
            with pytest.raises(ApiError):
                check_bulk(text, 200_000)


def random_json(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if depth > 3 or kind < 0.5:
        size = rng.choice([0, 1, 5, 60, 300])
        return "".join(
            rng.choice(["a", '"', "\\", "é", "\n", ",", "[", "{", ":"]) for _ in range(size)
        )
    if kind < 0.8:
        return [random_json(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {random_json(rng, 9): random_json(rng, depth + 1) for _ in range(rng.randrange(5))}


def texts_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    else:
        for item in [*value, *(value.values() if isinstance(value, dict) else ())]:
            yield from texts_of(item)


def test_bulk_check_on_random_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """In slices of 64 bytes, so that texts and escapes are cut everywhere: what fits is never
    refused, and what is too long by a byte is, if no escapes hide it."""
    monkeypatch.setattr(bodies, "SLICE", 64)
    monkeypatch.setattr(bodies, "BULKY", 0)
    rng = random.Random(1)
    refused = 0
    for number in range(1500):
        value = random_json(rng)
        longest = max(texts_of(value), key=lambda text: len(text.encode()), default="")
        size = len(longest.encode())
        ascii_only = number % 2 == 0
        body = json.dumps(value, ensure_ascii=ascii_only).encode()
        check_bulk(body, max(size, 1))
        if size > 1 and "\\" not in json.dumps(longest, ensure_ascii=ascii_only):
            refused += 1
            with pytest.raises(ApiError):
                check_bulk(body, size - 1)
    assert refused > 20


def test_depth_is_counted_without_recursion() -> None:
    value: Any = 1
    for _ in range(50_000):
        value = [value]
    with pytest.raises(ApiError, match="max_json_depth=64"):
        check_depth("tools", value, 64)
    check_depth("tools", {"a": [{"b": 1}]}, 4)
    while isinstance(value, list):  # freeing it recursively would overflow the stack
        value = value[0]
