"""The first thing that a request meets: its id, its key, and whether anybody can serve it.

Plain ASGI around the application, so that a request that is turned away costs next to nothing.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hmac
import ipaddress
import logging
import secrets
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hasten.serving.config import LOOPBACK
from hasten.serving.errors import ApiError, internal
from hasten.serving.events import RequestRecord
from hasten.serving.exchange import header
from hasten.serving.service import Service, clean_id

logger = logging.getLogger(__name__)

OPEN = frozenset({"/health", "/ready", "/ping"})
"""Routes that need no key: probes have none. They tell nothing but a condition."""

GENERATION: dict[str, Any] = {
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
    "/v1/embeddings": "embeddings",
}
MAX_HEADER_BYTES = 64 << 10

Refusal = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers and body of an answer."""


class Gate:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._door = Door(service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = arrive(scope)
        answered: list[int] = []

        async def reply(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered.append(message["status"])
                headers = [*message.get("headers", ()), *always(state)]
                message = {**message, "headers": headers}
            await send(message)

        try:
            key = self._door.check(scope)
            state["tenant"] = self._service.tenant(key)
            await self._app(scope, receive, reply)
        except ApiError as error:
            self._door.note(scope, state, error)
            await send_error(error, reply)
        except Exception:
            logger.exception("request %s failed", state["request_id"])
            if not answered:
                await send_error(internal(), reply)
        finally:
            if answered:
                self._service.metrics.responded(template(scope), answered[0])


class Door:
    """Who may come in."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._keys = [key.encode() for key in service.keys]

    def turn_away(self, scope: Scope) -> Refusal | None:
        """The whole answer to a generation request while there is no room; None = let the
        application see it.

        At ten times the load nine of ten requests end here, and what they cost is taken from the
        others: some 40 us on an open connection, where a task and the application's layers made
        it 90.
        """
        if (
            scope["path"] not in GENERATION
            or scope["method"] != "POST"
            or not self._service.admission.crowded
        ):
            return None
        state = arrive(scope)
        try:
            self.check(scope)
        except ApiError as error:
            self.note(scope, state, error)
            self._service.metrics.responded(scope["path"], error.status)
            body = error.body()
            return error.status, [*error_headers(error, body), *always(state)], body
        return None

    def check(self, scope: Scope) -> str | None:
        """The key of a request that may go on. Raises ApiError for any other."""
        headers = scope["headers"]
        if len(headers) > self._service.config.max_headers:
            limit = self._service.config.max_headers
            raise ApiError(431, f"more than max_headers={limit} header lines", code="headers")
        if sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            raise ApiError(431, f"more than {MAX_HEADER_BYTES} bytes of headers", code="headers")
        key = None
        if scope["path"] not in OPEN:
            key = self._key(scope)
            self._check_host(scope)
        if scope["path"] in GENERATION and scope["method"] == "POST":
            self._service.check_serving()
            self._service.admission.check_room()
        return key

    def _key(self, scope: Scope) -> str | None:
        """The key that a request carries, if keys are asked for. Raises ApiError (401)."""
        if not self._keys:
            return None
        given = offered(scope)
        found = None
        for key in self._keys:  # all of them, so that time tells nothing
            if given is not None and hmac.compare_digest(given, key):
                found = key
        if found is not None:
            return found.decode()
        what = "no API key was sent" if given is None else "the API key is wrong"
        raise ApiError(401, f"{what}; send 'Authorization: Bearer KEY'", code="invalid_api_key")

    def _check_host(self, scope: Scope) -> None:
        """Without a key, and reached from this machine only: refuse names of the Internet.

        A web page can let its own name point to 127.0.0.1 and would then be of the same origin as
        this server. Addresses and names without a dot cannot be had that way.
        """
        config = self._service.config
        if self._keys or config.host not in LOOPBACK:
            return
        name = _host_name(header(scope, b"host") or "")
        if "." not in name or name.endswith(".localhost"):
            return
        if name in map(str.lower, config.allowed_host):
            return
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            return
        raise ApiError(
            403,
            "this server has no API key and answers to localhost and addresses only, not to the "
            "name in the Host header; set a key, or name the host with --allowed-host",
            code="host_not_allowed",
        )

    def note(self, scope: Scope, state: dict[str, Any], error: ApiError) -> None:
        """Count a generation request that was turned away for want of room or of an engine."""
        route = GENERATION.get(scope["path"])
        if route is None or error.status not in (429, 503):
            return
        record = RequestRecord(id=state["request_id"], route=route, model=self._service.name)
        record.arrived = state["arrived"]
        outcome: Any = "rejected" if error.status == 429 else "failed"
        record.close(outcome, error.status, error.code)
        self._service.recorder.finished(record)


def arrive(scope: Scope) -> dict[str, Any]:
    """The state of a request that has just come: when, and under which id."""
    state: dict[str, Any] = scope.setdefault("state", {})
    state["arrived"] = time.monotonic()
    given = clean_id(header(scope, b"x-request-id"))
    state["request_id"] = given or f"req-{secrets.token_hex(12)}"
    return state


def always(state: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    """Headers of every answer."""
    return [
        (b"x-content-type-options", b"nosniff"),
        (b"x-request-id", state["request_id"].encode()),
    ]


def offered(scope: Scope) -> bytes | None:
    """The key in the Authorization header: after Bearer, or the password of Basic, for which
    browsers ask by themselves."""
    text = header(scope, b"authorization")
    if text is None:
        return None
    scheme, _, rest = text.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return None
    return None


def _host_name(host: str) -> str:
    """A Host header without its port and brackets."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower()


def template(scope: Scope) -> str:
    """The route's path as it was declared; metrics must not have a label for what clients type."""
    path = getattr(scope.get("route"), "path", None)
    if isinstance(path, str):
        return path
    return scope["path"] if scope["path"] in GENERATION or scope["path"] in OPEN else "other"


def error_headers(error: ApiError, body: bytes) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *error.headers(),
    ]


async def send_error(error: ApiError, send: Send) -> None:
    body = error.body()
    headers = error_headers(error, body)
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
