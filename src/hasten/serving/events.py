"""What happened to each request: one record, one line in the request log, all figures from it.

The HTTP side fills a `RequestRecord` while it serves a request and hands it over when the request
ends, however it ends:

    record = RequestRecord(id=…, route="chat", model=…, stream=True)   # arrived = now
    record.prompt_tokens = …
    record.submitted = time.monotonic()         # handed to the engine
    record.take(piece)                          # every piece, as it comes from the engine
    record.close("ok", 200)                     # or cancelled | rejected | refused | failed
    recorder.finished(record)                   # recorder = Recorder(metrics, log_path)

Nothing else counts requests: the Prometheus metrics are computed from the same records from which
`summarize` computes its figures offline. A record holds no text, no token ids and no keys.

Definitions, with a = arrival, s = first scheduled, e_1..e_n = emission time of each of the n tokens
of an output (the moment at which the HTTP process took it from the engine for its client):
TTFT = e_1 - a; TPOT = (e_n - e_1) / (n - 1), none for n = 1; TBT = gap between two emissions;
inter-token latency = the same per token, a gap before an emission of k tokens being k intervals of
gap / k; E2E = e_n - a; queue time = s - a; prefill time = e_1 - s; decode time = e_n - e_1.
Of a request with several outputs, e_1 and s are the first of any, e_n is the last of all, and each
output has its own TPOT and gaps.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from hasten.serving.messages import Piece

if TYPE_CHECKING:
    from hasten.serving.metrics import ServerMetrics

logger = logging.getLogger(__name__)

Outcome = Literal["ok", "cancelled", "rejected", "refused", "failed"]
"""ok; cancelled: the client went away; rejected: no room (429); refused: cannot be served as it is
(any other 4xx); failed: our fault (5xx, or an error within a stream)."""

MAX_BACKLOG_BYTES = 16 * 2**20
"""Log lines that may wait for the disk; what comes beyond is dropped and counted."""


class OutputRecord(msgspec.Struct, omit_defaults=True):
    """One output of a request.

    What follows ``finish_reason`` comes with the engine's last piece: an output that its client
    did not wait for has none of it.

    Attributes:
        emissions: (`time.monotonic` seconds, tokens) of each emission, in order.
        finish_reason: stop, length, abort or error; None if the end was not seen.
        scheduled: when the engine first took it up, `time.monotonic` seconds.
        cached_tokens: positions of its prompt that came from the prefix cache.
        steps: target passes that yielded tokens.
    """

    emissions: list[tuple[float, int]] = []
    finish_reason: str | None = None
    scheduled: float | None = None
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    preemptions: int = 0

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.emissions)

    @property
    def ending(self) -> str:
        """Why it ended; an output whose end nobody waited for was aborted."""
        return self.finish_reason or "abort"

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for fewer than two tokens."""
        tokens = self.tokens
        if tokens < 2:
            return None
        return (self.emissions[-1][0] - self.emissions[0][0]) / (tokens - 1)

    def gaps(self) -> Iterator[tuple[float, int]]:
        """(seconds since the emission before, tokens) of each emission but the first."""
        for (before, _), (at, tokens) in zip(self.emissions, self.emissions[1:], strict=False):
            yield at - before, tokens


