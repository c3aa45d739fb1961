"""Figures of timelines made by hand, and the search for the goodput on a model of a server."""

from __future__ import annotations

import asyncio
import json
import math
import random
from pathlib import Path

import pytest

from hasten.bench.conditions import conditions
from hasten.bench.serving import goodput, metrics, report
from hasten.bench.serving.goodput import Probe
from hasten.bench.serving.load import Outcome, Planned
from hasten.bench.serving.metrics import Slo, summarize

VLLM_KEYS = {
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "input_lens",
    "output_lens",
    "ttfts",
    "itls",
    "generated_texts",
    "errors",
    "max_output_tokens_per_s",
    "max_concurrent_requests",
    *(
        f"{kind}_{name}_ms"
        for kind in ("mean", "median", "std", "p99")
        for name in ("ttft", "tpot", "itl", "e2el")
    ),
}


def answered(
    arrived: float, times: list[float], counts: list[int], *, sent: float | None = None
) -> Outcome:
    tokens = sum(counts)
    outcome = Outcome(0, Planned(arrived, [1] * 10, 10, tokens), arrived, due=arrived)
    outcome.sent = arrived if sent is None else sent
    outcome.ended, outcome.status, outcome.error = times[-1] + 0.5, 200, None
    timeline = outcome.timeline
    timeline.times, timeline.counts = times, counts
    timeline.input_len, timeline.output_len = 10, tokens
    timeline.texts = ["x"] * len(times)
    return outcome


def failed(arrived: float, error: str, status: int | None = None, after: float = 0.01) -> Outcome:
    outcome = Outcome(0, Planned(arrived, [1] * 10, 10, 5), arrived, due=arrived, sent=arrived)
    outcome.error, outcome.status, outcome.ended = error, status, arrived + after
    return outcome


def test_the_definitions() -> None:
    # sent 0.3 s late: latency still counts from the intended arrival
    outcome = answered(100.0, [101.0, 101.2, 101.8], [1, 1, 3], sent=100.3)
    assert metrics.ttft(outcome) == pytest.approx(1.0)
    assert metrics.e2e(outcome) == pytest.approx(1.8)
    assert metrics.tpot(outcome) == pytest.approx(0.8 / 4)
    assert metrics.tbt(outcome) == pytest.approx([0.2, 0.6])
    assert metrics.itl(outcome) == pytest.approx([0.2, 0.2, 0.2, 0.2])
    single = answered(0.0, [2.0], [1])
    assert metrics.tpot(single) is None
    assert metrics.tbt(single) == metrics.itl(single) == []


def test_itl_of_whole_streams_averages_to_tpot() -> None:
    rng = random.Random(0)
    for _ in range(50):
        times = sorted(rng.uniform(0, 5) for _ in range(rng.randint(2, 9)))
        outcome = answered(0.0, times, [1] + [rng.randint(1, 4) for _ in times[1:]])
        intervals = metrics.itl(outcome)
        assert len(intervals) == outcome.timeline.tokens - 1
        assert sum(intervals) == pytest.approx(sum(metrics.tbt(outcome)))
        assert sum(intervals) / len(intervals) == pytest.approx(metrics.tpot(outcome))


def test_objectives_are_parsed_and_applied() -> None:
    slo = Slo.parse(["ttft:500 tpot:50", "e2el:3000"])
    assert slo == Slo(0.5, 0.05, 3.0) and str(slo) == "ttft:500 tpot:50 e2el:3000"
    assert not Slo() and Slo().meets(answered(0, [1.0], [1]))
    assert Slo(ttft=1.0).meets(answered(0, [1.0], [1]))  # a limit may be reached
    assert not Slo(ttft=1.0).meets(answered(0, [1.01], [1]))
    assert Slo(tpot=0.1).meets(answered(0, [9.0], [1]))  # one token has no TPOT
    assert not Slo(tpot=0.1).meets(answered(0, [1.0, 1.3], [1, 2]))
    assert not Slo(ttft=9.0).meets(failed(0, "http 429", 429))
    for bad in ("ttft", "ttft:x", "itl:5", "ttft:-1", "ttft:nan", "ttft:inf", ":5"):
        with pytest.raises(ValueError, match="is not an objective"):
            Slo.parse([bad])
    with pytest.raises(ValueError, match="twice"):
        Slo.parse(["ttft:1", "ttft:2"])


