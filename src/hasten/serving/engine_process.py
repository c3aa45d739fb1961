"""The engine process: ``python -m hasten.serving.engine_process SETTINGS``.

One thread, one loop: take the commands that have arrived, run one step, report it. It lives and
dies with the process that started it, and neither Ctrl-C nor SIGTERM reach it: the parent decides
when it has drained. Text of requests is never logged.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

import hasten
from hasten.serving.frames import MAX_FRAME, Link, PeerGone
from hasten.serving.messages import (
    Abort,
    Command,
    EngineFacts,
    Failed,
    OutputFigures,
    Piece,
    Ping,
    Refused,
    Report,
    Snapshot,
    Step,
    Stop,
    Submit,
)

if TYPE_CHECKING:  # torch takes seconds to import: first the signals, so that Ctrl-C ends nothing
    from hasten.api import output
    from hasten.api.frontend import Frontend
    from hasten.engine.request import Figures

logger = logging.getLogger(__name__)

COMMAND_SECONDS = 0.005
"""Time for commands between two steps while sequences run: a burst of new requests must not hold
up the tokens of the running ones."""

MAX_ERROR = 1_000
"""Characters of an error that go back."""

RSS_SECONDS = 1.0
"""Age at which the memory figure is read again."""

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """What the parent passes on the command line, as JSON. Sizes as for ``Frontend``."""

    fd: int
    """The inherited socket."""
    parent: int
    """Process id of the parent."""
    model: str
    stack: str | None = None
    max_sequences: int = 64
    max_batch_tokens: int | None = None
    max_length: int | None = None
    kv_bytes: int | None = None
    prefix_reuse: bool = True
    threads: int | None = None


def main(argument: str) -> int:
    """Load, serve until the parent says stop or is gone; returns the exit status."""
    began = time.monotonic()
    settings = msgspec.json.decode(argument, type=Settings)
    _tie_to(settings.parent)
    logging.basicConfig(format="hasten engine: %(levelname)s: %(message)s")
    link = Link(socket.socket(fileno=settings.fd))
    try:
        try:
            front = _load(settings)
        except Exception as error:
            _send(link, Failed(_reason(error)))
            return 1
        server = EngineServer(front, link)
        gc.collect()
        gc.freeze()  # the model stays: it need not be looked through again and again
        _send(link, _facts(front, settings, time.monotonic() - began))
        try:
            server.run()
        except PeerGone:
            raise
        except Exception as error:
            logger.exception("the engine fails")
            _send(link, Failed(f"{type(error).__name__}: {error}"))
            return 1
    except PeerGone:
        return 1
    return 0


def _tie_to(parent: int) -> None:
    """Leave signals to the parent, and end with it even where the closed socket is not seen (in
    a long step, or while loading)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        sys.exit(1)


def _load(settings: Settings) -> Frontend:
    # Half a million objects of torch, none of them garbage, now or later: not looking for any
    # saves about 0.1 s of start-up, and pauses while serving.
    gc.disable()
    try:
        from hasten import _native
        from hasten.api.frontend import Frontend
    finally:
        gc.freeze()
        gc.enable()

    if settings.threads is not None:
        import torch

        torch.set_num_threads(settings.threads)
        _native.set_num_threads(settings.threads)
    return Frontend(
        settings.model,
        stack=settings.stack,
        max_sequences=settings.max_sequences,
        max_batch_tokens=settings.max_batch_tokens,
        max_length=settings.max_length,
        kv_bytes=settings.kv_bytes,
        prefix_reuse=settings.prefix_reuse,
    )


def _reason(error: Exception) -> str:
    """What a user can mend in one line; anything else also with its place, on standard error."""
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return hasten.NO_TORCH
    if isinstance(error, MemoryError):
        return str(error) or "out of memory"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or error}"
    if isinstance(error, ValueError):  # CheckpointError, MethodError, sizes
        return " ".join(str(error).splitlines())
    logger.error("loading failed", exc_info=error)
    return f"{type(error).__name__}: {error}"


