"""uvicorn's HTTP protocol with bounds on the head of a request (its bytes, its time), and a short
way out for requests that find no room."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from hasten.serving.errors import ApiError
from hasten.serving.gate import Door
from hasten.serving.service import Service

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
    """Ends a connection whose head does not end, and turns away at the door."""

    door: Door | None = None
    """Set by `protocol_of`; None: the application decides everything."""

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

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        refusal = None if self.door is None else self.door.turn_away(cycle.scope)
        if refusal is None:
            super()._start_asgi_task(cycle, app)
            return
        status, headers, body = refusal
        parts = [STATUS_LINE[status]]
        for name, value in (*self.server_state.default_headers, *headers):
            parts += (name, b": ", value, b"\r\n")
        if not cycle.keep_alive:
            parts.append(b"connection: close\r\n")
        self.transport.write(b"".join((*parts, b"\r\n", body)))
        cycle.response_started = cycle.response_complete = True  # what comes of a body is dropped
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()


def protocol_of(service: Service) -> type[BoundedHead]:
    """The protocol for one server. With ``cors_origin``, refusals too need headers that only the
    application adds, so there the door stays out of it."""
    if service.config.cors_origin:
        return BoundedHead
    return type("BoundedHeadWithDoor", (BoundedHead,), {"door": Door(service)})
