"""``hasten train trigrams``: a table that drafts use, and what cannot be used is refused."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import pytest

from tests.cli.common import assert_one_line, hasten

OPTIONS = ("--max-tokens", 48, "--temperature", 0, "--no-figures")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a").mkdir()
    (folder / "a" / "x.py").write_text(inspect.getsource(textwrap))
    (folder / "bytes").write_bytes(b"\xff\xfe\xff")
    out = folder / "new" / "table"
    result = hasten("train", "trigrams", folder / "a", folder / "bytes", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"wrote {out} (") and "1 files" in result.stderr
    return out


def test_the_text_stays_the_same(table: Path) -> None:
    outputs = [
        hasten("generate", "def fill(text):\n    ", *OPTIONS, *stack)
        for stack in ((), ("--stack", f"draft=aded(corpus={table})"))
    ]
    assert [o.exit_code for o in outputs] == [0, 0], outputs[1].stderr
    assert outputs[0].stdout == outputs[1].stdout


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    stack = f"draft=aded(corpus={tmp_path / 'none'})"
    result = hasten("generate", "x", *OPTIONS, "--stack", stack)
    assert_one_line(result, "there is no such file", "hasten train trigrams")


def test_texts_without_trigrams_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("a")
    result = hasten("train", "trigrams", tmp_path / "short", "-o", tmp_path / "t")
    assert_one_line(result, "no tri-grams")
    assert not (tmp_path / "t").exists()
