"""The command as a whole, and the commands that only list or make things."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hasten as package
from hasten.cli import options
from hasten.methods import SLOTS
from tests.cli.common import assert_one_line, hasten

COMMANDS = (
    ("generate",),
    ("chat",),
    ("run",),
    ("methods",),
    ("compare",),
    ("bench",),
    ("bench", "latency"),
    ("bench", "throughput"),
    ("train",),
    ("train", "reference"),
    ("train", "kangaroo"),
    ("train", "layerskip"),
    ("widen",),
)


def test_version() -> None:
    assert hasten("--version").stdout == f"hasten {package.__version__}\n"


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hasten", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stderr == ""
    for command, *_ in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command: tuple[str, ...]) -> None:
    result = hasten(*command, "--help")
    assert result.exit_code == 0 and "Usage:" in result.stdout
    unknown = hasten(*command, "--no-such-option")
    assert unknown.exit_code == 2 and "No such option" in unknown.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("64k", 64 << 10), ("512M", 512 << 20), ("2G", 2 << 30), ("1T", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert options.size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5G", "2GB", "G", "much"])
def test_what_is_no_size(text: str) -> None:
    result = hasten("generate", "x", "--kv-bytes", text)
    assert result.exit_code == 2 and "--kv-bytes" in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "x"),
        ("chat",),
        ("run", "-w", "code", "--limit", 1, "--show"),
        ("compare", "plain", "-w", "code", "--limit", 1),
        ("bench", "latency"),
        ("bench", "throughput"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_sizes_reach_the_engine(
    command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: object, model: str, **given: object) -> None:
        raise ValueError(f"length {given['max_length']}, memory {given['kv_bytes']}")

    monkeypatch.setattr("hasten.api.frontend.Frontend.__init__", stop)
    assert_one_line(hasten(*command, "--max-length", 99, "--kv-bytes", "3M"), "99", f"{3 << 20}")
    assert_one_line(hasten(*command), "length None, memory None")


def test_methods_for_programs() -> None:
    cards = json.loads(hasten("methods", "--json").stdout)
    wanted = {"name", "slots", "paper", "exact", "training", "needs", "does", "module", "test"}
    for card in cards:
        assert card.keys() >= wanted
        assert set(card["slots"]) <= SLOTS.keys()
        assert card["exact"] in ("bitwise", "distribution", "lossy")
    assert {s for card in cards for s in card["slots"]} == SLOTS.keys()
    drafts = json.loads(hasten("methods", "draft", "--json").stdout)
    assert drafts[0]["name"] == "none"
    assert all("draft" in card["slots"] for card in drafts)


def test_methods_for_people() -> None:
    result = hasten("methods", "draft")
    listed, _, example = result.stdout.partition("The first method")
    assert "none" in listed and "prompt-lookup" in listed and "github.com" in listed
    assert "sink-window" not in listed and "--stack" in example
    assert_one_line(hasten("methods", "nope"), "unknown slot 'nope'", "draft")
    assert hasten("methods", "--compatibility").stdout.startswith("| stack |")


def test_training_refuses_an_unknown_stage() -> None:
    assert_one_line(hasten("train", "reference", "--stage", "nope"), "target, draft, report")


def test_widening_refuses_in_one_line(tmp_path: Path) -> None:
    assert_one_line(hasten("widen", tmp_path), "exists already")
    assert_one_line(hasten("widen", tmp_path / "x", "--preset", "7b"), "7b", "0.5b")
    assert_one_line(hasten("widen", tmp_path / "x", "--dtype", "int8"), "float32 or bfloat16")
    assert_one_line(hasten("widen", tmp_path / "x", "-m", "/nope"), "/nope")
    assert not (tmp_path / "x").exists()