class RequestRecord(msgspec.Struct, omit_defaults=True):
    """One HTTP request for completions, chat or embeddings, from arrival to end.

    Attributes:
        id: of the request, as in ``X-Request-Id``.
        model: the served name, not what a client sent.
        started: wall clock, seconds since 1970; says when, serves for no interval.
        arrived, submitted, finished: `time.monotonic` seconds; submitted = handed to the engine.
        prompt_tokens: of all prompts of the request, each counted once, as in ``usage``.
        n: outputs computed for each prompt (the larger of ``n`` and ``best_of``).
        status: of the HTTP response; for a stream, that of its headers.
        reason: for any outcome but ok a short code of ours, such as ``queue_full``. It becomes the
            label of a metric: never a text that a client chose.
        outputs: output j of prompt i has the key ``i * n + j``.
    """

    id: str
    route: Literal["completions", "chat", "embeddings"]
    model: str
    stream: bool = False
    started: float = msgspec.field(default_factory=time.time)
    arrived: float = msgspec.field(default_factory=time.monotonic)
    submitted: float | None = None
    finished: float | None = None
    prompt_tokens: int = 0
    n: int = 1
    max_tokens: int | None = None
    status: int | None = None
    outcome: Outcome = "ok"
    reason: str | None = None
    outputs: dict[int, OutputRecord] = {}

    def take(self, piece: Piece, *, prompt: int = 0, now: float | None = None) -> None:
        """Note a piece that came from the engine for the given prompt of this request.

        ``now`` is the time of emission (`time.monotonic` seconds; the present by default).
        """
        key = prompt * self.n + piece.index
        output = self.outputs.get(key)
        if output is None:
            output = self.outputs[key] = OutputRecord()
        if piece.token_ids:
            now = time.monotonic() if now is None else now
            output.emissions.append((now, len(piece.token_ids)))
        if piece.finish_reason is not None:
            output.finish_reason = piece.finish_reason
        if (figures := piece.figures) is not None:
            output.scheduled = figures.scheduled
            output.cached_tokens = figures.cached_tokens
            output.drafted = figures.drafted
            output.accepted = figures.accepted
            output.steps = figures.steps
            output.preemptions = figures.preemptions

    def close(self, outcome: Outcome, status: int | None, reason: str | None = None) -> None:
        """The request has ended now."""
        self.finished = time.monotonic()
        self.outcome = outcome
        self.status = status
        self.reason = reason

    @property
    def output_tokens(self) -> int:
        """Tokens of all outputs that went towards the client."""
        return sum(output.tokens for output in self.outputs.values())

    @property
    def cached_tokens(self) -> int:
        """Prompt positions from the prefix cache; outputs of one prompt share them."""
        by_prompt: dict[int, int] = {}
        for key, output in self.outputs.items():
            prompt = key // self.n
            by_prompt[prompt] = max(by_prompt.get(prompt, 0), output.cached_tokens)
        return sum(by_prompt.values())

    @property
    def prompt_done(self) -> bool:
        """Whether the engine computed the prompt: some token of the request came, or its end."""
        return self.outcome == "ok" or any(o.emissions for o in self.outputs.values())

    @property
    def scheduled(self) -> float | None:
        """When the engine first took up any of its outputs; None if it never did, or unknown."""
        times = [o.scheduled for o in self.outputs.values() if o.scheduled is not None]
        return min(times, default=None)

    @property
    def first_emission(self) -> float | None:
        times = [o.emissions[0][0] for o in self.outputs.values() if o.emissions]
        return min(times, default=None)

    @property
    def last_emission(self) -> float | None:
        times = [o.emissions[-1][0] for o in self.outputs.values() if o.emissions]
        return max(times, default=None)

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token of any output."""
        return _interval(self.arrived, self.first_emission)

    @property
    def e2e(self) -> float | None:
        """Seconds from arrival to the last token; to the end for an answer without tokens."""
        last = self.last_emission
        return _interval(self.arrived, self.finished if last is None else last)

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival until the engine took it up; checks and tokenization included."""
        return _interval(self.arrived, self.scheduled)

    @property
    def prefill_time(self) -> float | None:
        return _interval(self.scheduled, self.first_emission)

    @property
    def decode_time(self) -> float | None:
        return _interval(self.first_emission, self.last_emission)

    @property
    def inference_time(self) -> float | None:
        """Seconds from being taken up to the last token."""
        return _interval(self.scheduled, self.last_emission)


