"""Prometheus metrics and the live figures of the page at /ui.

    metrics = ServerMetrics("my-model", compat=False)    # compat: vLLM's names as well
    metrics.collect_from(facts, lambda: client.snapshot, lambda: QueueState(…))   # engine is up
    recorder = Recorder(metrics, log_path)               # events.py; feeds `observe`
    body, content_type = metrics.render()                # GET /metrics
    metrics.stats()                                      # GET /hasten/stats, a JSON object
    metrics.responded("/v1/models", 200)                 # every HTTP response, by route template
    asyncio.create_task(metrics.watch_loop())            # event loop lag

Gauges and engine counters come from the engine's latest `Snapshot`, all else from the records of
requests that have ended. Each metric is described in docs/metrics.md. Everything here runs on the
event loop; nothing locks.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from hasten.serving.events import RequestLog, RequestRecord, percentile
from hasten.serving.messages import EngineFacts, Snapshot

# Bucket bounds are vLLM's, so that its dashboards read ours.
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_PER_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_LENGTH = (*(float(m * 10**e) for e in range(6) for m in (1, 2, 5)), 1e6)
_N = (1.0, 2.0, 5.0, 10.0, 20.0)

_HISTOGRAMS = {
    "time_to_first_token_seconds": (_FIRST_TOKEN, "From arrival to the first token."),
    "inter_token_latency_seconds": (_PER_TOKEN, "Between tokens; counted per token."),
    "request_time_per_output_token_seconds": (_PER_TOKEN, "Mean per token after the first."),
    "e2e_request_latency_seconds": (_REQUEST, "From arrival to the last token."),
    "request_queue_time_seconds": (_REQUEST, "From arrival until the engine took it up."),
    "request_prefill_time_seconds": (_REQUEST, "From there to the first token."),
    "request_decode_time_seconds": (_REQUEST, "From the first token to the last."),
    "request_inference_time_seconds": (_REQUEST, "Prefill and decode."),
    "request_prompt_tokens": (_LENGTH, "Prompt tokens of a request."),
    "request_generation_tokens": (_LENGTH, "Tokens of an output."),
    "request_params_n": (_N, "Outputs asked for each prompt."),
    "request_params_max_tokens": (_LENGTH, "The max_tokens parameter, where given."),
}

_COUNTERS = {
    "prompt_tokens": "Prompt tokens of requests whose prompt was computed.",
    "generation_tokens": "Tokens that went towards clients.",
    "generation_tokens_not_ok": "Of these, tokens of requests that did not end well.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Of these, tokens found there.",
}

_FINISH_REASONS = ("stop", "length", "abort", "error")

_SNAPSHOT_GAUGES: dict[str, tuple[str, Callable[[Snapshot], float]]] = {
    "num_requests_running": ("Sequences that hold pages.", lambda s: s.running),
    "kv_cache_usage_perc": (
        "Share of pages in use, 0 to 1.",
        lambda s: _ratio(s.pages_used, s.pages),
    ),
    "kv_pages": ("Pages of the KV cache.", lambda s: s.pages),
    "kv_pages_used": ("Pages in use.", lambda s: s.pages_used),
    "kv_pages_cached": ("Pages without a user, kept for reuse.", lambda s: s.cached_pages),
    "engine_resident_memory_bytes": ("Memory of the engine process.", lambda s: s.rss_bytes),
}

_SNAPSHOT_COUNTERS: dict[str, tuple[str, Callable[[Snapshot], float]]] = {
    "num_preemptions": ("Sequences that had to give their pages back.", lambda s: s.preemptions),
    "spec_decode_num_drafts": ("Times a sequence had drafted tokens.", lambda s: s.drafts),
    "spec_decode_num_draft_tokens": ("Drafted tokens.", lambda s: s.drafted),
    "spec_decode_num_accepted_tokens": ("Drafted tokens that were accepted.", lambda s: s.accepted),
    "engine_steps": ("Engine steps.", lambda s: s.steps),
    "engine_rows": ("Rows (token positions) that ran through the model.", lambda s: s.rows),
    "engine_tokens": ("Tokens that the engine yielded.", lambda s: s.tokens),
    "engine_passes": ("Sequence passes that yielded tokens.", lambda s: s.passes),
    "engine_step_seconds": ("Seconds in engine steps.", lambda s: s.step_seconds),
    "engine_forward_seconds": ("Of these, seconds in the model.", lambda s: s.forward_seconds),
    "engine_draft_seconds": ("Of these, seconds in the drafter.", lambda s: s.draft_seconds),
    "engine_finished_requests": ("Requests that the engine ended.", lambda s: s.finished),
    "leaked_pages": ("Pages that the ledger had to heal.", lambda s: s.leaked_pages),
}

VLLM_NAMES = frozenset(
    {
        *_HISTOGRAMS,
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
        *("num_preemptions", "prompt_tokens", "generation_tokens", "request_success"),
        *("prefix_cache_queries", "prefix_cache_hits"),
        *("spec_decode_num_drafts", "spec_decode_num_draft_tokens"),
        *("spec_decode_num_accepted_tokens", "spec_decode_num_accepted_tokens_per_pos"),
    }
)
"""Ours that vLLM has under the same name and with the same meaning."""


def _drafts(s: Snapshot) -> dict[str, tuple[str, dict[tuple[str], float], str]]:
    """Counters of drafts with a label: (text, values, label's name)."""

    def by_depth(counts: list[int]) -> dict[tuple[str], float]:
        return {(str(depth),): n for depth, n in enumerate(counts)}

    def by_name(counts: dict[str, int]) -> dict[tuple[str], float]:
        return {(name,): n for name, n in counts.items()}

    return {
        "spec_decode_num_accepted_tokens_per_pos": (
            "Accepted drafted tokens by place in the draft, from 0.",
            by_depth(s.accepted_at),
            "position",
        ),
        "spec_decode_num_examined_tokens_per_pos": (
            "Times that the place was judged: nothing behind a rejection is.",
            by_depth(s.examined_at),
            "position",
        ),
        "spec_decode_num_draft_tokens_by_source": (
            "Drafted tokens by drafter, where there are several.",
            by_name(s.drafted_by),
            "source",
        ),
        "spec_decode_num_accepted_tokens_by_source": (
            "Of these, accepted ones.",
            by_name(s.accepted_by),
            "source",
        ),
    }


WINDOW = 30.0
"""Seconds over which `ServerMetrics.stats` takes latencies."""
_RATE_WINDOW = 3.0
_MAX_REASONS = 64
_MAX_ROUTES = 64


class QueueState(msgspec.Struct):
    """The line in front of the engine.

    Attributes:
        requests: accepted, and not yet handed to the engine.
        prompt_tokens: of all requests that wait for their first token.
        oldest: arrival of the one that waits longest for it, `time.monotonic` seconds.
    """

    requests: int = 0
    prompt_tokens: int = 0
    oldest: float | None = None


class _Histogram:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.names = [floatToGoString(bound) for bound in (*bounds, float("inf"))]
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float | None, times: int = 1) -> None:
        """Add a value (if there is one) so many times."""
        if value is not None:
            self.counts[bisect_left(self.bounds, value)] += times
            self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, values up to it), as Prometheus wants them."""
        buckets = []
        below = 0
        for name, count in zip(self.names, self.counts, strict=True):
            below += count
            buckets.append((name, float(below)))
        return buckets


class _Sample(msgspec.Struct):
    """What `stats` remembers of an engine snapshot to take rates between two."""

    time: float
    tokens: int
    passes: int
    drafted: int
    accepted: int


class ServerMetrics(Collector):
    """All metrics of one server, in a registry of its own."""

    def __init__(self, model_name: str, compat: bool = False) -> None:
        """``compat``: export vLLM's names too, with the same values."""
        self.model_name = model_name
        self.compat = compat
        self.request_log: RequestLog | None = None
        self.loop_lags: deque[float] = deque([0.0], maxlen=20)
        self.registry = CollectorRegistry(auto_describe=False)
        self._facts: EngineFacts | None = None
        self._get_snapshot: Callable[[], Snapshot | None] = lambda: None
        self._get_queue: Callable[[], QueueState] = QueueState
        self._histograms = {name: _Histogram(bounds) for name, (bounds, _) in _HISTOGRAMS.items()}
        self._counters = Counter(dict.fromkeys(_COUNTERS, 0))
        self._requests: Counter[tuple[str, str]] = Counter()
        self._reasons: Counter[tuple[str, str]] = Counter()
        self._responses: Counter[tuple[str, str]] = Counter()
        self._endings: Counter[str] = Counter(dict.fromkeys(_FINISH_REASONS, 0))
        self._recent: deque[tuple[float, float]] = deque(maxlen=4096)  # (finished, TTFT)
        self._samples: deque[_Sample] = deque()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def collect_from(
        self,
        facts: EngineFacts,
        get_snapshot: Callable[[], Snapshot | None],
        get_queue: Callable[[], QueueState],
    ) -> None:
        """The engine is up: where its figures come from. Until then only records count."""
        self._facts = facts
        self._get_snapshot = get_snapshot
        self._get_queue = get_queue

    def render(self) -> tuple[bytes, str]:
        """Body and content type for ``/metrics``, in Prometheus' text format."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def responded(self, route: str, status: int) -> None:
        """Count an HTTP response. ``route`` is the template of the route, not the client's path."""
        _count(self._responses, (route, str(status)), _MAX_ROUTES * 8, ("other", str(status)))

    async def watch_loop(self, interval: float = 0.5) -> None:
        """Measure how late the event loop wakes this task up; runs until cancelled."""
        while True:
            asleep = time.monotonic()
            await asyncio.sleep(interval)
            self.loop_lags.append(max(0.0, time.monotonic() - asleep - interval))

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended; `Recorder.finished` calls it."""
        count, histograms = self._counters, self._histograms
        tokens = record.output_tokens
        well = record.outcome == "ok"
        self._requests[record.route, record.outcome] += 1
        count["generation_tokens"] += tokens
        if not well:
            count["generation_tokens_not_ok"] += tokens
            key = (record.outcome, record.reason or "unknown")
            _count(self._reasons, key, _MAX_REASONS, (record.outcome, "other"))
        if record.prompt_done:
            count["prompt_tokens"] += record.prompt_tokens
        if record.scheduled is not None:
            count["prefix_cache_queries"] += record.prompt_tokens
            count["prefix_cache_hits"] += record.cached_tokens
        ttft = record.ttft
        histograms["time_to_first_token_seconds"].observe(ttft)
        if ttft is not None:
            self._recent.append((time.monotonic(), ttft))
        between = histograms["inter_token_latency_seconds"]
        for output in record.outputs.values():
            self._endings[output.ending] += 1
            for seconds, k in output.gaps():
                between.observe(seconds / k, k)
            if well:
                histograms["request_time_per_output_token_seconds"].observe(output.tpot)
                histograms["request_generation_tokens"].observe(output.tokens)
        if well:
            histograms["e2e_request_latency_seconds"].observe(record.e2e)
            histograms["request_queue_time_seconds"].observe(record.queue_time)
            histograms["request_prefill_time_seconds"].observe(record.prefill_time)
            histograms["request_decode_time_seconds"].observe(record.decode_time)
            histograms["request_inference_time_seconds"].observe(record.inference_time)
            histograms["request_prompt_tokens"].observe(record.prompt_tokens)
            histograms["request_params_n"].observe(record.n)
            histograms["request_params_max_tokens"].observe(record.max_tokens)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry for each scrape."""
        for metric in self._own():
            yield metric
            if self.compat and metric.name.removeprefix("hasten:") in VLLM_NAMES:
                yield _for_vllm(metric)
        if (facts := self._facts) is not None:
            sizes = {"page_size": facts.page_size, "pages": facts.pages, "kv_bytes": facts.kv_bytes}
            text = "Sizes of the KV cache, as labels."
            yield self._gauge("cache_config_info", text, 1, sizes)
            if self.compat:
                sizes = {"block_size": facts.page_size, "num_gpu_blocks": facts.pages}
                yield _for_vllm(self._gauge("cache_config_info", text, 1, sizes))

    def _own(self) -> Iterator[Metric]:
        queue = self._get_queue()
        snapshot = self._get_snapshot()
        in_engine = snapshot.waiting if snapshot is not None else 0
        oldest = 0.0 if queue.oldest is None else max(0.0, time.monotonic() - queue.oldest)
        gauge, counter = self._gauge, self._counter
        yield gauge("num_requests_waiting", "Requests without pages.", queue.requests + in_engine)
        yield gauge("queued_requests", "Of these, not yet in the engine.", queue.requests)
        yield gauge(
            "queued_prompt_tokens", "Prompt tokens before their first token.", queue.prompt_tokens
        )
        yield gauge("queue_oldest_seconds", "Longest wait for a first token.", oldest)
        yield gauge("event_loop_lag_seconds", "Most in the last seconds.", max(self.loop_lags))
        if snapshot is not None:
            for name, (text, value) in _SNAPSHOT_GAUGES.items():
                yield gauge(name, text, value(snapshot))
            for name, (text, value) in _SNAPSHOT_COUNTERS.items():
                yield counter(name, text, {(): value(snapshot)})
            for name, (text, counts, label) in _drafts(snapshot).items():
                yield counter(name, text, counts, label)
        for name, text in _COUNTERS.items():
            yield counter(name, text, {(): self._counters[name]})
        yield counter("requests", "Requests that ended.", self._requests, "route", "outcome")
        yield counter(
            "requests_not_ok", "Of these, not well, and why.", self._reasons, "outcome", "reason"
        )
        endings = {(reason,): count for reason, count in self._endings.items()}
        yield counter("request_success", "Outputs that ended.", endings, "finished_reason")
        yield counter("http_requests", "HTTP responses.", self._responses, "route", "status")
        if (log := self.request_log) is not None:
            yield counter("request_log_lines", "Lines written.", {(): log.written})
            yield counter("request_log_lines_lost", "Lines lost.", {(): log.lost})
        for name, (_, text) in _HISTOGRAMS.items():
            histogram = self._histograms[name]
            family = HistogramMetricFamily(f"hasten:{name}", text, labels=["model_name"])
            family.add_metric([self.model_name], histogram.buckets(), histogram.total)
            yield family

    def _gauge(
        self, name: str, text: str, value: float, labels: Mapping[str, object] | None = None
    ) -> Metric:
        labels = labels or {}
        family = GaugeMetricFamily(f"hasten:{name}", text, labels=["model_name", *labels])
        family.add_metric([self.model_name, *map(str, labels.values())], value)
        return family

    def _counter(self, name: str, text: str, values: Mapping[Any, float], *labels: str) -> Metric:
        family = CounterMetricFamily(f"hasten:{name}", text, labels=["model_name", *labels])
        for key, value in values.items():
            family.add_metric([self.model_name, *key], value)
        return family

    def stats(self) -> dict[str, Any]:
        """The figures of the page at /ui, for JSON.

        Rates are taken between the engine's snapshots that successive calls saw, over the last few
        seconds; latencies over requests that ended within `WINDOW` seconds; null means no data.
        """
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - WINDOW:
            self._recent.popleft()
        ttft = sorted(seconds for _, seconds in self._recent)
        queue = self._get_queue()
        snapshot = self._get_snapshot()
        stats: dict[str, Any] = {
            "model": self.model_name,
            "engine": snapshot is not None,
            "queued": queue.requests,
            "ttft_p50": percentile(ttft, 0.5) if ttft else None,
            "ttft_p90": percentile(ttft, 0.9) if ttft else None,
            "requests": _by_outcome(self._requests),
            "prompt_tokens": self._counters["prompt_tokens"],
            "generation_tokens": self._counters["generation_tokens"],
            "event_loop_lag": max(self.loop_lags),
        }
        if snapshot is None:
            return stats
        rates = self._rates(snapshot, now)
        return (
            stats
            | rates
            | {
                "running": snapshot.running,
                "waiting": queue.requests + snapshot.waiting,
                "pages": snapshot.pages,
                "pages_used": snapshot.pages_used,
                "pages_cached": snapshot.cached_pages,
                "page_use": _ratio(snapshot.pages_used, snapshot.pages),
                "preemptions": snapshot.preemptions,
                "leaked_pages": snapshot.leaked_pages,
                "rss_bytes": snapshot.rss_bytes,
            }
        )

    def _rates(self, snapshot: Snapshot, now: float) -> dict[str, float | None]:
        samples = self._samples
        samples.append(
            _Sample(now, snapshot.tokens, snapshot.passes, snapshot.drafted, snapshot.accepted)
        )
        # Between the latest and the youngest that is a window older (else the oldest there is);
        # none from before a long pause of the asking.
        while len(samples) > 1 and (
            samples[1].time <= now - _RATE_WINDOW or samples[0].time < now - 4 * _RATE_WINDOW
        ):
            samples.popleft()
        base, last = samples[0], samples[-1]
        seconds = last.time - base.time
        drafted, passes = last.drafted - base.drafted, last.passes - base.passes
        return {
            "tokens_per_second": (last.tokens - base.tokens) / seconds if seconds > 0 else None,
            "tokens_per_pass": (last.tokens - base.tokens) / passes if passes else None,
            "acceptance": (last.accepted - base.accepted) / drafted if drafted else None,
        }


def _for_vllm(metric: Metric) -> Metric:
    """The same values under vLLM's name; its metrics also carry the number of the engine."""
    name = metric.name.replace("hasten:", "vllm:", 1)
    twin = Metric(name, metric.documentation, metric.type)
    twin.samples = [
        Sample(
            sample.name.replace("hasten:", "vllm:", 1),
            {**sample.labels, "engine": "0"},
            sample.value,
        )
        for sample in metric.samples
    ]
    return twin


def _count(
    counter: Counter[tuple[str, str]], key: tuple[str, str], most: int, rest: tuple[str, str]
) -> None:
    """Add one, under another key once there are too many: labels must stay few."""
    counter[key if key in counter or len(counter) < most else rest] += 1


def _by_outcome(requests: Counter[tuple[str, str]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for (_, outcome), count in requests.items():
        counts[outcome] += count
    return dict(counts)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
