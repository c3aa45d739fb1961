"""The script behind benchmarks/cpu-decode: who is measured when, and what the report says."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cpu_decode, random_checkpoint
from benchmarks.cpu_decode import GROUPS, Case, Group, Records
from hasten import LLM, SamplingParams
from hasten.bench.peers.engines import PEERS, Setup
from hasten.bench.peers.process import PeerError
from hasten.models.loading import REFERENCE

GROUP = Group("qwen0.5b", "int8", "int8", {"decode-128": (1.4, 0.85)}, steps=True)
FIRST = {"llama.cpp": 40.0, "openvino": 30.0, "ctranslate2": 29.0, "onnxruntime-genai": 20.0}


class Scripted:
    """An engine at a given rate."""

    def __init__(self, rate: float, log: list[str], name: str) -> None:
        self.rate, self.log, self.name = rate, log, name
        log.append(f"{name} start")

    def ask(self, **message: Any) -> dict[str, Any]:
        self.log.append(f"{self.name} {message['do']}")
        if message["do"] == "verify":
            return {"seconds": {str(r): [0.01 * r] for r in message["rows"]}}
        return {"times": [1 + i / self.rate for i in range(message["new"])]}

    def close(self) -> None:
        self.log.append(f"{self.name} close")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Engines at the rates of FIRST, hasten at 60; transformers cannot run."""
    log: list[str] = []

    def start(name: str, group: Group, *rest: Any) -> Scripted:
        if name == "transformers":
            raise PeerError("transformers: not today")
        rest[2].add(
            what="engine",
            group=group.name,
            engine=name,
            label=f"{name} 1.0",
            weight_bytes=500_000_000,
            kv_bytes=1,
            peak_bytes=2,
            load_seconds=0.5,
        )
        return Scripted({"hasten": 60.0, **FIRST}[name], log, name)

    monkeypatch.setattr(cpu_decode, "start", start)
    monkeypatch.setattr(cpu_decode, "checkpoint_of", lambda setup, shape: Path())
    monkeypatch.setattr(cpu_decode._native, "read_bandwidth", lambda nbytes, repeats: 34e9)
    return log


def measure(path: Path, rounds: int) -> Records:
    records = Records(path)
    cpu_decode.measure_group(GROUP, Setup(None), records, rounds, threads=1)
    return records


def test_slow_peers_leave_after_the_first_round(log: list[str], tmp_path: Path) -> None:
    records = measure(tmp_path / "cells.jsonl", rounds=3)
    cells = records.find(what="cell", case="decode-128")
    by_round = [{c["engine"] for c in cells if c["round"] == r} for r in range(4)]
    assert by_round[0] == {"hasten", *FIRST}
    # onnxruntime is 2x behind the best, ctranslate2 is the third: two stay
    assert by_round[1] == by_round[2] == by_round[3] == {"hasten", "llama.cpp", "openvino"}
    stepped = {c["engine"] for c in records.find(what="cell", case="step-16")}
    assert stepped == {"hasten", "llama.cpp"}
    # one at a time in round 0, the kept ones together and started once for all other rounds
    assert log[: log.index("llama.cpp start")].count("hasten close") == 1
    assert [log.count(f"{name} start") for name in ("hasten", "llama.cpp", "ctranslate2")] == [
        2,
        2,
        1,
    ]
    assert [log.count(f"{name} close") for name in ("hasten", "llama.cpp", "ctranslate2")] == [
        2,
        2,
        1,
    ]


def test_a_stopped_run_goes_on_where_it_was(log: list[str], tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    whole = measure(path, rounds=2)
    lines = path.read_text().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if '"round": 1' in line and "step-16" in line)
    path.write_text("".join(lines[: last + 1]))
    log.clear()
    again = measure(path, rounds=2)

    def cells(records: Records) -> list[tuple[str, str, int, float]]:
        found = records.find(what="cell")
        return sorted((c["engine"], c["case"], c["round"], c["value"]) for c in found)

    assert cells(again) == cells(whole)
    log.clear()
    measure(path, rounds=2)
    assert log == []


