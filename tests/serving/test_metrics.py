"""Counters, the request log and what clients saw must agree, and the documentation with both."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hasten.serving import metrics as module
from hasten.serving.events import OutputRecord, Recorder, RequestRecord, read_log, summarize
from hasten.serving.messages import EngineFacts, Snapshot
from hasten.serving.metrics import QueueState, ServerMetrics

DOC = Path(__file__).parents[2] / "docs/metrics.md"

Samples = dict[tuple[str, ...], float]


def samples(text: str) -> Samples:
    """(name, label values in order of their names, without the model's) -> value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = [v for k, v in sorted(sample.labels.items()) if k != "model_name"]
            found[sample.name, *labels] = sample.value
    return found


def snapshot(**changes: Any) -> Snapshot:
    zeros = dict.fromkeys(Snapshot.__struct_fields__, 0)
    drafts = {
        "examined_at": [4, 3],
        "accepted_at": [3, 1],
        "drafted_by": {"a": 5, "b": 2},
        "accepted_by": {"a": 3, "b": 1},
    }
    return Snapshot(**{**zeros, **drafts, "time": 1.0, "pages": 40, **changes})


def facts() -> EngineFacts:
    blank: dict[str, Any] = dict.fromkeys(EngineFacts.__struct_fields__, 1)
    return EngineFacts(**{**blank, "page_size": 16, "pages": 40, "kv_bytes": 4096})


def some_records(count: int, seed: int) -> list[RequestRecord]:
    """Requests that ended in all ways, at random."""
    rng = random.Random(seed)
    records = []
    for number in range(count):
        outcome: Any = rng.choice(["ok", "ok", "ok", "cancelled", "rejected", "refused", "failed"])
        record = RequestRecord(
            id=str(number),
            route=rng.choice(["chat", "completions"]),
            model="m",
            arrived=rng.uniform(100, 200),
            prompt_tokens=rng.randrange(1, 3000),
            n=rng.randrange(1, 4),
            max_tokens=rng.choice([None, 10, 5000]),
            outcome=outcome,
            reason=None if outcome == "ok" else rng.choice(["queue_full", "body_too_large", None]),
        )
        for index in range(record.n if outcome in ("ok", "cancelled", "failed") else 0):
            at, output = record.arrived + rng.uniform(0.001, 1), OutputRecord()
            if outcome == "ok":
                output.scheduled = at
                output.finish_reason = rng.choice(["stop", "length"])
                output.cached_tokens = record.prompt_tokens // 2
                output.preemptions = rng.randrange(2)
            for _ in range(rng.randrange(0, 30)):
                at += rng.expovariate(10)
                output.emissions.append((at, rng.randrange(1, 5)))
            record.outputs[index] = output
        record.finished = record.arrived + 60
        records.append(record)
    return records


def test_metrics_are_the_figures_of_the_records() -> None:
    records = some_records(300, seed=1)
    metrics = ServerMetrics("m", compat=True)
    recorder = Recorder(metrics)
    for record in records:
        recorder.finished(record)
    body, content_type = metrics.render()
    found, summary = samples(body.decode()), summarize(records)
    assert content_type.startswith("text/plain")

    counted = {
        "prompt_tokens": summary.prompt_tokens,
        "generation_tokens": summary.output_tokens,
        "generation_tokens_not_ok": summary.output_tokens_not_ok,
        "prefix_cache_hits": summary.cached_tokens,
    }
    for name, value in counted.items():
        assert found[f"hasten:{name}_total",] == value, name
    for outcome, count in summary.outcomes.items():
        by_route = [found.get(("hasten:requests_total", outcome, r), 0) for r in ROUTES]
        assert sum(by_route) == count
    for reason, count in summary.finish_reasons.items():
        assert found["hasten:request_success_total", reason] == count
    for text, count in summary.reasons.items():
        outcome, _, reason = text.partition(": ")
        reason = "unknown" if reason == "None" else reason
        assert found["hasten:requests_not_ok_total", outcome, reason] == count
    for name, spread in {
        "time_to_first_token_seconds": summary.ttft,
        "inter_token_latency_seconds": summary.itl,
        "request_time_per_output_token_seconds": summary.tpot,
        "e2e_request_latency_seconds": summary.e2e,
        "request_queue_time_seconds": summary.queue_time,
        "request_prefill_time_seconds": summary.prefill_time,
        "request_decode_time_seconds": summary.decode_time,
    }.items():
        assert spread is not None
        assert found[f"hasten:{name}_count",] == spread.count, name
        assert found[f"hasten:{name}_sum",] == pytest.approx(spread.mean * spread.count), name


ROUTES = ("chat", "completions", "embeddings")


def test_a_histogram_counts_a_value_up_to_its_bound() -> None:
    histogram = module._Histogram((1.0, 2.0))
    for value, times in ((1.0, 1), (1.5, 3), (2.0, 1), (9.0, 2), (None, 5)):
        histogram.observe(value, times)
    assert histogram.buckets() == [("1.0", 1.0), ("2.0", 5.0), ("+Inf", 7.0)]
    assert histogram.total == pytest.approx(25.5)


def test_vllm_names_carry_the_same_values() -> None:
    metrics = ServerMetrics("m", compat=True)
    metrics.collect_from(facts(), lambda: snapshot(running=3, waiting=2, pages_used=10), full_queue)
    for record in some_records(50, seed=2):
        metrics.observe(record)
    text = metrics.render()[0].decode()
    ours = {k: v for k, v in samples(text).items() if k[0].startswith("hasten:")}
    theirs = {k: v for k, v in samples(text).items() if k[0].startswith("vllm:")}
    assert theirs.pop(("vllm:cache_config_info", "16", "0", "40")) == 1
    for (name, *labels), value in theirs.items():
        # the label engine is the first in the alphabet, but for a histogram's bound
        labels.remove("0")
        assert ours["hasten:" + name.removeprefix("vllm:"), *labels] == value, name
    assert ours["hasten:num_requests_waiting",] == 7
    assert theirs["vllm:kv_cache_usage_perc", "0"] == 0.25
    assert {f"vllm:{name}" for name in module.VLLM_NAMES} <= {
        re.sub(r"_(total|bucket|sum|count)$", "", name) for name, *_ in theirs
    }
    quiet = ServerMetrics("m")
    assert b"vllm:" not in quiet.render()[0]


def full_queue() -> QueueState:
    return QueueState(requests=5, prompt_tokens=500, oldest=0.0)


def test_labels_stay_few() -> None:
    metrics = ServerMetrics("m")
    for number in range(5000):
        metrics.responded(f"/{number}", 200)
        bad = RequestRecord(id="r", route="chat", model="m", outcome="failed", reason=f"x{number}")
        metrics.observe(bad)
    found = samples(metrics.render()[0].decode())
    assert len([key for key in found if key[0] == "hasten:http_requests_total"]) < 600
    reasons = {k: v for k, v in found.items() if k[0] == "hasten:requests_not_ok_total"}
    assert len(reasons) < 70 and sum(reasons.values()) == 5000


def test_every_metric_is_documented_and_every_documented_one_exists(tmp_path: Path) -> None:
    metrics = ServerMetrics("m", compat=True)
    metrics.collect_from(facts(), snapshot, QueueState)
    recorder = Recorder(metrics, tmp_path / "log")
    metrics.responded("/health", 200)
    exposed = set(re.findall(r"^# TYPE (\S+)", metrics.render()[0].decode(), re.M))
    recorder.close()
    documented = set(re.findall(r"^\| `([^`{]+)", DOC.read_text(), re.M))
    ours = {name for name in exposed if not name.startswith("vllm:")}
    assert documented == {name.removeprefix("hasten:") for name in ours}
    listed = re.search(r"<!-- vllm -->(.*?)<!-- end -->", DOC.read_text(), re.S)
    assert listed is not None
    assert set(re.findall(r"`([a-z0-9_]+)`", listed[1])) == {
        name.removeprefix("vllm:") for name in exposed - ours
    }


def test_stats_take_rates_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    state = snapshot()
    metrics = ServerMetrics("m")
    assert metrics.stats()["engine"] is False
    metrics.collect_from(facts(), lambda: state, QueueState)
    first = metrics.stats()
    assert (first["tokens_per_second"], first["acceptance"], first["ttft_p50"]) == (None,) * 3
    for _ in range(6):
        now[0] += 1
        state.tokens += 50
        state.passes += 20
        state.drafted += 10
        state.accepted += 4
        stats = metrics.stats()
    assert stats["tokens_per_second"] == pytest.approx(50)
    assert stats["tokens_per_pass"] == pytest.approx(2.5)
    assert stats["acceptance"] == pytest.approx(0.4)
    now[0] += 500  # nobody looked: no average over that time
    assert metrics.stats()["tokens_per_second"] is None
    assert json.loads(json.dumps(stats)) == stats


def test_the_loop_lag_is_seen() -> None:
    async def lag() -> float:
        metrics = ServerMetrics("m")
        watch = asyncio.create_task(metrics.watch_loop(0.01))
        await asyncio.sleep(0.05)
        time.sleep(0.2)
        await asyncio.sleep(0.03)
        watch.cancel()
        return max(metrics.loop_lags)

    assert asyncio.run(lag()) > 0.15


def test_clients_metrics_and_log_agree(serve: Callable[..., Any], tmp_path: Path) -> None:
    """120 requests that end in all ways: what clients saw = /metrics = the request log."""
    path = tmp_path / "requests.jsonl"
    server = serve(request_log=str(path), metrics_compat="vllm", max_queued_requests=8)
    seen: Counter[str] = Counter()

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        rng = random.Random(number)
        kind = rng.choice(["whole", "whole", "stream", "stream", "leave", "bad"])
        body: dict[str, Any] = {
            "prompt": "Once upon a time " * rng.randrange(1, 4),
            "max_tokens": rng.randrange(1, 30),
            "n": rng.randrange(1, 3),
            "ignore_eos": True,
        }
        if kind == "bad":
            body["max_tokens"] = -1
        if kind == "leave":
            body |= {"max_tokens": 400, "n": 1}
        if kind in ("whole", "bad"):
            response = await client.post("/v1/completions", json=body)
            if response.status_code == 200:
                answered(response.json()["usage"])
            else:
                seen[str(response.status_code)] += 1
            return
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                seen[str(response.status_code)] += 1
                return
            async for line in response.aiter_lines():
                if kind == "leave":
                    seen["left"] += 1
                    return
                if line.startswith("data: {") and (usage := json.loads(line[6:]).get("usage")):
                    answered(usage)

    def answered(usage: dict[str, Any]) -> None:
        seen["ok"] += 1
        seen["prompt"] += usage["prompt_tokens"]
        seen["completion"] += usage["completion_tokens"]
        seen["cached"] += (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)

    async def all_of_them() -> None:
        limits = httpx.Limits(max_connections=60)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            for first in range(0, 60, 3):  # a few at a time, then more than there is room for
                await asyncio.gather(*(ask(client, first + number) for number in range(3)))
            await asyncio.gather(*(ask(client, number) for number in range(60, 120)))

    asyncio.run(all_of_them())
    server.idle()
    found = samples(server.http.get("/metrics").text)
    server.service.recorder.close()
    records = list(read_log(path))
    summary = summarize(records)

    assert seen["ok"] and seen["429"] and seen["400"] and seen["left"], seen
    outcomes = {"ok": "ok", "rejected": "429", "refused": "400", "cancelled": "left"}
    for outcome, mark in outcomes.items():
        assert summary.outcomes[outcome] == seen[mark], outcome
        assert found["hasten:requests_total", outcome, "completions"] == seen[mark]
    assert len(records) == sum(summary.outcomes.values()) == 120
    assert summary.output_tokens - summary.output_tokens_not_ok == seen["completion"]
    for name, value in {
        "prompt_tokens": summary.prompt_tokens,
        "generation_tokens": summary.output_tokens,
        "generation_tokens_not_ok": summary.output_tokens_not_ok,
    }.items():
        assert found[f"hasten:{name}_total",] == value
    well = [record for record in records if record.outcome == "ok"]
    assert sum(record.prompt_tokens for record in well) == seen["prompt"]
    assert sum(record.cached_tokens for record in well) == seen["cached"]
    assert found["vllm:generation_tokens_total", "0"] == summary.output_tokens
    assert found["hasten:time_to_first_token_seconds_count",] == summary.ttft.count
    assert found["hasten:request_log_lines_lost_total",] == 0
    assert b"Once upon" not in path.read_bytes()
    assert found["hasten:num_requests_running",] == found["hasten:queued_requests",] == 0
