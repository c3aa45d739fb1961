"""The commands: against a scripted server, and against the real one."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hasten.cli.main import app
from tests.bench.sse_server import FakeServer, fake_server, plain, stream_of
from tests.bench.test_serving_metrics import VLLM_KEYS


@contextmanager
def in_a_thread(answer: Any) -> Iterator[FakeServer]:
    """The command runs on the main thread's loop, so the server needs another one."""
    started, found = threading.Event(), []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def run() -> None:
        async with fake_server(answer) as server:
            found.append(server)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    started.wait(10)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "serve", *arguments])


def test_a_run_writes_the_table_and_all_files(tmp_path: Path) -> None:
    with in_a_thread(stream_of(0)) as server:
        result = bench(
            *("--base-url", server.url, "--request-rate", "200", "--num-prompts", "30"),
            *("--input-len", "9", "--output-len", "3", "--num-warmups", "2", "--seed", "5"),
            *("--goodput", "ttft:5000 tpot:5000", "--api-key", "k"),
            *(
                "--result-file",
                str(tmp_path / "r.json"),
                "--request-log",
                str(tmp_path / "l.jsonl"),
            ),
            *("-o", str(tmp_path / "report")),
        )
        bodies = [tuple(b["prompt"]) for b in server.bodies]
        assert result.exit_code == 0, result.output
        assert "Successful requests:                     30" in result.output
        again = bench(
            *("--base-url", server.url, "--request-rate", "50", "--num-prompts", "30", "--json"),
            *("--input-len", "9", "--output-len", "3", "--num-warmups", "2", "--seed", "5"),
        )
        assert [tuple(b["prompt"]) for b in server.bodies[32:]] == bodies  # the seed decides
    data = json.loads((tmp_path / "r.json").read_text())
    assert data.keys() >= VLLM_KEYS | {
        "date",
        "endpoint_type",
        "model_id",
        "num_prompts",
        "request_rate",
        "burstiness",
        "max_concurrency",
    }
    assert data["model_id"] == "fake" and data["max_context"] == 4096
    assert data["output_lens"] == [3] * 30 and data["slo_attainment"] == 1.0
    assert len((tmp_path / "l.jsonl").read_text().splitlines()) == 30
    assert "Latencies count" in (tmp_path / "report" / "report.md").read_text()
    assert json.loads(again.stdout)["request_rate"] == 50.0
    assert len(bodies) == 32 and all(len(p) == 9 and max(p) < 500 for p in bodies)


def test_a_trace_is_replayed_scaled(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    lines = [f"2023-11-16 18:00:{s:02}.0,{80 + s},{16 + s}" for s in range(0, 50, 2)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    with in_a_thread(stream_of(0)) as server:
        result = bench(
            *("--base-url", server.url, "--trace", str(trace), "--trace-start", "10"),
            *("--time-scale", "0.01", "--length-scale", "8", "--duration", "0.25", "--json"),
            *("--num-warmups", "0", "--max-context", "13"),
        )
        assert result.exit_code == 0, result.output
        figures = json.loads(result.stdout)
        sent = [(len(b["prompt"]), b["max_tokens"]) for b in server.bodies]
    assert figures["arrivals"] == "trace" and len(sent) == 13
    assert figures["arrival_window"] == pytest.approx(0.24, abs=1e-3)
    assert figures["clipped"] > 0 and all(p + o <= 13 for p, o in sent)


def test_a_goodput_search_from_the_command_line() -> None:
    with in_a_thread(stream_of(0)) as server:
        result = bench(
            *("--base-url", server.url, "--request-rate", "50", "--num-prompts", "10"),
            *("--output-len", "2", "--input-len", "4", "--goodput", "ttft:5000"),
            *(
                "--search-goodput",
                "--max-probes",
                "2",
                "--json",
                "--arrivals",
                "gamma",
                "--cv",
                "2",
            ),
        )
        assert result.exit_code == 0, result.output
        figures = json.loads(result.stdout)
    assert [p["rate"] for p in figures["goodput_probes"]] == [50.0, 100.0]
    assert figures["goodput"] == 100.0 and figures["goodput_missed"] is None
    assert figures["completed"] == 10 and "at least 100/s" in figures["goodput_text"]


def test_the_chat_endpoint_gets_text() -> None:
    folder = Path(__file__).parents[2] / "src" / "hasten" / "reference" / "target"
    with in_a_thread(stream_of(0)) as server:
        result = bench(
            *("--base-url", server.url, "--endpoint", "chat", "--num-prompts", "3"),
            *("--tokenizer", str(folder), "--input-len", "20", "--output-len", "2", "--json"),
        )
        assert result.exit_code == 0, result.output
        assert all(isinstance(b["messages"][0]["content"], str) for b in server.bodies)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--launch", "--base-url", "http://x"], "leave --base-url out"),
        (["--serve-arg=--x"], "for the server that --launch starts"),
        (["--search-goodput"], "needs objectives"),
        (["--goodput", "ttft"], "is not an objective"),
        (["--request-rate", "fast"], "--request-rate must be"),
        (["--request-rate", "-1"], "--request-rate must be"),
        (["--arrivals", "trace"], "need --trace FILE"),
        (["--arrivals", "uniform"], "--arrivals is one of"),
        (["--cv", "2", "--request-rate", "1"], "cv is that of the gamma process"),
        (["--duration", "3"], "--duration needs arrivals with times"),
        (["--trace", "none.csv"], "cannot read none.csv"),
        (["--extra-body", "[1]"], "must be a JSON object"),
        (["--range-ratio", "2"], "range ratio"),
        (["--base-url", "localhost"], "not a server's address"),
        (["--base-url", "http://127.0.0.1:9"], "cannot connect to 127.0.0.1:9"),
        (["--spike", "3", "--request-rate", "1"], "is not a spike"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], what: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 1
    assert what in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_server_that_answers_nothing_is_one_line() -> None:
    async def answer(server: FakeServer, body: dict[str, Any], write: Any) -> None:
        await write(plain(401, b'{"error": {"message": "no key"}}'))

    with in_a_thread(answer) as server:
        result = bench("--base-url", server.url)
    assert result.exit_code == 1 and "answers no request (http 401): no key" in result.stderr


def test_startup_and_a_short_load_on_the_real_server() -> None:
    result = CliRunner().invoke(app, ["bench", "startup", "--repeats", "1", "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    ready, first = figures["ready_seconds"]["median"], figures["first_token_seconds"]["median"]
    assert 0 < ready < first
    assert 50 < figures["rss_mib"]["median"] < 10_000
    load = bench(
        *("--launch", "--request-rate", "20", "--num-prompts", "6", "--input-len", "12"),
        *("--output-len", "5", "--json", "--serve-arg=--max-sequences=4"),
    )
    assert load.exit_code == 0, load.output
    figures = json.loads(load.stdout)
    assert figures["completed"] == 6 and figures["total_output_tokens"] == 30
    assert figures["wrong_output_lengths"] == figures["emissions_without_token_counts"] == 0
    bad = bench("--launch", "--serve-arg=--no-such-option")
    assert bad.exit_code == 1 and "the server ended with status" in bad.stderr
