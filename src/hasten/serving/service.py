"""What all routes share: the engine, the tokenizer, the queue, the metrics, and the server's
condition (loading, serving, draining, stopped)."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import hasten
from hasten.decoding.params import SamplingParams
from hasten.serving.admission import Admission
from hasten.serving.config import Effective
from hasten.serving.errors import ApiError, invalid
from hasten.serving.events import Recorder
from hasten.serving.messages import EngineFacts, Piece, Snapshot
from hasten.serving.metrics import QueueState, ServerMetrics
from hasten.serving.prompts import Prompter

if TYPE_CHECKING:
    from hasten.serving.exchange import Exchange

logger = logging.getLogger(__name__)

Body = bytes | bytearray
T = TypeVar("T")

INLINE = 4 << 10
"""Bodies up to this size are handled on the event loop: a thread would cost more."""
WORKERS = 2
"""Threads for larger bodies. Tokenizing lets other threads run; more would only take cores from
the engine."""


def clean_id(text: str | None) -> str | None:
    """A text that a client chose, if it can stand in headers and logs."""
    if text is None or not 0 < len(text) <= 128 or not text.isascii() or not text.isprintable():
        return None
    return text


class Engine(Protocol):
    """What the HTTP side needs of `hasten.serving.engine_client.EngineClient`."""

    facts: EngineFacts
    snapshot: Snapshot
    dead: asyncio.Event

    @property
    def alive(self) -> bool: ...

    @property
    def stalled(self) -> float: ...

    @property
    def why(self) -> str: ...

    async def start(self) -> EngineFacts: ...

    def stream(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        tenant: str = "",
        priority: int = 0,
        embed: bool = False,
    ) -> AsyncGenerator[Piece, None]: ...

    def kill(self, why: str) -> None: ...

    async def close(self) -> None: ...


class Service:
    """One server. Used from the event loop; ``load`` comes first."""

    def __init__(self, effective: Effective, engine: Engine) -> None:
        self.effective = effective
        self.config = config = effective.config
        self.engine = engine
        self.keys = config.keys()
        self.name = config.names[0]
        self.metrics = ServerMetrics(self.name, compat=config.metrics_compat == "vllm")
        self.recorder = Recorder(self.metrics, config.request_log)
        self.admission = Admission(config.queued_requests, config.max_body_bytes)
        self.exchanges: set[Exchange] = set()
        self.draining = False
        self.started = time.time()
        self._prompter: Prompter | None = None
        self._numbers = itertools.count()
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="hasten-http")

    async def load(self) -> None:
        """Wait for the engine, then load the tokenizer. Raises ``EngineStopped``, or
        ``CheckpointError``."""
        facts = await self.engine.start()
        self.admission.max_tokens = self.config.queued_tokens(facts)
        prompter = await asyncio.to_thread(Prompter, facts, self.config)
        self.metrics.collect_from(facts, lambda: self.engine.snapshot, self._queue)
        self._prompter = prompter

    async def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        await self.engine.close()
        await asyncio.to_thread(self.recorder.close)

    # ---- condition ----------------------------------------------------------------------------

    @property
    def prompter(self) -> Prompter:
        """Raises ApiError (503) while the model loads."""
        if self._prompter is None:
            raise self.away("the model is loading", "loading", 2)
        return self._prompter

    def not_ready(self) -> str | None:
        """Why requests should go elsewhere; None = ready."""
        if self.engine.dead.is_set():
            return "the engine has stopped"
        if self._prompter is None:
            return "the model is loading"
        if self.draining:
            return "the server is shutting down"
        if self.stalled:
            return f"the engine has made no progress for {self.engine.stalled:.0f} seconds"
        return None

    @property
    def stalled(self) -> bool:
        """Whether the engine has given no sign of progress for too long; one comes every second."""
        return self.engine.stalled > self.config.hang_seconds

    def check_serving(self) -> None:
        """Raises ApiError (503) if new requests cannot be served."""
        if self.engine.dead.is_set():
            raise self.stopped()
        if self.draining:
            raise self.away("the server is shutting down", "draining", 5)
        if self._prompter is None:
            raise self.away("the model is loading", "loading", 2)

    def stopped(self) -> ApiError:
        return self.away("the engine has stopped; the server is ending", "engine_stopped", 10)

    def away(self, why: str, code: str, retry_after: int = 5) -> ApiError:
        return ApiError(503, why, code=code, retry_after=retry_after)

    def cut_all(self, error: ApiError) -> None:
        """End every request under way with an error."""
        for exchange in list(self.exchanges):
            exchange.cut(error)

    # ---- shared by routes ---------------------------------------------------------------------

    async def aside(self, work: Callable[[Body], T], body: Body) -> T:
        """Run ``work(body)`` without holding up the event loop: in a thread, unless it is small."""
        if len(body) <= INLINE:
            return work(body)
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, body)

    def next_id(self) -> str:
        """An id for the engine, unique in this process."""
        return f"r{next(self._numbers)}"

    def tenant(self, key: str | None) -> str:
        """Whom cached prefixes may be shared with: all who use the same key."""
        return "" if key is None else hashlib.sha256(key.encode()).hexdigest()[:16]

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) for a model that is not served."""
        if name is not None and name not in self.config.names:
            raise ApiError(
                404,
                f"model {name[:100]!r} is not served here; there is {', '.join(self.config.names)}",
                param="model",
                code="model_not_found",
            )

    def ignored(self, unknown: list[str]) -> dict[str, str]:
        """The header that names the fields nobody knows; with ``strict`` raises ApiError (400)."""
        if not unknown:
            return {}
        names = ", ".join(filter(None, map(clean_id, unknown)))[:1024]
        if self.config.strict:
            raise invalid(f"unknown fields: {names}", unknown[0][:128], "unknown_field")
        return {"x-hasten-ignored": names}

    @property
    def fingerprint(self) -> str:
        """Changes when the same seed may give another text: model, stack or version."""
        facts = self.engine.facts
        settings = f"{facts.folder} {facts.stack} {facts.isa} {hasten.__version__}"
        return "fp_" + hashlib.sha256(settings.encode()).hexdigest()[:10]

    def configuration(self) -> dict[str, Any]:
        """For ``/hasten/config``: settings, where they come from, and what they came to."""
        shown: dict[str, Any] = {
            "version": hasten.__version__,
            "settings": self.config.public(),
            "sources": self.effective.sources,
            "effective": {"max_queued_requests": self.admission.max_requests},
        }
        if self._prompter is not None:
            facts = self.engine.facts
            shown["effective"]["max_queued_tokens"] = self.admission.max_tokens
            shown["engine"] = {name: getattr(facts, name) for name in facts.__struct_fields__}
        return shown

    def _queue(self) -> QueueState:
        admission = self.admission
        return QueueState(admission.preparing, admission.tokens, admission.oldest)
