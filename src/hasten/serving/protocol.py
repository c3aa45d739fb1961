"""uvicorn's HTTP protocol with a bound on the head of a request."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hasten.serving.errors import ApiError

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

    def data_received(self, data: bytes) -> None:
        if self._open:
            if self._head > HEAD_BYTES:  # in what came before; this may hold the start of a body
                self.transport.write(_REFUSAL)
                self.transport.close()
                return
            self._head += len(data)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._open = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._open, self._head = True, 0