def test_hopeless_is_certain() -> None:
    slo = Slo(ttft=1.0, e2el=5.0)
    waiting = Outcome(0, Planned(0.0, [1], 1, 5), 10.0)
    assert not slo.hopeless(waiting, 10.9) and slo.hopeless(waiting, 11.1)
    waiting.timeline.times = [10.5]
    assert not slo.hopeless(waiting, 14.9) and slo.hopeless(waiting, 15.1)
    assert slo.hopeless(failed(0, "timeout"), 0.02)
    assert not slo.hopeless(answered(0, [0.5], [1]), 99.0)


def test_a_summary_by_hand() -> None:
    outcomes = [
        answered(10.0, [10.2, 10.4], [1, 1]),  # ttft 0.2, tpot 0.2
        answered(11.0, [11.1, 11.2, 11.3], [1, 1, 1]),  # ttft 0.1, tpot 0.1
        answered(12.0, [13.0], [1]),  # ttft 1.0
        failed(13.0, "http 429", 429, after=0.02),
        failed(14.0, "connection"),
    ]
    result = summarize(outcomes, Slo(ttft=0.5, tpot=0.15))
    assert result.keys() >= VLLM_KEYS
    assert result["duration"] == pytest.approx(4.01)
    assert (result["completed"], result["failed"], result["rejected"]) == (3, 2, 1)
    assert result["error_kinds"] == {"http 429": 1, "connection": 1}
    assert result["total_input_tokens"] == 30 and result["total_output_tokens"] == 6
    assert result["request_throughput"] == pytest.approx(3 / 4.01)
    assert result["output_throughput"] == pytest.approx(6 / 4.01)
    assert result["total_token_throughput"] == pytest.approx(36 / 4.01)
    assert result["request_goodput"] == pytest.approx(1 / 4.01)
    assert result["slo_attainment"] == pytest.approx(1 / 5)
    assert result["slo_attainment_ttft"] == pytest.approx(2 / 5)
    assert result["slo_attainment_tpot"] == pytest.approx(2 / 5)
    assert result["mean_ttft_ms"] == pytest.approx(1300 / 3)
    assert result["median_ttft_ms"] == pytest.approx(200)
    assert result["std_ttft_ms"] == pytest.approx(1000 * math.sqrt(0.4866667 / 3), rel=1e-4)
    assert result["p90_ttft_ms"] == pytest.approx(840)  # interpolated
    assert result["mean_tpot_ms"] == pytest.approx(150)
    assert result["p50_rejection_ms"] == pytest.approx(20)
    assert result["max_concurrent_requests"] == 2  # the third ends after the fourth began
    assert result["max_output_tokens_per_s"] == 3.0
    assert result["arrival_rate"] == pytest.approx(1.0)
    assert result["ttfts"] == pytest.approx([0.2, 0.1, 1.0, 0, 0])
    assert result["errors"][0] == "" and result["errors"][3] == "http 429"
    later = summarize(outcomes, Slo(), warmup=1.5)
    assert later["num_requests"] == 3 and later["num_warmup_requests"] == 2
    assert later["request_goodput"] is None and "slo" not in later


def test_nothing_and_only_failures_have_a_summary() -> None:
    for outcomes in ([], [failed(1.0, "connection")]):
        result = summarize(outcomes, Slo(ttft=1.0))
        assert result["completed"] == 0 and result["mean_ttft_ms"] is None
        assert result.keys() >= VLLM_KEYS
        assert "Failed requests:" in report.table(result)
        json.dumps(result, allow_nan=False)


