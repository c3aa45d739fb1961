"""Traces: what is read, how it is scaled, and which prompts it becomes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hasten
from hasten.bench.serving import trace
from hasten.bench.serving.arrivals import Arrivals
from hasten.bench.serving.plan import Shape, plan, synthetic_rows
from hasten.bench.serving.prompts import RandomIds, TextPieces
from hasten.bench.serving.trace import Row, TraceError
from hasten.models.tokenizer import Tokenizer

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""


def write(folder: Path, text: str, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_azure_rows(tmp_path: Path) -> None:
    rows = trace.read(write(tmp_path, AZURE))
    assert [(r.prompt, r.output) for r in rows] == [(374, 44), (396, 109), (879, 55)]
    assert [r.at for r in rows] == pytest.approx([0, 4.314579, 4.541877], abs=1e-6)
    later = trace.read(write(tmp_path, AZURE), start=4.4)
    assert [(r.at, r.prompt) for r in later] == [(0.0, 879)]
    with pytest.raises(TraceError, match=r"nothing arrives after 60 s; it is 5 s long"):
        trace.read(write(tmp_path, AZURE), start=60)


def test_mooncake_rows_and_their_shared_blocks(tmp_path: Path) -> None:
    lines = (
        '{"timestamp": 1000, "input_length": 1100, "output_length": 7, "hash_ids": [4, 5, 6]}\n'
        '{"timestamp": 250, "input_length": 1300, "output_length": 9, "hash_ids": [4, 5, 9]}\n'
        '{"timestamp": 1500, "input_length": 600, "output_length": 2}\n'
    )
    rows = trace.scaled(trace.read(write(tmp_path, lines, "t.jsonl")), 2.0, 8.0)
    assert [r.at for r in rows] == [0.0, 1.5, 2.5]  # by arrival, times doubled
    assert [r.prompt for r in rows] == [162, 138, 75]
    make = RandomIds(1000, seed=3)
    first, second, third = (make.make(i, row) for i, row in enumerate(rows))
    assert list(map(len, (first, second, third))) == [162, 138, 75]
    assert first[:128] == second[:128]  # blocks 4 and 5, 64 tokens each
    assert first[128:] != second[128:162]
    assert third[:64] != first[:64]


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("t.csv", "A,B\n1,2\n", "1: no column TIMESTAMP"),
        ("t.csv", AZURE + "yesterday,1,2\n", "5: 'yesterday' is not a time"),
        ("t.csv", AZURE + "2023-11-16 18:15:52,-3,2\n", "5: ContextTokens"),
        ("t.csv", AZURE + "2023-11-16 18:15:52,3\n", "5: GeneratedTokens"),
        ("t.csv", AZURE + "2023-11-16 18:15:52,99999999,1\n", "not believable"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no requests"),
        ("t.csv", "", "1: no column TIMESTAMP"),
        ("t.jsonl", "{]\n", "1: not JSON"),
        ("t.jsonl", "[]\n", "1: expected an object"),
        ("t.jsonl", '{"timestamp": "x"}\n', "1: 'timestamp'"),
        ("t.jsonl", '{"timestamp": NaN, "input_length": 1, "output_length": 1}', "1: 'timestamp'"),
        ("t.jsonl", '{"timestamp": 1, "input_length": true, "output_length": 1}', "input_length"),
        (
            "t.jsonl",
            '{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": ["a"]}',
            "hash_ids",
        ),
        ("t.jsonl", "[" * 100_000, "1: not JSON"),
        ("t.jsonl", " " * (2 << 20), "more than"),
        ("t.txt", "", "a trace ends in"),
    ],
)
def test_a_bad_trace_names_its_line(tmp_path: Path, name: str, text: str, what: str) -> None:
    with pytest.raises(TraceError, match=what):
        trace.read(write(tmp_path, text, name))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 5_000)), min_size=1, max_size=20),
    st.integers(2, 5_000),
    st.sampled_from([1.0, 3.0, 8.0]),
)
def test_scaling_keeps_the_ratio_and_clipping_fits(
    pairs: list[tuple[int, int]], longest: int, scale: float
) -> None:
    rows = trace.scaled([Row(float(i), p, o) for i, (p, o) in enumerate(pairs)], 1.0, scale)
    for row, (prompt, output) in zip(rows, pairs, strict=True):
        assert abs(row.prompt - max(1, prompt / scale)) <= 0.5
        assert abs(row.output - max(1, output / scale)) <= 0.5
    kept, cut = trace.clipped(rows, longest)
    assert cut == sum(r.prompt + r.output > longest for r in rows)
    for before, after in zip(rows, kept, strict=True):
        assert after.prompt >= 1 <= after.output
        assert after.prompt + after.output == min(longest, before.prompt + before.output)
        share = before.prompt / (before.prompt + before.output)
        assert abs(after.prompt - share * (after.prompt + after.output)) <= 1


def test_a_shape_gives_times_of_a_rate() -> None:
    rows = [Row(at, 10, 5) for at in (0.0, 1.0, 4.0, 9.0)]
    shape = Shape(rows, None, None, seed=0)
    assert [r.at for r in shape.at_rate(None)] == [0, 1, 4, 9]
    assert [r.at for r in shape.at_rate(3.0)] == pytest.approx([0, 1 / 9, 4 / 9, 1])
    poisson = Shape(rows, Arrivals(), 2.0, seed=5)
    assert [r.at for r in poisson.at_rate(2.0)] == Arrivals().times(4, 2.0, 5)
    short = Shape(rows, None, None, seed=0, duration=4.0)
    assert len(short.at_rate(None)) == 2


def test_a_plan_is_the_same_for_the_same_seed() -> None:
    rows = synthetic_rows(20, 50, 10, 0.5, seed=4)
    assert rows == synthetic_rows(20, 50, 10, 0.5, seed=4) != synthetic_rows(20, 50, 10, 0.5, 5)
    assert all(25 <= r.prompt <= 75 and 5 <= r.output <= 15 for r in rows)
    once = plan(rows, RandomIds(100, 1, without=[7]))
    assert once == plan(rows, RandomIds(100, 1, without=[7]))
    assert once != plan(rows, RandomIds(100, 2, without=[7]))
    assert once[:5] == plan(rows[:5], RandomIds(100, 1, without=[7]))
    for item, row in zip(once, rows, strict=True):
        assert len(item.prompt) == item.prompt_tokens == row.prompt
        assert 7 not in item.prompt and set(item.prompt) <= set(range(100))
    assert len({tuple(item.prompt) for item in once}) == 20


def test_text_prompts_have_the_wanted_number_of_tokens() -> None:
    tokenizer = Tokenizer.load(Path(hasten.__file__).parent / "reference" / "target")
    text = Path(trace.__file__).read_text()
    source = tokenizer.encode(text, add_special_tokens=False)
    make = TextPieces(tokenizer, source, seed=0)
    for number, length in enumerate((2, 3, 17, 100, 333)):  # its BOS included
        prompt = make.make(number, Row(0.0, length, 1))
        assert len(tokenizer.encode(prompt)) == length
        assert prompt == TextPieces(tokenizer, source, seed=0).make(number, Row(0.0, length, 1))
    with pytest.raises(ValueError, match="longer than the text"):
        make.make(0, Row(0.0, 10**6, 1))


@pytest.mark.skipif("HASTEN_DATA" not in os.environ, reason="HASTEN_DATA is not set")
@pytest.mark.parametrize(("name", "count"), [("conv", 19_366), ("code", 8_819)])
def test_the_public_azure_traces_can_be_read(name: str, count: int) -> None:
    rows = trace.read(Path(os.environ["HASTEN_DATA"]) / "traces" / f"azure_2023_{name}.csv")
    assert len(rows) in (count, count - 1)
    assert 3000 < rows[-1].at < 4000  # an hour
