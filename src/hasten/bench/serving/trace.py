"""Requests of the past to replay: arrival times and lengths, from public trace formats.

- Azure LLM inference traces (Azure/AzurePublicDataset, 2023 and 2024), CSV with the columns
  ``TIMESTAMP, ContextTokens, GeneratedTokens``. Their prompts are unknown; lengths are forced.
- Mooncake-style JSONL (kvcache-ai/Mooncake): ``timestamp`` in milliseconds, ``input_length``,
  ``output_length``, and ``hash_ids``: one id for each block of 512 prompt tokens, equal for equal
  content up to there, so that prefix reuse can be reproduced.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

BLOCK_TOKENS = 512
"""Prompt tokens a hash id stands for: implied by the samples in Mooncake's description."""

MAX_LINE = 1 << 20  # characters; the longest Mooncake rows have some thousands
MAX_LENGTH = 1 << 24  # tokens of a prompt or an output; more is a damaged file


class TraceError(ValueError):
    """A trace that cannot be read; the text names file and line."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request: seconds since the first one, tokens, and the ids of its prompt's blocks."""

    at: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = BLOCK_TOKENS


def read(path: Path, start: float = 0.0) -> list[Row]:
    """The rows that arrive ``start`` seconds into the trace or later, by arrival; the first at 0.

    Raises:
        TraceError: the file cannot be read, a line is not one of the known formats, or nothing
            arrives after ``start``.
    """
    readers: dict[str, Callable[[TextIO], Iterator[Row]]] = {
        ".csv": _azure,
        ".jsonl": _mooncake,
    }
    if path.suffix not in readers:
        raise TraceError(f"{path}: a trace ends in {' or '.join(readers)}")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = sorted(readers[path.suffix](file), key=lambda row: row.at)
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TraceError(f"{path} is not UTF-8 text ({error.reason})") from None
    except TraceError as error:
        raise TraceError(f"{path}:{error}") from None
    if not rows:
        raise TraceError(f"{path} holds no requests")
    first, length = rows[0].at, rows[-1].at - rows[0].at
    chosen = [row for row in rows if row.at - first >= start]
    if not chosen:
        raise TraceError(f"{path}: nothing arrives after {start:g} s; it is {length:.0f} s long")
    return [replace(row, at=row.at - chosen[0].at) for row in chosen]


def _azure(file: TextIO) -> Iterator[Row]:
    lines = csv.DictReader(_short_lines(file))
    wanted = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    if missing := [name for name in wanted if name not in (lines.fieldnames or ())]:
        raise TraceError(f"1: no column {missing[0]}; an Azure trace has {', '.join(wanted)}")
    try:
        for row in lines:
            where = lines.line_num
            try:
                at = datetime.fromisoformat(row["TIMESTAMP"].strip()).timestamp()
            except (ValueError, AttributeError, OverflowError, OSError):
                raise TraceError(f"{where}: {row['TIMESTAMP']!r:.60} is not a time") from None
            yield Row(
                at,
                _length(row["ContextTokens"], "ContextTokens", where),
                _length(row["GeneratedTokens"], "GeneratedTokens", where),
            )
    except csv.Error as error:
        raise TraceError(f"{lines.line_num}: {error}") from None


def _mooncake(file: TextIO) -> Iterator[Row]:
    for number, line in enumerate(_short_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise TraceError(f"{number}: not JSON") from None
        if not isinstance(row, dict):
            raise TraceError(f"{number}: expected an object")
        at = row.get("timestamp")
        if isinstance(at, bool) or not isinstance(at, int | float) or not abs(at) < 1e15:
            raise TraceError(f"{number}: 'timestamp' must be a number of milliseconds")
        blocks = row.get("hash_ids", [])
        if not isinstance(blocks, list) or not all(
            type(b) is int and abs(b) < 2**63 for b in blocks
        ):
            raise TraceError(f"{number}: 'hash_ids' must be a list of integers")
        yield Row(
            at / 1000,
            _length(row.get("input_length"), "input_length", number),
            _length(row.get("output_length"), "output_length", number),
            tuple(blocks),
        )


def _short_lines(file: TextIO) -> Iterator[str]:
    for number in itertools.count(1):
        line = file.readline(MAX_LINE + 1)
        if not line:
            return
        if len(line) > MAX_LINE:
            raise TraceError(f"{number}: a line of more than {MAX_LINE} characters")
        yield line


def _length(value: Any, name: str, line: int) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not text.isascii() or not text.isdigit() or len(text) > 9:
        raise TraceError(f"{line}: {name} must be a count of tokens, not {value!r:.60}")
    if int(text) > MAX_LENGTH:
        raise TraceError(f"{line}: {name} is {text}; more than {MAX_LENGTH} is not believable")
    return int(text)


def scaled(rows: Iterable[Row], time_scale: float = 1.0, length_scale: float = 1.0) -> list[Row]:
    """Times multiplied by ``time_scale``; lengths divided by ``length_scale``, at least 1.

    Prompt and output shrink alike, so their ratio stays; a block of shared prompt shrinks with
    them.
    """
    if not (0 < time_scale < float("inf") and 0 < length_scale < float("inf")):
        raise ValueError("time scale and length scale must be positive")
    return [
        replace(
            row,
            at=row.at * time_scale,
            prompt=max(1, round(row.prompt / length_scale)),
            output=max(1, round(row.output / length_scale)),
            block_tokens=max(1, round(row.block_tokens / length_scale)),
        )
        for row in rows
    ]


def clipped(rows: Iterable[Row], longest: int) -> tuple[list[Row], int]:
    """Rows whose prompt and output together fit ``longest`` tokens, and how many were cut.

    Both are cut in proportion, so that their ratio stays (as Sarathi-Serve's generator does).
    """
    if longest < 2:
        raise ValueError("a request needs at least two tokens: one of prompt, one of output")
    kept, cut = [], 0
    for row in rows:
        total = row.prompt + row.output
        if total > longest:
            cut += 1
            prompt = min(max(1, row.prompt * longest // total), longest - 1)
            row = replace(row, prompt=prompt, output=longest - prompt)
        kept.append(row)
    return kept, cut


def at_times(rows: Sequence[Row], times: Sequence[float]) -> list[Row]:
    """The lengths of the rows, at other times."""
    return [replace(row, at=at) for row, at in zip(rows, times, strict=True)]


def at_rate(rows: Sequence[Row], rate: float) -> list[Row]:
    """The rows with their gaps stretched alike, so that they arrive at this mean rate."""
    if not 0 < rate < float("inf"):
        raise ValueError(f"the rate must be positive and finite, not {rate}")
    length = rows[-1].at
    if len(rows) < 2 or length == 0:
        raise ValueError("a rate needs at least two requests at different times")
    return [replace(row, at=row.at * (len(rows) - 1) / (rate * length)) for row in rows]
