"""uvicorn's HTTP protocol with bounds on the head of a request: its bytes, and its time."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hasten.serving.errors import ApiError

HEAD_SECONDS = 30.0
"""Time for a request line with its headers, from the connection or from its first byte."""
HEAD_BYTES = 256 << 10
"""Bytes of a request line with its headers. The parser has no limit of its own."""

_BODY = ApiError(431, f"the request's head has more than {HEAD_BYTES} bytes", code="headers").body()
_REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
    b"connection: close\r\ncontent-length: " + str(len(_BODY)).encode() + b"\r\n\r\n" + _BODY
)


class BoundedHead(HttpToolsProtocol):
    """Ends a connection whose head does not end."""

    _head = 0
    """Bytes that came since the last head was complete, while one is open."""
    _open = True
    _late: asyncio.TimerHandle | None = None
    """Ends the connection, while a head is awaited. Between requests keep-alive does."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_head()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self._too_late)

    def _too_late(self) -> None:
        self._late = None
        if self.cycle is None or self.cycle.response_complete:  # else an answer is on its way
            self.transport.close()

    def _have_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def data_received(self, data: bytes) -> None:
        if self._open:
            self._await_head()
            if self._head > HEAD_BYTES:  # in what came before; this may hold the start of a body
                self.transport.write(_REFUSAL)
                self.transport.close()
                return
            self._head += len(data)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._open = False
        self._have_head()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._open, self._head = True, 0
