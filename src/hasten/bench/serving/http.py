"""A small HTTP/1.1 client for load: kept-alive connections, bodies handed on as they arrive.

General clients cost a large part of a millisecond per request and per streamed chunk, which a
generator that shares the machine with its server takes from the server. This one is a protocol
around `httptools` without a coroutine per chunk, and every piece of body carries the time at which
its bytes were read from the socket.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

Sink = Callable[[bytes, float], None]
"""Takes a piece of a body and the `time.monotonic` at which it was read."""

MAX_KEPT = 1 << 20  # bytes of an answer kept where nobody takes it piece by piece


class ConnectionFailed(OSError):
    """No answer: the connection could not be made, or ended before the answer did."""


@dataclass
class Response:
    """An answer. ``body`` is empty where a sink took it, and cut at ``MAX_KEPT`` bytes."""

    status: int
    headers: dict[str, str]
    body: bytes
    ended: float
    """`time.monotonic` at which its last byte was read."""


@dataclass
class _Exchange:
    """One request on a connection, until its answer is complete."""

    answer: asyncio.Future[Response]
    sink: Sink | None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    began: bool = False


class _Connection(asyncio.Protocol):
    """One socket: one exchange at a time."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.exchange: _Exchange | None = None
        self.open = True
        self.reused = False
        self._read = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, data: bytes, exchange: _Exchange) -> None:
        self.exchange = exchange
        self._parser = httptools.HttpResponseParser(self)
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        self._read = time.monotonic()
        if self.exchange is None:  # bytes that nobody asked for
            self.close()
            return
        self.exchange.began = True
        try:
            self._parser.feed_data(data)
        except Exception as error:  # bad HTTP, or the sink refused what it was given
            cause = error.__context__ if isinstance(error, httptools.HttpParserError) else error
            self._fail(cause if isinstance(cause, ValueError) else ConnectionFailed(str(error)))
            self.close()

    # called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        assert self.exchange is not None
        self.exchange.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        exchange = self.exchange
        assert exchange is not None
        if exchange.sink is not None and self._parser.get_status_code() == 200:
            exchange.sink(body, self._read)
        elif len(exchange.body) < MAX_KEPT:
            exchange.body += body[: MAX_KEPT - len(exchange.body)]

    def on_message_complete(self) -> None:
        exchange, self.exchange = self.exchange, None
        assert exchange is not None
        self.reused = True
        if not self._parser.should_keep_alive():
            self.close()
        self._resolve(exchange)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        exchange = self.exchange
        if exchange is None:
            return
        counted = exchange.headers.keys() & {"content-length", "transfer-encoding"}
        if exc is None and exchange.began and exchange.headers and not counted:
            # a body that lasts until the connection ends
            self._read, self.exchange = time.monotonic(), None
            self._resolve(exchange)
            return
        self._fail(ConnectionFailed(f"the server closed the connection{f' ({exc})' * bool(exc)}"))

    def _resolve(self, exchange: _Exchange) -> None:
        if not exchange.answer.done():
            exchange.answer.set_result(
                Response(
                    self._parser.get_status_code(),
                    exchange.headers,
                    bytes(exchange.body),
                    self._read,
                )
            )

    def _fail(self, error: Exception) -> None:
        exchange, self.exchange = self.exchange, None
        if exchange is not None and not exchange.answer.done():
            exchange.answer.set_exception(error)

    def close(self) -> None:
        self.open = False
        self.transport.abort()


class HttpClient:
    """Requests to one server. Connections are kept and used again, the latest first."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"'{base_url}' is not a server's address, such as http://127.0.0.1:8000"
            )
        self._host = parts.hostname
        self._secure = parts.scheme == "https"
        self._port = parts.port or (443 if self._secure else 80)
        # some name their server, some their API: .../v1 is accepted, as the openai client has it
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        headers = [f"Host: {parts.netloc.rpartition('@')[2]}", "User-Agent: hasten-bench"]
        if api_key is not None:
            if not api_key.isascii() or not api_key.isprintable():
                raise ValueError("an API key has only printable ASCII characters")
            headers.append(f"Authorization: Bearer {api_key}")
        self._head = "\r\n".join(headers)
        self._idle: list[_Connection] = []
        self._address: tuple[str, int] | None = None

    def encode(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a request; making them beforehand keeps that out of the measured time."""
        content = f"\r\nContent-Type: application/json\r\nContent-Length: {len(body)}" * bool(body)
        return (
            f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}{content}\r\n\r\n".encode() + body
        )

    async def send(self, data: bytes, sink: Sink | None = None) -> Response:
        """Send an encoded request and wait for the end of its answer.

        A ``sink`` takes the body of an answer with status 200 as it arrives. Cancelling closes the
        connection, which tells the server that nobody waits any more.

        Raises:
            ConnectionFailed: no complete answer.
            ValueError: the sink could not make sense of what it was given.
        """
        while True:
            connection = self._take_idle() or await self._connect()
            again = connection.reused
            exchange = _Exchange(asyncio.get_running_loop().create_future(), sink)
            connection.send(data, exchange)
            try:
                response = await exchange.answer
            except ConnectionFailed:
                if again and not exchange.began:
                    continue  # the server had given up an idle connection: not its answer
                raise
            except asyncio.CancelledError:
                connection.close()
                raise
            if connection.open:
                self._idle.append(connection)
            return response

    async def get(self, path: str) -> Response:
        return await self.send(self.encode("GET", path))

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        secure: dict[str, Any] = {}
        if self._secure:
            secure = {"ssl": ssl.create_default_context(), "server_hostname": self._host}
        host, port = self._address or (self._host, self._port)
        try:
            transport, connection = await loop.create_connection(_Connection, host, port, **secure)
        except OSError as error:
            raise ConnectionFailed(
                f"cannot connect to {self._host}:{self._port}: {error.strerror or error}"
            ) from None
        # a name is looked up once: a lookup per connection would be part of what is measured
        self._address = transport.get_extra_info("peername")[:2]
        return connection
