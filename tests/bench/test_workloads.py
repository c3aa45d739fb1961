"""Workloads are the same every time, and none of them was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hasten.bench import workloads
from hasten.bench.workloads import Item, WorkloadError
from hasten.training.corpus import split, standard_library


def test_code_is_deterministic_and_grows_at_its_end() -> None:
    items = workloads.code(12)
    assert workloads.code(12) == items
    assert workloads.code(5) == items[:5] == workloads.workload("code", 5)
    assert workloads.code(5, seed=1) != items[:5]
    assert len({item.id for item in items}) == 12


def test_code_is_cut_from_held_out_files_only() -> None:
    trained, held_out = split(standard_library())
    assert trained and held_out
    for item in workloads.code(24):
        assert isinstance(item.prompt, str) and 0 < len(item.prompt) <= 2000
        assert any(f"\n{item.prompt}" in f"\n{file.text}" for file in held_out)  # whole lines
        assert item.prompt.rstrip("\n").rsplit("\n", 1)[-1].lstrip().startswith("def ")


def test_code_repeats_no_prompt() -> None:
    items = workloads.code(2000)
    assert len({item.prompt for item in items}) == len({item.id for item in items}) == 2000
    with pytest.raises(WorkloadError, match="different prompts"):
        workloads.code(10**6)


def test_random_tokens_have_the_asked_shape() -> None:
    items = workloads.random_tokens(3, 10, 7, vocab=50)
    assert items == workloads.random_tokens(3, 10, 7, vocab=50)
    assert len({item.prompt for item in items}) == 3
    for item in items:
        assert isinstance(item.prompt, tuple) and len(item.prompt) == 10
        assert set(item.prompt) <= set(range(50))
        assert item.params == {"max_tokens": 7, "ignore_eos": True, "temperature": 0}


def test_an_unknown_workload_names_those_there_are() -> None:
    with pytest.raises(
        WorkloadError, match="no workload 'nope'; there are: code, tasks, spec-bench"
    ):
        workloads.workload("nope")


def test_external_data_has_to_be_pointed_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HASTEN_DATA", raising=False)
    with pytest.raises(WorkloadError, match="set HASTEN_DATA"):
        workloads.spec_bench(3)
    monkeypatch.setenv("HASTEN_DATA", str(tmp_path / "missing"))
    with pytest.raises(WorkloadError, match="missing"):
        workloads.spec_bench(3)
    (tmp_path / "prompts").mkdir()
    kinds = ["writing", "coding", "qa"]
    rows = [{"question_id": i, "category": kinds[i // 3], "turns": ["a", "b"]} for i in range(9)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "prompts" / "spec_bench_even.jsonl").write_text(lines)
    monkeypatch.setenv("HASTEN_DATA", str(tmp_path))
    some = workloads.workload("spec-bench", 8)  # categories in turns; one has three, one has six
    assert [item.id for item in some] == ["0", "6", "1", "7", "2", "8", "3", "4"]
    assert some[:2] == [
        Item("0", turns=("a", "b"), category="mt-bench"),
        Item("6", turns=("a", "b"), category="qa"),
    ]
    assert [item.id for item in workloads.workload("spec-bench")] == list("012345678")


def test_the_real_questions_can_be_read() -> None:
    try:
        items = workloads.spec_bench()
    except WorkloadError as error:
        pytest.skip(str(error))
    assert len(items) > 100 and len({item.category for item in items}) == 6
    assert all(item.turns and all(isinstance(t, str) for t in item.turns) for item in items)


def read(path: Path, text: str) -> list[Item]:
    path.write_text(text, encoding="utf-8")
    return list(workloads.read_items(path))


def test_lines_become_items(tmp_path: Path) -> None:
    text = (
        '{"prompt": "naïve"}\n\n'
        '{"id": 7, "prompt": [1, 2]}\n'
        '{"question_id": "q", "turns": ["a", "b"], "params": {"seed": 1}}\n'
        '{"messages": [{"role": "user", "content": "hi"}]}'
    )
    assert read(tmp_path / "x.jsonl", text) == [
        Item("1", "naïve"),
        Item("7", (1, 2)),
        Item("q", turns=("a", "b"), params={"seed": 1}),
        Item("5", turns=([{"role": "user", "content": "hi"}],)),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "not JSON"),
        ("3", "expected an object, found int"),
        ("{}", "exactly one of 'prompt', 'turns' and 'messages'"),
        ('{"prompt": 3}', "text or a list of token ids"),
        ('{"prompt": [true]}', "text or a list of token ids"),
        ('{"turns": "a"}', "'turns' must be a list"),
        ('{"turns": [1]}', "'turns' must hold the user's texts"),
        ('{"messages": []}', "'messages' must be a list with something in it"),
        ('{"prompt": "a", "params": 3}', "'params' must be an object"),
        ('{"prompt": "a", "params": {"top_q": 1}}', "no sampling parameter is called 'top_q'"),
        ('{"prompt": "a", "params": {"top_p": 2}}', "top_p is 2"),
        ('{"prompt": "a", "id": "1"}', "id '1' is that of line 1 already"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(WorkloadError) as error:
        read(tmp_path / "x.jsonl", '{"prompt": "good"}\n' + line)
    assert str(error.value).startswith(f"{tmp_path / 'x.jsonl'}:2: ")
    assert message in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="No such file"):
        list(workloads.read_items(tmp_path / "no.jsonl"))
    with pytest.raises(WorkloadError, match="directory"):
        list(workloads.read_items(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe{}")
    with pytest.raises(WorkloadError, match="not UTF-8"):
        list(workloads.read_items(tmp_path / "binary"))