def _facts(front: Frontend, settings: Settings, seconds: float) -> EngineFacts:
    from hasten import _native
    from hasten.cache.layout import PAGE_SIZE

    engine, config = front.engine, front.engine.model.config
    cache = engine.cache
    return EngineFacts(
        model=settings.model,
        architecture=config.architecture,
        folder=str(front.folder),
        stack=str(front.stack),
        parameters=engine.model.parameters,
        weight_bytes=engine.model.weight_bytes,
        vocab_size=config.vocab_size,
        max_length=engine.max_length,
        max_sequences=engine.config.max_sequences,
        max_batch_tokens=engine.config.max_batch_tokens,
        page_size=PAGE_SIZE,
        pages=cache.num_blocks,
        kv_bytes=cache.num_blocks * cache.layout.block_bytes(),
        threads=_native.get_num_threads(),
        isa=_native.get_isa(),
        load_seconds=seconds,
        embeds=True,
    )


class EngineServer:
    """The loop between a socket and a ``Frontend``."""

    def __init__(self, front: Frontend, link: Link) -> None:
        self.front = front
        self.link = link
        self._read = msgspec.msgpack.Decoder(Command).decode
        self._open: dict[str, int] = {}  # request -> outputs that have not ended
        self._preparing: list[tuple[Submit, Future[None]]] = []
        self._compiler = ThreadPoolExecutor(1, "hasten-compile")
        """Grammars are compiled here, so that nobody's tokens wait for them: one after the other,
        as the steps need the processor, too."""
        self._refused: list[Refused] = []
        self._answers: int | None = None
        self._rss = 0
        self._rss_read = 0.0

    def run(self) -> None:
        """Until ``Stop``. Raises ``PeerGone`` when the parent's end closes."""
        engine = self.front.engine
        self._report([])  # a first snapshot
        while True:
            if not engine.has_work:
                self.link.wait()
            if not self._take_commands():
                return
            busy = engine.has_work
            pieces = self.front.step() if busy else []
            if busy or self._refused or self._answers is not None:
                self._report(pieces)

    # ---- in ---------------------------------------------------------------------------------

    def _take_commands(self) -> bool:
        """Run what has arrived, as far as time allows. False = stop."""
        until = time.monotonic() + COMMAND_SECONDS
        for command, prepared in self._preparing[:]:
            if prepared.done():
                self._preparing.remove((command, prepared))
                self._submit(command, prepared)
        while (message := self.link.next()) is not None:
            try:
                command = self._read(message)
            except msgspec.ValidationError as error:
                self._refused.append(_unreadable(message, error))
                continue
            if isinstance(command, Submit):
                if self.front.is_prepared(command.params):
                    self._submit(command)
                else:
                    self._prepare(command)
            elif isinstance(command, Abort):
                for asked, prepared in self._preparing[:]:
                    if asked.id == command.id:
                        self._preparing.remove((asked, prepared))
                        prepared.cancel()
                self._open.pop(command.id, None)
                self.front.discard(command.id)
            elif isinstance(command, Ping):
                self._answers = command.number
            elif isinstance(command, Stop):
                return False
            if self.front.engine.has_work and time.monotonic() > until:
                break
        return True

    def _prepare(self, command: Submit) -> None:
        prepared = self._compiler.submit(self.front.prepare, command.params)
        self._preparing.append((command, prepared))
        prepared.add_done_callback(lambda _: self.link.wake())

    def _submit(self, command: Submit, prepared: Future[None] | None = None) -> None:
        from hasten.engine.engine import RequestRefused

        try:
            if prepared is not None:
                prepared.result()
            request = self.front.submit(
                command.prompt,
                command.params,
                request_id=command.id,
                tenant=command.tenant,
                priority=command.priority,
                embed=command.embed,
            )
        except RequestRefused as error:
            self._refused.append(_refused(command.id, str(error)))
        except Exception as error:
            logger.exception("request %s could not be taken", command.id)
            self._refused.append(
                _refused(command.id, f"{type(error).__name__}: {error}", client_error=False)
            )
        else:
            self._open[command.id] = len(request.sequences)

    # ---- out --------------------------------------------------------------------------------

    def _report(self, pieces: list[output.Piece]) -> None:
        """Send what has happened since the last report, and forget the requests that ended."""
        step = Step(self._snapshot(), [_message(p) for p in pieces], self._refused, self._answers)
        self._refused, self._answers = [], None
        for piece in pieces:
            if piece.finish_reason is not None:
                name = piece.request_id
                self._open[name] -= 1
                if not self._open[name]:
                    del self._open[name]
                    self.front.discard(name)
        _send(self.link, step)

    def _snapshot(self) -> Snapshot:
        engine = self.front.engine
        stats, cache = engine.stats, engine.cache
        pool = min(cache.pools, key=lambda pool: pool.num_available)
        now = time.monotonic()
        if now - self._rss_read > RSS_SECONDS:
            self._rss, self._rss_read = rss_bytes(), now
        return Snapshot(
            time=now,
            running=len(engine.running),
            waiting=len(engine.waiting) + len(self._preparing),
            pages_used=pool.num_held,
            pages=pool.num_pages,
            cached_pages=pool.num_cached,
            steps=stats.steps,
            rows=stats.rows,
            tokens=stats.tokens,
            passes=stats.speculation.passes,
            step_seconds=stats.step_seconds,
            forward_seconds=stats.forward_seconds,
            drafted=stats.speculation.drafted,
            accepted=stats.speculation.accepted,
            preemptions=stats.preemptions,
            finished=stats.finished,
            leaked_pages=cache.stats.leaked_pages,
            rss_bytes=self._rss,
            drafts=stats.speculation.drafts,
            draft_seconds=stats.draft_seconds,
            examined_at=list(stats.speculation.examined_at),
            accepted_at=list(stats.speculation.accepted_at),
            drafted_by=stats.speculation.by_source(engine.drafting.sources, accepted=False),
            accepted_by=stats.speculation.by_source(engine.drafting.sources, accepted=True),
        )