def test_who_could_not_run_is_tried_again_by_the_next_run(log: list[str], tmp_path: Path) -> None:
    records = measure(tmp_path / "cells.jsonl", rounds=1)
    assert len(records.find(what="absent", engine="transformers")) == 1  # not once a round
    records.retry_absent()
    assert Records(records.path).find(what="absent") == []
    assert records.find(what="cell") == Records(records.path).find(what="cell")


def test_the_report_compares_round_by_round(log: list[str], tmp_path: Path) -> None:
    records = measure(tmp_path / "cells.jsonl", rounds=5)
    path = cpu_decode.report(records, [GROUP], tmp_path)
    text = path.read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| qwen0.5b int8 decode-128 |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "qwen0.5b int8 decode-128",
        "llama.cpp 1.0",
        "40.0 (40.0-40.0)",
        "60.0 (60.0-60.0)",
        "1.50 (1.50-1.50)x",
        "≥ 1.4x, ≥ 85 %",
        "88.2 (88.2-88.2) %",  # 60 x 500 MB of 34 GB/s
        "yes",
    ]
    assert "| 16.0 (16.0-16.0) | 16.0 (16.0-16.0) |  | ≤ 1.5 |  | **no** |" in text
    assert "hasten 60, llama.cpp 40, openvino 30, ctranslate2 29, onnxruntime-genai 20" in text
    assert "transformers: not today" in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_rates_leave_the_prompt_out_and_count_all_sequences() -> None:
    def ask(times: list[float]) -> Any:
        return type("Process", (), {"ask": lambda self, **message: {"times": times}})()

    rng = random.Random(0)
    assert Case(128, 5).measure(ask([9, 10, 11, 12, 13]), rng) == 1
    assert Case(128, 5, batch=8).measure(ask([9, 10, 11, 12, 13]), rng) == 8
    assert Case(512, 1).measure(ask([0.25]), rng) == 2048


def test_hasten_is_started_like_the_others(tmp_path: Path) -> None:
    records = Records(tmp_path / "cells.jsonl")
    group = replace(GROUP, compressed="", steps=False)
    process = cpu_decode.start("hasten", group, Setup(None), REFERENCE / "target", records, 2)
    with process:
        cpu_decode.measure_cell(group, "hasten", process, "decode-128", 1, records)
    assert records.values(group=group.name, case="decode-128", engine="hasten")[1] > 0
    assert cpu_decode.label_of(records, group, "hasten").startswith("hasten 0")
    assert cpu_decode.memory(records, [group])[-1].startswith("| qwen0.5b int8 | 12 |")


def test_every_group_can_be_measured() -> None:
    from hasten.stack import Stack

    assert len({group.name for group in GROUPS}) == len(GROUPS)
    for group in GROUPS:
        Stack.parse({"weights": group.compressed or "checkpoint"})
        assert group.shape in random_checkpoint.SHAPES
        assert any(group.weights in peer.forms for peer in PEERS)
        for name in group.targets:
            case = group.case(name)
            assert case.prompt + case.new <= cpu_decode.LENGTH
            assert case.batch <= cpu_decode.SEQUENCES


@pytest.mark.parametrize("name", ["ref-small", "qwen0.5b"])
def test_random_checkpoints_run(name: str, tmp_path: Path) -> None:
    shape = replace(random_checkpoint.SHAPES[name], hidden=128, layers=2, inner=64, vocab=4200)
    random_checkpoint.write(tmp_path / "made", shape)
    llm = LLM(tmp_path / "made", max_sequences=1, max_length=64)
    (result,) = llm.generate([[4199, 5, 6]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(result.outputs[0].token_ids) == 4
    assert llm.tokenizer.decode([4199]) == "unused-4199"
