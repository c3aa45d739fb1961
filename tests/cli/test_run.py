"""``hasten run``: all forms of input, errors, resuming, interrupts."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.common import assert_one_line, hasten, offline, read_lines, write_lines

FEW = ("--max-tokens", 4, "--batch", 4)


def test_every_form_of_line(tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "in.jsonl",
        [
            {"prompt": "def f(x):\n"},
            {"id": "ids", "prompt": [5, 6, 7]},
            {"id": "chat", "messages": [{"role": "user", "content": "Hi"}]},
            {"question_id": 81, "turns": ["One?", "Two?", "Three?"]},
            {"id": "own", "prompt": "x", "params": {"max_tokens": 2, "ignore_eos": True}},
        ],
    )
    out = tmp_path / "out.jsonl"
    result = hasten("run", source, "-o", out, *FEW)
    assert result.exit_code == 0 and result.stdout == "", result.stderr
    assert "5 prompts" in result.stderr and "0 errors" in result.stderr
    rows = {row["id"]: row for row in read_lines(out)}
    assert rows.keys() == {"1", "ids", "chat", "81", "own"}
    assert {name: len(row["outputs"]) for name, row in rows.items()} == {
        "1": 1,
        "ids": 1,
        "chat": 1,
        "81": 3,
        "own": 1,
    }
    assert rows["own"]["figures"][0]["tokens"] == 2
    assert rows["own"]["finish_reasons"] == ["length"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ("not JSON",)),
        ("[1]", ("expected an object",)),
        ("{}", ("exactly one of",)),
        ('{"prompt": "a", "turns": ["b"]}', ("exactly one of",)),
        ('{"prompt": [1.5]}', ("token ids",)),
        ('{"turns": []}', ("something in it",)),
        ('{"messages": ["hi"]}', ("'role'",)),
        ('{"prompt": "a", "params": {"temprature": 1}}', ("'temprature'",)),
        ('{"prompt": "a", "params": {"temperature": -1}}', ("temperature is -1",)),
        ('{"prompt": "a", "id": 1}', ("id '1'", "line 1")),
    ],
)
def test_a_bad_line_names_file_and_line(tmp_path: Path, line: str, words: tuple[str, ...]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    out = tmp_path / "out.jsonl"
    assert_one_line(hasten("run", source, "-o", out), "in.jsonl:3", *words)
    assert not out.exists()


def test_a_prompt_that_does_not_fit_is_an_error_row(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": [7] * 5000}, {"prompt": "b", "params": {"n": 2}}]
    rows += [{"prompt": "c", "params": {name: 1}} for name in ("logprobs", "prompt_logprobs")]
    source, out = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    result = hasten("run", source, "-o", out, *FEW)
    assert result.exit_code == 1 and "4 errors" in result.stderr
    written = {row["id"]: row for row in read_lines(out)}
    assert "the prompt has 5000 tokens" in written["2"]["error"] and written["2"]["outputs"] == []
    assert "n > 1" in written["3"]["error"]
    assert written["4"]["error"] == "logprobs are not written by 'hasten run'"
    assert written["5"]["error"] == "prompt_logprobs are not written by 'hasten run'"
    assert "error" not in written["1"] and len(written["1"]["outputs"]) == 1
    again = hasten("run", source, "-o", out, *FEW)
    assert "5 of 5 done before, 4 of them errors" in again.stderr


def test_resuming_redoes_only_what_is_missing(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": f"x = {i}\n"} for i in range(9)])
    out = tmp_path / "out.jsonl"
    assert hasten("run", source, "-o", out, "--limit", 6, *FEW).exit_code == 0
    whole = out.read_bytes()
    assert len(read_lines(out)) == 6
    out.write_bytes(whole[:-20])  # in the middle of the last line, as a crash would leave it
    result = hasten("run", source, "-o", out, *FEW)
    assert result.exit_code == 0 and "5 of 9 done before" in result.stderr
    rows = read_lines(out)
    assert sorted(row["id"] for row in rows) == [str(i) for i in range(1, 10)]
    kept = whole.splitlines(keepends=True)[:5]
    assert out.read_bytes().startswith(b"".join(kept))
    before = out.read_bytes()
    assert "9 of 9 done before" in hasten("run", source, "-o", out, *FEW).stderr
    assert out.read_bytes() == before


def test_resuming_with_another_prompt_or_other_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": "a", "prompt": "x"}, {"id": "b", "turns": ["y"], "params": {"seed": 1}}]
    source, out = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert hasten("run", source, "-o", out, "--limit", 1, *FEW).exit_code == 0
    (row,) = read_lines(out)
    assert len(row["key"]) == 16
    write_lines(out, [row, {"id": "b", "outputs": ["an older row, without a key"]}])
    before = out.read_bytes()
    same = hasten("run", source, "-o", out, *FEW, "--stack", "plain", "--threads", 1)
    assert same.exit_code == 0 and "2 of 2 done before" in same.stderr
    monkeypatch.setattr("hasten.api.llm.LLM", None)  # nothing is loaded from here on
    changes = (
        ("--max-tokens", 5),
        ("--temperature", 0.5),
        ("--stack", "draft=prompt-lookup"),
        ("-m", "reference-draft"),
    )
    for change in changes:
        result = hasten("run", source, "-o", out, *FEW, *change)
        assert_one_line(result, "out.jsonl", "id 'a'", "prompt", "settings", "another --output")
    for other in ({"prompt": "z"}, {"prompt": "x", "params": {"top_k": 2}}):
        write_lines(source, [{"id": "a", **other}])
        assert_one_line(hasten("run", source, "-o", out, *FEW), "id 'a'")
    assert out.read_bytes() == before


@pytest.mark.parametrize("content", ["my notes\n", "my notes without an end", '{"id": 1}\n'])
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, content: str) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}])
    out = tmp_path / "notes.txt"
    out.write_text(content)
    assert_one_line(hasten("run", source, "-o", out), "notes.txt", "choose another file")
    assert out.read_text() == content
    assert_one_line(hasten("run", source, "-o", source), "choose another --output")


def test_show_prints_in_the_order_of_the_input(tmp_path: Path) -> None:
    rows = [{"id": f"n{i}", "prompt": "x" * (40 - 5 * i)} for i in range(7)]
    rows[0]["params"] = {"max_tokens": 30, "ignore_eos": True}
    rows[3] = {"id": "n3", "turns": ["First question?", "Second question?"]}
    rows[4] = {"id": "n4", "prompt": [5, 6, 7]}
    rows[5] = {"id": "n5", "messages": [{"role": "user", "content": "Third question?"}]}
    source = write_lines(tmp_path / "in.jsonl", rows)
    result = hasten("run", source, "--show", *FEW)
    assert result.exit_code == 0
    headings = ["[n0]", "[n1]", "[n2]", "[n3] First question?", "> Second question?"]
    headings += ["[n4] 3 token ids", "[n5] Third question?", "[n6] x"]
    places = [result.stdout.index(heading) for heading in headings]
    assert places == sorted(places)


def test_arguments_that_do_not_fit_together(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}])
    empty = write_lines(tmp_path / "empty.jsonl", [])
    out = tmp_path / "out.jsonl"
    assert_one_line(hasten("run"), "JSONL file or --workload")
    assert_one_line(hasten("run", source, "--workload", "code", "-o", out), "--workload")
    assert_one_line(hasten("run", source), "--output FILE", "--show")
    assert_one_line(hasten("run", tmp_path / "none.jsonl", "-o", out), "none.jsonl")
    assert_one_line(hasten("run", tmp_path, "-o", out), "directory")
    assert_one_line(hasten("run", empty, "-o", out), "no prompts")
    assert_one_line(hasten("run", source, "-o", tmp_path), "directory")
    assert_one_line(hasten("run", source, "-o", tmp_path / "no" / "out.jsonl"), "No such file")
    assert_one_line(hasten("run", "--workload", "nope", "-o", out), "code, tasks, spec-bench")


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    count = 40
    source = write_lines(
        tmp_path / "in.jsonl",
        [{"prompt": f"x = {i}\n", "params": {"ignore_eos": True}} for i in range(count)],
    )
    out = tmp_path / "out.jsonl"
    options = ["--batch", "2", "--max-tokens", "20"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hasten", "run", str(source), "-o", str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=offline(),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out.exists() and out.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted after" in errors and "goes on from here" in errors
    assert "Traceback" not in errors
    first = len(read_lines(out))
    assert 0 < first < count
    result = hasten("run", source, "-o", out, "--max-tokens", 20, "--batch", 16)
    assert result.exit_code == 0 and f"{first} of {count} done before" in result.stderr
    ids = [row["id"] for row in read_lines(out)]
    assert sorted(ids, key=int) == [str(i + 1) for i in range(count)]