def _interval(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


class Spread(msgspec.Struct):
    """Percentiles of some values, interpolated linearly between neighbours, and their mean."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None if there are no values."""
        ordered = sorted(values)
        if not ordered:
            return None
        return cls(
            len(ordered),
            math.fsum(ordered) / len(ordered),
            percentile(ordered, 0.5),
            percentile(ordered, 0.9),
            percentile(ordered, 0.99),
        )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of ascending values, interpolated linearly: share 0 is the smallest, 1 the largest."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Summary(msgspec.Struct):
    """Figures of a set of requests; the same counts as the Prometheus counters.

    Attributes:
        outcomes: requests by outcome.
        reasons: requests that did not end well, by "outcome: reason".
        finish_reasons: outputs by finish reason.
        prompt_tokens: of requests whose prompt the engine computed.
        output_tokens: tokens that went towards clients.
        output_tokens_not_ok: of these, tokens of requests that did not end well.
        ttft, tbt, itl: seconds, over all requests that got a token. TBT counts every gap between
            emissions once, ITL counts it per token.
        tpot, e2e, queue_time, prefill_time, decode_time: seconds, over requests that ended well.
    """

    requests: int
    outcomes: dict[str, int]
    reasons: dict[str, int]
    finish_reasons: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    output_tokens_not_ok: int
    cached_tokens: int
    preemptions: int
    ttft: Spread | None
    tpot: Spread | None
    tbt: Spread | None
    itl: Spread | None
    e2e: Spread | None
    queue_time: Spread | None
    prefill_time: Spread | None
    decode_time: Spread | None


def summarize(records: Iterable[RequestRecord]) -> Summary:
    """Counts and latencies of requests that have ended."""
    records = list(records)
    well = [record for record in records if record.outcome == "ok"]
    outputs = [output for record in records for output in record.outputs.values()]
    gaps = [gap for output in outputs for gap in output.gaps()]

    def spread(values: Iterable[float | None]) -> Spread | None:
        return Spread.of(value for value in values if value is not None)

    return Summary(
        requests=len(records),
        outcomes=_count(record.outcome for record in records),
        reasons=_count(
            f"{record.outcome}: {record.reason}" for record in records if record.outcome != "ok"
        ),
        finish_reasons=_count(output.ending for output in outputs),
        prompt_tokens=sum(record.prompt_tokens for record in records if record.prompt_done),
        output_tokens=sum(record.output_tokens for record in records),
        output_tokens_not_ok=sum(r.output_tokens for r in records if r.outcome != "ok"),
        cached_tokens=sum(record.cached_tokens for record in records),
        preemptions=sum(output.preemptions for output in outputs),
        ttft=spread(record.ttft for record in records),
        tpot=spread(output.tpot for record in well for output in record.outputs.values()),
        tbt=spread(seconds for seconds, _ in gaps),
        itl=spread(seconds / tokens for seconds, tokens in gaps for _ in range(tokens)),
        e2e=spread(record.e2e for record in well),
        queue_time=spread(record.queue_time for record in well),
        prefill_time=spread(record.prefill_time for record in well),
        decode_time=spread(record.decode_time for record in well),
    )


def _count(values: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return dict(sorted(counts.items()))


def read_log(path: str | os.PathLike[str]) -> Iterator[RequestRecord]:
    """The records of a request log, in the order in which the requests ended.

    A last line without its end is left out: the server is writing it, or was killed while it did.
    Raises ValueError, naming the line, for anything else that is not a record.
    """
    decoder = msgspec.json.Decoder(RequestRecord)
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield decoder.decode(line)
            except msgspec.DecodeError as error:
                raise ValueError(f"{path}, line {number}: not a request record: {error}") from None


class RequestLog:
    """Appends one line per record to a file, from a thread of its own.

    The caller only encodes the line and leaves it in memory, so a slow disk delays nobody. A disk
    that fails (or falls `MAX_BACKLOG_BYTES` behind) costs lines, not service: they are counted in
    ``lost``, and a warning is logged once for each spell of losses. What was written in part is
    taken back, so the file always consists of whole lines. The file is opened for appending:
    rotate it by copying and truncating.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises OSError if the file cannot be opened for writing."""
        self.path = Path(path)
        self.written = 0
        self.lost = 0
        self._file = os.open(
            self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        self._lines: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._closing = False
        self._losing = False
        self._changed = threading.Condition()
        self._encoder = msgspec.json.Encoder()
        self._writer = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._writer.start()

    def append(self, record: RequestRecord) -> None:
        """Write the record soon; it may change afterwards."""
        line = self._encoder.encode(record) + b"\n"
        with self._changed:
            if self._closing or self._waiting_bytes + len(line) > MAX_BACKLOG_BYTES:
                self._lose(1, "it cannot keep up")
                return
            self._lines.append(line)
            self._waiting_bytes += len(line)
            self._changed.notify()

    def close(self, timeout: float = 5.0) -> None:
        """Write what waits, for at most ``timeout`` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._writer.join(timeout)

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._lines or self._closing)
                    if not self._lines:
                        return
                    lines = list(self._lines)
                    self._lines.clear()
                self._write(lines)
        finally:
            os.close(self._file)

    def _write(self, lines: list[bytes]) -> None:
        data = memoryview(b"".join(lines))
        size = len(data)
        done = 0
        problem = None
        try:
            while done < size:
                done += os.write(self._file, data[done:])
        except OSError as error:
            problem = error.strerror or str(error)
        with self._changed:
            self._waiting_bytes -= size
            if problem is None:
                self.written += len(lines)
                self._losing = False
                return
        kept = self._keep_whole_lines(lines, done)
        with self._changed:
            self.written += kept
            self._lose(len(lines) - kept, problem)

    def _keep_whole_lines(self, lines: list[bytes], done: int) -> int:
        """After a write that stopped at ``done`` bytes: cut the torn line off, count the others."""
        kept = 0
        for line in lines:
            if done < len(line):
                break
            done -= len(line)
            kept += 1
        if done:
            with contextlib.suppress(OSError):  # a pipe has no length to cut
                os.ftruncate(self._file, os.fstat(self._file).st_size - done)
        return kept

    def _lose(self, lines: int, why: str) -> None:
        self.lost += lines
        if not self._losing:
            self._losing = True
            logger.warning("request log %s: %s; lines are lost until it works", self.path, why)


class Recorder:
    """Where the record of every request ends up."""

    def __init__(
        self, metrics: ServerMetrics, log_path: str | os.PathLike[str] | None = None
    ) -> None:
        """``log_path``: the request log, if any. Raises OSError if it cannot be opened."""
        self.metrics = metrics
        self.log = RequestLog(log_path) if log_path is not None else None
        metrics.request_log = self.log

    def finished(self, record: RequestRecord) -> None:
        """Count a request that has ended. To be called once for each, on the event loop."""
        self.metrics.observe(record)
        if self.log is not None:
            self.log.append(record)

    def close(self) -> None:
        """Finish the request log."""
        if self.log is not None:
            self.log.close()
