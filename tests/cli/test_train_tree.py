"""``hasten train tree``: a file that drafts use, and what cannot be used is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.common import assert_one_line, hasten

OPTIONS = ("--max-tokens", 48, "--temperature", 0, "--no-figures")
SMALL = ("--length", 12, "--nodes", 10, "--depth", 3, "--temperature", 0.8)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    (folder / "prompts").write_text("def f(x):\n\nimport os\nclass A:\nfor i in range(\n1, 2,\n")
    out = folder / "new" / "tree.json"
    result = hasten("train", "tree", "-o", out, "--prompts", folder / "prompts", *SMALL)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"wrote {out} (10 nodes, ") and "default" in result.stdout
    return out


def test_the_file_says_what_the_tree_rests_on(tree: Path) -> None:
    data = json.loads(tree.read_text())
    assert data["draft"] == "token-recycling" and len(data["nodes"]) == 10
    assert len(data["accuracy"]) == len(data["reached"]) == 3
    assert data["reached"][0] > 20 and max(map(len, data["nodes"])) <= 3


def test_the_text_stays_the_same(tree: Path) -> None:
    outputs = [
        hasten("generate", "def fill(text):\n    ", *OPTIONS, *stack)
        for stack in ((), ("--stack", f"draft=token-recycling(tree={tree})"))
    ]
    assert [o.exit_code for o in outputs] == [0, 0], outputs[1].stderr
    assert outputs[0].stdout == outputs[1].stdout


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "t"
    stack = f"draft=token-recycling(tree={out})"
    result = hasten("generate", "x", *OPTIONS, "--stack", stack)
    assert_one_line(result, "there is no such file", "hasten train tree")
    result = hasten("train", "tree", "-o", out, "--draft", "aded")
    assert_one_line(result, "--draft aded", "token-recycling")
    (tmp_path / "empty").write_text("\n\n")
    result = hasten("train", "tree", "-o", out, "--prompts", tmp_path / "empty")
    assert_one_line(result, "no prompts")
    result = hasten("train", "tree", "-o", out, "--prompts", tmp_path / "missing")
    assert_one_line(result, "missing")
    assert not out.exists()
