"""``hasten compare`` and ``hasten bench``, as small as they go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


def test_compare_as_json(questions: Path) -> None:
    result = hasten("compare", "plain", "draft=prompt-lookup", "-w", questions, *SMALL, "--json")
    data = json.loads(result.stdout)
    assert [row["output"] for row in data["rows"]] == ["equal (3 of 3)"] * 2
    assert data["rows"][0]["ratio"] == [1.0, 1.0]
    assert data["conditions"]["versions"].keys() >= {"python", "hasten", "torch"}


def test_compare_refuses_before_it_measures(questions: Path, tmp_path: Path) -> None:
    assert_one_line(hasten("compare", "plain", "plain", "-w", questions), "given twice")
    assert_one_line(hasten("compare", "draft=nope", "-w", questions), "no method 'nope'")
    assert_one_line(hasten("compare", "plain", "-w", "nope"), "code, tasks, spec-bench", ".jsonl")
    assert_one_line(hasten("compare", "plain", "-w", tmp_path / "no.jsonl"), "no.jsonl")
    assert_one_line(hasten("compare", "plain", "-w", questions, "-o", questions), "exists")
    assert hasten("compare", "plain", "-w", questions, "--rounds", 0).exit_code == 2
    assert hasten("compare").exit_code == 2


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
