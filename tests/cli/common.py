"""How the tests call the command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from hasten.cli.main import app


def hasten(*args: object, stdin: str | None = None) -> Result:
    """Run the command in this process; ``stdout`` and ``stderr`` are apart in the result.

    An exception that reaches the top would be a traceback for a user, so it is raised here."""
    result = CliRunner().invoke(app, [str(a) for a in args], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def assert_one_line(result: Result, *words: str) -> None:
    """Refused with one line on standard error that holds the words, and nothing else."""
    assert result.exit_code == 1, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("hasten: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def offline() -> dict[str, str]:
    """An environment for subprocesses that never asks the network."""
    return {**os.environ, "HF_HUB_OFFLINE": "1"}
