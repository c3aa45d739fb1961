"""Definitions of the figures, and a request log that survives its disk."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.serving import events
from hasten.serving.events import (
    OutputRecord,
    RequestLog,
    RequestRecord,
    Spread,
    read_log,
    summarize,
)
from hasten.serving.messages import OutputFigures, Piece


def record(*outputs: list[tuple[float, int]], n: int = 1, **fields: object) -> RequestRecord:
    """A record that arrived at 100 and was scheduled half a second later."""
    made = RequestRecord(
        id="r", route="chat", model="m", n=n, arrived=100.0, prompt_tokens=7, **fields
    )
    for index, emissions in enumerate(outputs):
        made.outputs[index] = OutputRecord(list(emissions), "stop", scheduled=100.5)
    return made


def test_definitions_on_a_worked_example() -> None:
    one = record([(101.0, 1), (101.2, 2), (101.8, 3)])
    output = one.outputs[0]
    assert one.ttft == pytest.approx(1.0)
    assert one.queue_time == pytest.approx(0.5)
    assert one.prefill_time == pytest.approx(0.5)
    assert one.decode_time == pytest.approx(0.8)
    assert one.inference_time == pytest.approx(1.3)
    assert one.e2e == pytest.approx(1.8)
    assert output.tpot == pytest.approx(0.8 / 5)
    summary = summarize([one])
    assert summary.tbt is not None and summary.itl is not None
    assert summary.tbt.count == 2 and summary.tbt.mean == pytest.approx(0.4)
    assert summary.itl.count == 5 and summary.itl.mean == pytest.approx(0.8 / 5)
    assert summary.itl.p50 == pytest.approx(0.2)  # 0.1 0.1 0.2 0.2 0.2: per token, not per gap


def test_one_token_has_no_tpot_and_no_token_no_latency() -> None:
    assert record([(101.0, 1)]).outputs[0].tpot is None
    bare = record()
    bare.finished = 103.0
    assert (bare.ttft, bare.decode_time, bare.queue_time) == (None, None, None)
    assert bare.e2e == pytest.approx(3.0)  # an embedding
    assert summarize([]).ttft is None


def test_several_outputs_and_prompts() -> None:
    one = RequestRecord(id="r", route="completions", model="m", n=2, arrived=100.0)
    figures = OutputFigures(100.0, 100.5, 101.0, 101.0, 16, 3, 8, 2, 1)
    for prompt, cached in ((0, 16), (1, 32)):
        figures.cached_tokens = cached
        for index in (0, 1):
            end = Piece("e", index, "", [4, 5], finish_reason="length", figures=figures)
            one.take(Piece("e", index, "", [3]), prompt=prompt, now=101.0 + prompt)
            one.take(end, prompt=prompt, now=102.0 + index)
            one.take(Piece("e", index, "late text", []), prompt=prompt, now=109.0)
    assert sorted(one.outputs) == [0, 1, 2, 3]
    assert one.output_tokens == 12
    assert one.cached_tokens == 48, "outputs of a prompt share its cached positions"
    assert one.last_emission == 103.0, "text alone is no emission"
    assert one.outputs[2].emissions == [(102.0, 1), (102.0, 2)]
    assert (one.outputs[3].accepted, one.outputs[3].preemptions) == (2, 1)


gaps = st.lists(st.tuples(st.floats(0, 5), st.integers(1, 6)), min_size=1, max_size=20)


@given(gaps)
def test_intervals_per_token_add_up_to_the_decode_time(steps: list[tuple[float, int]]) -> None:
    at, emissions = 101.0, []
    for gap, tokens in steps:
        at += gap
        emissions.append((at, tokens))
    output = OutputRecord(emissions)
    assert sum(k for _, k in output.gaps()) == output.tokens - emissions[0][1]
    total = sum((seconds / k) * k for seconds, k in output.gaps())
    assert total == pytest.approx(emissions[-1][0] - emissions[0][0], abs=1e-9)
    if output.tokens > 1:
        assert output.tpot == pytest.approx(total / (output.tokens - 1), abs=1e-9)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_percentiles_are_those_of_numpy(values: list[float]) -> None:
    import numpy as np

    spread = Spread.of(values)
    assert spread is not None
    expected = np.percentile(values, [50, 90, 99])
    assert [spread.p50, spread.p90, spread.p99] == pytest.approx(list(expected))


def test_the_log_gives_back_what_was_logged(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    records = [
        record([(101.0, 1), (101.2, 2)], stream=True, max_tokens=9),
        record(n=4, outcome="rejected", status=429, reason="queue_full"),
        record([(101.0, 1)], [(102.0, 1)], n=2, outcome="cancelled"),
    ]
    log = RequestLog(path)
    for one in records:
        log.append(one)
    log.close()
    assert list(read_log(path)) == records
    assert (log.written, log.lost) == (3, 0)
    assert summarize(read_log(path)) == summarize(records)
    assert path.stat().st_mode & 0o077 == 0, "for the owner only"
    again = RequestLog(path)  # a second run continues the file
    again.append(records[0])
    again.close()
    assert len(list(read_log(path))) == 4


def test_a_bad_line_is_named_and_a_half_last_one_left_out(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    line = msgspec.json.encode(record())
    path.write_bytes(line + b"\n" + line[:20])
    assert len(list(read_log(path))) == 1
    path.write_bytes(line + b"\n" + line[:20] + b"\n")
    with pytest.raises(ValueError, match="line 2"):
        list(read_log(path))


def test_a_full_disk_costs_lines_but_leaves_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room, plain = [1000], os.write

    def write(file: int, data: memoryview) -> int:
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        done = plain(file, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(events.os, "write", write)
    path = tmp_path / "requests.jsonl"
    log = RequestLog(path)
    with caplog.at_level(logging.WARNING):
        for number in range(40):
            log.append(record([(101.0, 1)], status=number))
        settled(log, 40)
        kept = [one.status for one in read_log(path)]
        assert 0 < len(kept) == log.written < 40
        assert kept == sorted(kept)
        room[0] = 10**6  # space again
        log.append(record(status=99))
        settled(log, 41)
    log.close()
    assert [one.status for one in read_log(path)][-1] == 99
    assert path.read_bytes().endswith(b"\n")
    assert len([line for line in caplog.messages if "No space left" in line]) == 1


def settled(log: RequestLog, lines: int) -> None:
    end = time.monotonic() + 5
    while log.written + log.lost < lines:
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_stuck_disk_delays_nobody_and_holds_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, plain = threading.Event(), os.write

    def write(file: int, data: memoryview) -> int:
        stuck.wait(20)
        return plain(file, data)

    monkeypatch.setattr(events.os, "write", write)
    monkeypatch.setattr(events, "MAX_BACKLOG_BYTES", 20_000)
    log = RequestLog(tmp_path / "requests.jsonl")
    start = time.monotonic()
    for _ in range(2000):
        log.append(record([(101.0, 1)]))
    assert time.monotonic() - start < 2
    assert 0 < log.lost < 2000
    stuck.set()
    log.close()
    assert len(list(read_log(tmp_path / "requests.jsonl"))) == log.written == 2000 - log.lost


def test_a_log_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        RequestLog(tmp_path / "missing" / "requests.jsonl")
