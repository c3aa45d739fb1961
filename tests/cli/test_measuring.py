"""``hasten compare`` and ``hasten bench``, as small as they go."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hasten.cli import options
from hasten.methods import cards
from tests.cli.common import assert_one_line, hasten, write_lines

SMALL = ("--max-tokens", 6, "--limit", 3, "--batch", 3, "--rounds", 2)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [{"prompt": f"y = {i}\n" * 6, "id": i} for i in range(5)]
    rows[0]["params"] = {"ignore_eos": True}
    return write_lines(tmp_path / "questions.jsonl", rows)


def test_compare_prints_a_table_and_writes_a_report(questions: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made" / "report"
    stacks = ("plain", "draft=prompt-lookup", "select=sink-window(sinks=1,window=16)")
    result = hasten("compare", *stacks, "-w", questions, *SMALL, "-o", folder)
    assert result.exit_code == 0, result.stderr
    table = [line for line in result.stdout.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in table] == list(stacks)
    assert "equal (3 of 3)" in table[0] and "equal (3 of 3)" in table[1]
    assert "3 prompts" in result.stdout and "- command:" in result.stdout
    data = json.loads((folder / "report.json").read_text())
    assert [row["name"] for row in data["rows"]] == list(stacks)
    assert all(len(row["tokens_per_second"]) == 2 for row in data["rows"])
    assert table[1] in (folder / "report.md").read_text()
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_one_at_a_time_is_told_by_kind_and_with_the_share_of_loops(questions: Path) -> None:
    sizes = ("--max-tokens", 40, "--limit", 2, "--batch", 1, "--rounds", 1)
    result = hasten("compare", "plain", "draft=prompt-lookup", "-w", questions, *sizes)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "| decode tokens/s of one sequence | all |" in lines
    assert any(line.startswith("| plain outputs that end in a loop | ") for line in lines)
    assert "| with prompts, against first | all |" in lines


def test_compare_as_json(questions: Path) -> None:
    result = hasten("compare", "plain", "draft=prompt-lookup", "-w", questions, *SMALL, "--json")
    data = json.loads(result.stdout)
    assert [row["output"] for row in data["rows"]] == ["equal (3 of 3)"] * 2
    assert data["rows"][0]["ratio"] == [1.0, 1.0]
    assert data["conditions"]["versions"].keys() >= {"python", "hasten", "torch"}


def test_compare_with_all_drafters(questions: Path) -> None:
    """Whoever drafts is a row or is named as absent; what only measures takes no part."""
    sizes = ("--max-tokens", 2, "--limit", 1, "--batch", 1, "--rounds", 1, "--max-length", 128)
    data = json.loads(hasten("compare", "--draft", "all", "-w", questions, *sizes, "--json").stdout)
    text = " ".join([*(row["name"] for row in data["rows"]), data["shape"]])
    assert [row["name"] for row in data["rows"][:2]] == ["plain", "draft=aded"]
    assert "draft=retrieval has no datastore" in text
    for card in cards("draft"):
        drafts = card.name not in ("none", "scripted")
        assert (f"draft={card.name}" in text) == drafts, card.name


def test_compare_refuses_before_it_measures(questions: Path, tmp_path: Path) -> None:
    assert_one_line(hasten("compare", "plain", "plain", "-w", questions), "given twice")
    assert_one_line(hasten("compare", "draft=nope", "-w", questions), "no method 'nope'")
    assert_one_line(hasten("compare", "plain", "-w", "nope"), "code, tasks, spec-bench", ".jsonl")
    assert_one_line(hasten("compare", "plain", "-w", tmp_path / "no.jsonl"), "no.jsonl")
    assert_one_line(hasten("compare", "plain", "-w", questions, "-o", questions), "exists")
    assert hasten("compare", "plain", "-w", questions, "--rounds", 0).exit_code == 2
    assert hasten("compare").exit_code == 2


def test_compare_takes_other_engines_by_name(questions: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("HASTEN_PEERS", raising=False)
    peer = "transformers:prompt-lookup"
    sizes = ("--max-tokens", 12, "--limit", 2, "--rounds", 1)
    result = hasten("compare", peer, "-w", questions, "--weights", "bf16", *sizes, "--batch", 1)
    assert result.exit_code == 0, result.stderr
    ours, theirs, *_ = (line for line in result.stdout.splitlines() if line.startswith("| `"))
    assert "weights=checkpoint" in ours and f"`{peer} " in theirs and " bfloat16`" in theirs
    assert "without" not in result.stdout  # of the other engines none was asked for
    result = hasten("compare", "plain", peer, "-w", questions, *sizes, "--batch", 2)
    assert_one_line(result, f"{peer}: one sequence at a time, not 2; --batch 1")
    result = hasten("compare", "plain", "transformers:assisted=/no", "-w", questions, "--batch", 1)
    assert_one_line(result, "no such folder", "/no")
    assert_one_line(hasten("compare", peer, peer, "-w", questions), "given twice")
    assert_one_line(hasten("compare", "transformers:medusa", "-w", questions), "'medusa'", "give")


def test_the_line_of_rounds_tells_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 30.0, 60.0, 3000.0])
    monkeypatch.setattr(options, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with options.line_of_rounds(2, 2) as show:
        for name, round_ in (("one", 0), ("two", 0), ("two", 1), ("a" * 500, 1)):
            show(name, round_)
    lines = capsys.readouterr().err.split("\r\033[K")[1:]
    assert lines[0] == "warming up, 1 of 2: one"
    assert lines[1] == "warming up, 2 of 2, about 2 min left: two"  # five more of 30 s
    assert lines[2] == "round 1 of 2, 1 of 2, about 2 min left: two"
    assert lines[3].startswith("round 1 of 2, 2 of 2, about 50 min left: aaa")
    assert len(lines[3]) < shutil.get_terminal_size().columns and lines[4] == ""
    assert options.duration(59) == "59 s" and options.duration(3 * 3600 + 301) == "3 h 5 min"


def test_bench_latency_as_json() -> None:
    sizes = ("--input-len", 8, "--output-len", 4, "--batch", 2, "--rounds", 2)
    result = hasten("bench", "latency", *sizes, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    (row,) = data["rows"]
    assert row["name"] == "hasten plain"
    assert len(row["tokens_per_second"]) == len(row["ttft_ms"]) == 2
    assert min(row["tokens_per_second"]) > 0
    assert data["shape"] == "2 prompts of 8 tokens, 4 generated, batch 2"
    assert min(data["decode_bytes_per_second"], data["read_bytes_per_second"]) > 0


def test_bench_throughput_with_a_report(tmp_path: Path) -> None:
    sizes = ("--num-prompts", 3, "--input-len", 5, "--output-len", 1, "--batch", 2, "--rounds", 1)
    result = hasten("bench", "throughput", *sizes, "-o", tmp_path / "r")
    assert result.exit_code == 0, result.stderr
    assert "`hasten plain`" in result.stdout and "3 prompts of 5 tokens" in result.stdout
    data = json.loads((tmp_path / "r" / "report.json").read_text(), parse_constant=pytest.fail)
    assert data["rows"][0]["decode_per_second"] == [None]  # one token has no time per token


def test_bench_refuses_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert_one_line(hasten("bench", "latency", "-o", file), "exists")
    assert_one_line(hasten("bench", "latency", "-m", "/nope"), "/nope")
    assert_one_line(hasten("bench", "latency", "--input-len", 5000, "--batch", 1), "5000 tokens")
    assert hasten("bench", "latency", "--rounds", 0).exit_code == 2
