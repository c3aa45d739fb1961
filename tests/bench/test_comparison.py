"""Interleaved rounds, what is made of them, and the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from hasten import LLM, SamplingParams
from hasten.bench import report
from hasten.bench.comparison import (
    Spread,
    agreement,
    by_category,
    category_table,
    compare,
    table,
)
from hasten.bench.contestants import HastenContestant, Run
from hasten.bench.workloads import Item

ITEMS = [Item("a", "x = 1\n" * 5), Item("b", (5, 6, 7))]
PARAMS = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)


class Scripted:
    """A contestant whose n-th run takes the n-th of the given times."""

    def __init__(self, name: str, seconds: Sequence[float], tokens: list[int], log: list[str]):
        self.name = name
        self._seconds = iter(seconds)
        self._tokens = tokens
        self._log = log

    def run(self, items: Sequence[Item], params: SamplingParams) -> Run:
        self._log.append(self.name)
        tokens = {item.id: self._tokens for item in items}
        return Run(next(self._seconds), tokens, ttft=[0.5, 0.25], tpot=[0.1])


def test_rounds_rotate_and_the_first_does_not_count() -> None:
    order: list[str] = []
    told: list[tuple[str, int]] = []
    contestants = [
        Scripted("one", [100, 1, 2, 4], [1, 2], order),
        Scripted("two", [0.001, 2, 2, 2], [1, 3], order),
        Scripted("three", [50, 4, 4, 4], [1, 2], order),
    ]
    rows = compare(contestants, ITEMS, PARAMS, 3, lambda name, round_: told.append((name, round_)))
    rounds = [" ".join(order[i : i + 3]) for i in range(0, 12, 3)]
    assert rounds == ["one two three", "two three one", "three one two", "one two three"]
    assert told == [(name, i // 3) for i, name in enumerate(order)]
    one, two, three = rows
    assert one.tokens_per_second.values == [4, 2, 1] and one.ratio.values == [1, 1, 1]
    assert two.ratio.values == [0.5, 1, 2]  # round by round, not median by median
    assert three.ttft_ms.values == [375] * 3 and three.decode_per_second.values == [10] * 3
    assert [row.output for row in rows] == [
        "equal (2 of 2)",
        "0 of 2 equal, 50 % of tokens before a difference",
        "equal (2 of 2)",
    ]
    assert one.outside is None and one.tau is None


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="same name"):
        compare([Scripted("x", [], [], [])] * 2, ITEMS, PARAMS)


def test_a_spread_shows_as_many_digits_as_matter() -> None:
    assert str(Spread([1, 2, 9])) == "2.00 (1.00-9.00)"
    assert str(Spread([10.04, 30, 20])) == "20.0 (10.0-30.0)"
    assert str(Spread([1000, 3000.4, 2000])) == "2000 (1000-3000)"
    assert Spread([3, 1, 2, 4]).median == 2.5


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ({"a": [1, 2, 3], "b": [4]}, "equal (2 of 2)"),
        ({"a": [1, 2, 9], "b": [4]}, "1 of 2 equal, 75 % of tokens before a difference"),
        ({"a": [1, 2], "b": [4]}, "1 of 2 equal, 75 % of tokens before a difference"),
        ({"a": [1, 2, 3, 4], "b": [4]}, "1 of 2 equal, 100 % of tokens before a difference"),
        ({"b": [9]}, "0 of 2 equal, 0 % of tokens before a difference"),
    ],
)
def test_agreement_counts_what_comes_before_a_difference(
    tokens: dict[str, list[int]], text: str
) -> None:
    assert agreement(tokens, {"a": [1, 2, 3], "b": [4]}) == text


class Paced:
    """A contestant that takes given seconds a token, by category."""

    def __init__(self, name: str, pace: dict[str, float]) -> None:
        self.name = name
        self._pace = pace

    def run(self, items: Sequence[Item], params: SamplingParams) -> Run:
        return Run(
            1.0,
            {item.id: [7] * 5 for item in items},
            ttft=[0.5],
            tpot=[0.1],
            spent={item.id: 4 * self._pace[item.category] for item in items},
            whole={item.id: 1 + 4 * self._pace[item.category] for item in items},
            decoded={item.id: 4 for item in items},
        )


def test_kinds_of_work_in_tokens_a_second_and_against_the_first(tmp_path: Path) -> None:
    items = [Item(str(i), "x", category=("copy", "edit", "once")[i % 3]) for i in range(6)]
    first = Paced("plain", {"copy": 0.1, "edit": 0.05, "once": 0.0})
    second = Paced("other", {"copy": 0.025, "edit": 0.1, "once": 0.0})
    rows = compare([first, second], items, PARAMS, rounds=2)
    copy, edit = by_category(rows, items)  # nothing is known of tokens that came with the first
    assert (copy.name, copy.items, copy.loops) == ("copy", 2, 0.0)
    assert copy.speeds["plain"].values == pytest.approx([10, 10])
    assert copy.speeds["other"].values == pytest.approx([40, 40])
    assert copy.ratios.keys() == {"other"} and copy.ratios["other"].median == pytest.approx(4)
    assert edit.ratios["other"].median == pytest.approx(0.5)
    lines = category_table([copy, edit]).splitlines()
    assert lines[0] == "| decode tokens/s of one sequence | copy | edit |"
    assert lines[2] == "| `plain` | 10.0 (10.0-10.0) | 20.0 (20.0-20.0) |"
    assert lines[3] == "| `other` | 40.0 (40.0-40.0) | 10.0 (10.0-10.0) |"
    assert lines[5] == "| decoding against first | copy | edit |"
    assert lines[7] == "| plain outputs that end in a loop | 0 % of 2 | 0 % of 2 |"
    assert lines[8] == "| `other` | 4.00 (4.00-4.00)x | 0.50 (0.50-0.50)x |"
    assert lines[10] == "| with prompts, against first | copy | edit |"
    assert lines[12] == "| `other` | 1.27 (1.27-1.27)x | 0.86 (0.86-0.86)x |"
    _, data, _ = report.write(tmp_path, "t", rows, categories=[copy, edit])
    kinds = json.loads(data.read_text())["categories"]
    assert kinds[1]["decode_per_second"] == {
        "plain": pytest.approx([20, 20]),
        "other": pytest.approx([10, 10]),
    }


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(stack="draft=prompt-lookup", max_sequences=2, max_length=128)


def test_a_run_of_hasten_counts_itself_only(llm: LLM) -> None:
    contestant = HastenContestant("h", llm.frontend)
    first, second = (contestant.run(ITEMS, PARAMS) for _ in range(2))
    assert first.tokens == second.tokens
    assert [len(tokens) for tokens in first.tokens.values()] == [5, 5]
    assert len(first.ttft) == 2 and all(0 < t <= first.seconds for t in first.ttft)
    assert first.speculation == second.speculation
    assert first.speculation.passes <= 10 and first.outside is not None and 0 <= first.outside < 1
    assert first.tokens_per_second == pytest.approx(10 / first.seconds)
    alone = contestant.run(ITEMS[:1], PARAMS)
    ((item, whole),) = alone.whole.items()
    assert alone.spent[item] < whole <= alone.seconds
    # the prefix cache was emptied, so the second run started from nothing too
    assert llm.engine.cache.stats.prefix_hits == 0


def test_an_item_that_fails_ends_the_measurement(llm: LLM) -> None:
    with pytest.raises(ValueError, match="long: the prompt has 500 tokens"):
        HastenContestant("h", llm.frontend).run([Item("long", (5,) * 500)], PARAMS)


def test_the_report_can_be_checked(tmp_path: Path) -> None:
    contestants = [Scripted(f"c{i}", [1, i + 1], [1, 2], []) for i in range(3)]
    rows = compare(contestants, ITEMS, PARAMS, rounds=1)
    folder = tmp_path / "deep" / "er"
    paths = report.write(folder, "a | title", rows, "A note.")
    assert [path.name for path in paths] == ["report.md", "report.json", "report.png"]
    markdown = paths[0].read_text()
    assert table(rows) in markdown and "A note." in markdown and "](report.png)" in markdown
    for word in ("command: `", "date: ", "commit: ", "machine: ", " threads, ", "torch "):
        assert word in markdown
    data = json.loads(paths[1].read_text(), parse_constant=pytest.fail)
    assert data["title"] == "a | title"
    assert data["conditions"].keys() >= {"command", "date", "commit", "cpu", "threads", "isa"}
    assert [row["tokens_per_second"] for row in data["rows"]] == [[4], [2], [4 / 3]]
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_a_report_without_matplotlib_has_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    rows = compare([Scripted("c", [1, 1], [1], [])], ITEMS, PARAMS, rounds=1)
    paths = report.write(tmp_path, "t", rows)
    assert [path.name for path in paths] == ["report.md", "report.json"]
    assert "report.png" not in paths[0].read_text()
