"""Errors as clients of the OpenAI API expect them."""

from __future__ import annotations

import msgspec

MAX_MESSAGE = 500
"""Characters of an error message: what a client sent is never sent back at length."""

INTERNAL = "internal error; the server's log has the details under this request's id"

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        param: the field at fault, if it is one field.
        code: short fixed word for programs.
        retry_after: seconds, for 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "…"
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> bytes:
        """The JSON object of the response, which is also the event of an error in a stream."""
        kind = _TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that belong to the status."""
        found = []
        if self.retry_after is not None:
            found.append((b"retry-after", str(self.retry_after).encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b'Basic realm="hasten", charset="UTF-8"'))
        return found


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong (400)."""
    return ApiError(400, message, param=param, code=code)


def unsupported(field: str, instead: str = "") -> ApiError:
    """A field that would change the answer and that this server does not have yet (400)."""
    hint = f" {instead}" if instead else ""
    return invalid(f"{field} is not supported as yet.{hint}", field, "unsupported")


def internal() -> ApiError:
    return ApiError(500, INTERNAL, code="internal_error")