def _unreadable(message: bytes, error: msgspec.ValidationError) -> Refused:
    """The answer to a request that the sender's checks let through and ours do not. Raises where
    the message is not even a request: then the two processes do not speak alike."""
    fields = msgspec.msgpack.decode(message)
    if not isinstance(fields, dict) or not isinstance(fields.get("id"), str):
        raise error
    return _refused(fields["id"], f"the engine cannot read the request: {error}", False)


def _refused(request_id: str, message: str, client_error: bool = True) -> Refused:
    """Some errors quote the value they are about, whatever its size."""
    return Refused(request_id, message[:MAX_ERROR], client_error)


def _message(piece: output.Piece) -> Piece:
    return Piece(
        piece.request_id,
        piece.index,
        piece.text,
        piece.token_ids,
        piece.logprobs,
        piece.finish_reason,
        piece.error,
        None if piece.figures is None else _figures(piece.figures),
        piece.prompt_logprobs,
        piece.embedding,
    )


def _figures(figures: Figures) -> OutputFigures:
    times = figures.token_times
    return OutputFigures(
        arrived=figures.arrived,
        scheduled=figures.scheduled,
        first_token=times[0] if times else None,
        last_token=times[-1] if times else None,
        cached_tokens=figures.cached_tokens,
        steps=figures.speculation.passes,
        drafted=figures.speculation.drafted,
        accepted=figures.speculation.accepted,
        preemptions=figures.preemptions,
    )


def _send(link: Link, report: Report) -> None:
    """A report that is too large for one message goes out in halves."""
    payload = msgspec.msgpack.encode(report)
    if len(payload) <= MAX_FRAME or not isinstance(report, Step):
        link.send(payload)
        return
    pieces, half = report.pieces, len(report.pieces) // 2
    if half == 0:  # nothing else grows like that
        pieces[0].prompt_logprobs = None
        pieces[0].finish_reason = "error"
        pieces[0].error = (
            f"the prompt's log-probabilities have {len(payload)} bytes, at most {MAX_FRAME} can be "
            "passed on; ask for fewer alternatives or send a shorter prompt"
        )
        _send(link, report)
        return
    _send(link, Step(report.snapshot, pieces[:half]))
    _send(link, Step(report.snapshot, pieces[half:], report.refused, report.answers))


def rss_bytes() -> int:
    """Memory of this process that is in use now; 0 where the system does not say (no /proc)."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    status = main(sys.argv[1])
    sys.stderr.flush()
    os._exit(status)  # the system takes everything back; torch takes most of a second to do so