def test_the_table_has_vllm_labels_and_says_what_is_wrong() -> None:
    late = answered(0.0, [1.0, 1.1], [1, 1], sent=0.2)
    late.timeline.output_len = 7  # two emissions of unknown size, and not the length asked for
    result = summarize([late], Slo(ttft=2.0)) | {"interrupted": True, "request_rate": 2.0}
    text = report.table(result)
    for label in (
        "============ Serving Benchmark Result ============",
        "Successful requests:                     1",
        "Request rate configured (RPS):           2.00",
        "Mean TTFT (ms):                          1000.00",
        "---------------Time to First Token----------------",
        "P99 ITL (ms):",
        "note: interrupted",
        "note: this client sent its requests late (p99 200 ms)",
        "note: 1 of 1 outputs do not have the length asked for",
        "note: the server did not tell how many tokens",
    ):
        assert label in text


def test_report_and_request_log(tmp_path: Path) -> None:
    outcomes = [answered(5.0, [6.0, 6.5], [1, 2]), failed(5.5, "http 429", 429)]
    result = summarize(outcomes, Slo(ttft=2.0))
    page, data = report.write(tmp_path / "r", "Title", result, conditions())
    assert "Successful requests:" in page.read_text() and "commit" in page.read_text()
    assert json.loads(data.read_text())["completed"] == 1
    assert not json.loads(data.read_text()).keys() & set(report.DETAILED)
    report.write_requests(tmp_path / "log.jsonl", outcomes)
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert first["times"] == [1.0, 1.5] and first["tokens"] == [1, 2] and first["arrived"] == 0
    assert first["ttft"] == pytest.approx(1.0) and first["tpot"] == pytest.approx(0.25)
    assert second["error"] == "http 429" and second["ttft"] is None and second["arrived"] == 0.5


def test_half_width_matches_the_usual_figures() -> None:
    assert metrics.half_width(270, 300) == pytest.approx(0.034, abs=0.001)
    assert metrics.half_width(900, 1000) == pytest.approx(0.019, abs=0.001)
    assert metrics.half_width(100, 100) > 0.01  # a full score is not certainty


@pytest.mark.parametrize("start", [0.1, 1.0, 7.0, 300.0])
def test_search_finds_the_rate_at_which_a_queue_misses(start: float) -> None:
    """An M/M/1 queue with 10 requests/s of service: P(sojourn <= T) = 1 - exp(-(10 - rate) T)."""
    tried: list[Probe] = []

    async def probe(rate: float) -> Probe:
        share = 1 - math.exp(-(10 - rate) * 0.5) if rate < 10 else 0.0
        return Probe(rate, share, 0.02, 300)

    exact = 10 - math.log(10) / 0.5
    found = asyncio.run(goodput.search(probe, start=start, grain=0.03, on_probe=tried.append))
    assert found.probes == tried and found.converged
    assert found.missed is not None
    assert found.rate <= exact < found.missed <= found.rate * 1.03
    assert f"{found.rate:.4g}/s (" in str(found) and "±" in str(found)


def test_search_stops_by_its_budget_and_says_so() -> None:
    async def never(rate: float) -> Probe:
        return Probe(rate, 0.2, 0.05, 100)

    async def always(rate: float) -> Probe:
        return Probe(rate, 0.99, 0.05, 100)

    async def interrupted(rate: float) -> Probe | None:
        return Probe(rate, 0.99, 0.05, 100) if rate < 2 else None

    low = asyncio.run(goodput.search(never, start=4.0, max_probes=5))
    assert low.rate == 0 and len(low.probes) == 5 and "no probed rate reached 90 %" in str(low)
    high = asyncio.run(goodput.search(always, start=1.0, max_probes=4))
    assert high.rate == 8 and high.missed is None and "at least 8/s" in str(high)
    partial = asyncio.run(goodput.search(interrupted, start=1.0))
    assert partial.rate == 1.0 and not partial.converged


def test_search_with_noise_stays_near_the_truth() -> None:
    rng = random.Random(3)

    async def probe(rate: float) -> Probe:
        share = 1 / (1 + math.exp(4 * math.log(rate / 20)))  # 90 % at 11.5/s
        good = sum(rng.random() < share for _ in range(400))
        return Probe(rate, good / 400, metrics.half_width(good, 400), 400)

    truth = 20 * (1 / 9) ** 0.25
    found = [asyncio.run(goodput.search(probe, start=2.0)).rate for _ in range(20)]
    assert all(abs(rate / truth - 1) < 0.2 for rate in found)
