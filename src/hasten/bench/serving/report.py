"""A run as a table, as JSON, as a log of requests, and as a page of Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from hasten.bench.conditions import Conditions
from hasten.bench.serving import metrics
from hasten.bench.serving.load import Outcome

SECTIONS = (
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
    ("tbt", "TBT", "Time between Emissions"),
    ("e2el", "E2EL", "End-to-end Latency"),
)


def table(result: dict[str, Any]) -> str:
    """The summary with the labels of ``vllm bench serve``, and ours below."""
    lines = [f"{' Serving Benchmark Result ':=^50}"]

    def row(label: str, value: Any) -> None:
        if value is not None:
            shown = f"{value:.2f}" if isinstance(value, float) else value
            lines.append(f"{label:<40} {shown:<10}".rstrip())

    row("Successful requests:", result["completed"])
    row("Failed requests:", result["failed"])
    for kind, count in result["error_kinds"].items():
        row(f"  {kind}:", count)
    row("Maximum request concurrency:", result.get("max_concurrency"))
    if result.get("request_rate") not in (None, "inf"):
        row("Request rate configured (RPS):", float(result["request_rate"]))
    row("Request rate offered (RPS):", result["arrival_rate"])
    row("Benchmark duration (s):", result["duration"])
    row("Total input tokens:", result["total_input_tokens"])
    row("Total generated tokens:", result["total_output_tokens"])
    row("Request throughput (req/s):", result["request_throughput"])
    row("Request goodput (req/s):", result["request_goodput"])
    row("Output token throughput (tok/s):", result["output_throughput"])
    row("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"])
    row("Peak concurrent requests:", result["max_concurrent_requests"])
    row("Total token throughput (tok/s):", result["total_token_throughput"])
    for name, short, title in SECTIONS:
        lines.append(f"{title:-^50}")
        row(f"Mean {short} (ms):", result[f"mean_{name}_ms"])
        row(f"Median {short} (ms):", result[f"median_{name}_ms"])
        for p in metrics.PERCENTILES[1:]:
            row(f"P{p} {short} (ms):", result[f"p{p}_{name}_ms"])
    if "slo" in result:
        lines.append(f"{' Objectives ' + result['slo'] + ' ':-^50}")
        share = result["slo_attainment"]
        if share is not None:
            row("Attainment, TTFT only (%):", 100 * result["slo_attainment_ttft"])
            row("Attainment, TPOT only (%):", 100 * result["slo_attainment_tpot"])
            width = 100 * result["slo_attainment_half_width"]
            row("Attainment, all (%):", f"{100 * share:.2f} ± {width:.2f}")
    lines.append(f"{' Load ':-^50}")
    for label, key in (("Input", "input_lengths"), ("Output", "output_lengths")):
        values = result[key]
        if values["mean"] is not None:
            row(
                f"{label} tokens, mean / p50 / p90 / p99:",
                " / ".join(f"{values[k]:.0f}" for k in ("mean", "p50", "p90", "p99")),
            )
    row("P99 rejection (ms):", result["p99_rejection_ms"])
    row("P99 lateness of this client (ms):", result["p99_lateness_ms"])
    lines.append("=" * 50)
    return "\n".join([*lines, *notes(result)])


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know before believing the figures."""
    told = []
    if result.get("interrupted"):
        told.append(
            "interrupted: these are the requests sent until then; those in flight count as failed"
        )
    if result["late_client"]:
        told.append(
            f"this client sent its requests late (p99 {result['p99_lateness_ms']:.0f} ms): the "
            "latencies include that; give it a core of its own or lower the rate"
        )
    if wrong := result["wrong_output_lengths"]:
        told.append(
            f"{wrong} of {result['completed']} outputs do not have the length asked for: does the "
            "server know ignore_eos and min_tokens?"
        )
    if unknown := result["emissions_without_token_counts"]:
        told.append(
            f"the server did not tell how many tokens the chunks of {unknown} outputs hold: their "
            "ITL counts chunks"
        )
    if clipped := result.get("clipped"):
        told.append(f"{clipped} requests were cut to fit {result['max_context']} tokens")
    return [f"note: {text}" for text in told]


def write_requests(path: Path, outcomes: Sequence[Outcome]) -> None:
    """One JSON line per request: times in seconds from the first arrival, lengths, outcome."""
    start = min((o.arrived for o in outcomes), default=0.0)
    with path.open("wb") as file:
        for o in outcomes:
            file.write(msgspec.json.encode(_line(o, start)) + b"\n")


def _line(o: Outcome, start: float) -> dict[str, Any]:
    def at(time: float | None) -> float | None:
        return None if time is None else round(time - start, 6)

    return {
        "number": o.number,
        "arrived": at(o.arrived),
        "sent": at(o.sent),
        "ended": at(o.ended),
        "status": o.status,
        "error": o.error,
        "message": o.message,
        "planned_input": o.planned.prompt_tokens,
        "planned_output": o.planned.output_tokens,
        "input": o.timeline.input_len,
        "output": o.timeline.tokens,
        "finish_reason": o.timeline.finish_reason,
        "ttft": metrics.ttft(o) if o.timeline.times else None,
        "tpot": metrics.tpot(o) if o.timeline.times else None,
        "e2e": metrics.e2e(o) if o.timeline.times else None,
        "times": [at(t) for t in o.timeline.times],
        "tokens": o.timeline.counts,
    }


def markdown(title: str, result: dict[str, Any], under: Conditions, note: str = "") -> str:
    """A page: what was asked, the table, the conditions."""
    goodput = f"\nGoodput: {result['goodput_text']}\n" if "goodput_text" in result else ""
    return (
        f"# {title}\n\n{note}\n\n```\n{table(result)}\n```\n{goodput}\n"
        "Latencies count from the intended arrival; percentiles of ITL and TBT are over all tokens "
        f"and emissions.\n\n{under.markdown()}"
    )


def write(
    folder: Path, title: str, result: dict[str, Any], under: Conditions, note: str = ""
) -> list[Path]:
    """``report.md`` and ``report.json`` (without the lists per request) in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "report.md", folder / "report.json"
    page.write_text(markdown(title, result, under, note), encoding="utf-8")
    short = {k: v for k, v in result.items() if k not in DETAILED}
    data.write_text(json.dumps(short, indent=1) + "\n", encoding="utf-8")
    return [page, data]


DETAILED = ("input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors")
"""Keys with one entry per request."""
