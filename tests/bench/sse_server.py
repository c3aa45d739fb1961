"""A tiny OpenAI-like server for tests: answers as scripted, cuts its bytes where it likes."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any


class FakeServer:
    """``answer(server, body, write)`` writes the answer to one POST; GET lists a model.

    Attributes:
        bodies: of all POST requests, in order of arrival.
        dropped: how many clients went away before their answer was complete.
    """

    def __init__(self, answer: Callable[..., Awaitable[None]]) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.connections = 0
        self.dropped = 0
        self.url = ""
        self.models: dict[str, Any] = {
            "data": [{"id": "fake", "max_model_len": 4096, "meta": {"n_vocab": 500}}]
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1

        async def write(data: bytes) -> None:
            if writer.is_closing():
                raise ConnectionResetError
            writer.write(data)
            await writer.drain()

        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.headers.append(headers)
                if lines[0].startswith("GET"):
                    await write(plain(200, json.dumps(self.models).encode()))
                else:
                    self.bodies.append(json.loads(body))
                    await self.answer(self, self.bodies[-1], write)
        except asyncio.IncompleteReadError:
            pass
        except ConnectionError:
            self.dropped += 1
        finally:
            writer.close()


@asynccontextmanager
async def fake_server(answer: Callable[..., Awaitable[None]]) -> AsyncIterator[FakeServer]:
    fake = FakeServer(answer)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0, limit=1 << 24)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.close()


def plain(status: int, body: bytes, headers: str = "") -> bytes:
    return (
        f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{headers}"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
STREAM_END = b"0\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data) if data else b""


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def piece(text: str, ids: list[int] | None = None, finish: str | None = None) -> bytes:
    choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": finish}
    if ids is not None:
        choice["token_ids"] = ids
    return event({"object": "text_completion", "choices": [choice], "usage": None})


def usage(prompt: int, output: int) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": output}
    return event({"choices": [], "usage": counts})


DONE = b"data: [DONE]\n\n"


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    """The same bytes in pieces of random sizes."""
    pieces = []
    while data:
        size = rng.randint(1, 20)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def stream_of(tokens: int, delay: float = 0.0) -> Callable[..., Awaitable[None]]:
    """Answers every request with a stream: one token a piece, ``tokens`` or as many as asked."""

    async def answer(server: FakeServer, body: dict[str, Any], write: Any) -> None:
        count = tokens or body["max_tokens"]
        await write(STREAM_HEAD)
        for i in range(count):
            if delay:
                await asyncio.sleep(delay)
            await write(chunked(piece(f"t{i} ", [i], "length" if i == count - 1 else None)))
        prompt = body["prompt"] if "prompt" in body else body["messages"]
        await write(chunked(usage(len(prompt), count) + DONE) + STREAM_END)

    return answer
