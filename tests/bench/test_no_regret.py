"""The script behind benchmarks/speculation/no-regret: pairs of equal work, and where time goes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.speculation.no_regret import PARTS, Comparison, Pairs, interval
from hasten import LLM, SamplingParams
from hasten.cache.layout import PAGE_SIZE
from hasten.engine.request import Request
from hasten.stack import Stack

KV_BYTES = 256 << 20
STACK = "draft=any(of=prompt-lookup|model(path=reference-draft,k=4)),control=auto"


@pytest.fixture(scope="module")
def found() -> Comparison:
    llm = LLM("reference", max_sequences=1)
    model, stack = llm.engine.model, Stack.parse(STACK)
    return Comparison(
        model, llm.tokenizer, stack, batches=(1, 4), tokens=8, length=48, kv_bytes=KV_BYTES
    )


def test_rounds_pair_all_kinds_and_batches_and_are_reported(found: Comparison) -> None:
    for number in range(4):
        found.round(number)
    found.look_up()
    kinds = {"random", "code", "copy", "prose", "JSON"}
    names = {("auto", kind) for kind in kinds} | {("zero", "random"), ("again", "random")}
    assert set(found.pairs) == {(*name, batch) for name in names for batch in (1, 4)}
    for (name, _, batch), pairs in found.pairs.items():
        rounds = 3 if name == "auto" else 2  # round 0 is not there, nor is every other of controls
        assert len(pairs.off) == len(pairs.seconds) == rounds * {1: 2, 4: 1}[batch]
        assert name == "auto" or pairs.drafted == [0.0] * len(pairs.off)
    assert set(found.lookup) == {(name, batch) for name in ("auto", "zero") for batch in (1, 4)}
    report = found.report()
    for row in ("zero", "again"):
        assert sum(line.startswith(f"| *{row}*") for line in report.splitlines()) == 1
    assert "`any`, k = 0 | 4 " in report and "`prompt-lookup`, `auto` | 1 " in report
    json.dumps(found.data())


def test_drafts_are_counted(found: Comparison) -> None:
    pairs = Pairs()
    other = found.under("fixed(k=4)", Stack.parse("draft=prompt-lookup"), KV_BYTES)
    found.fill(other, ["copy"])
    pairs.run(
        found.engines["off"], other, found.texts["copy"][:2], "copy", 24, found.tenant("copy")
    )
    counts = other.engine.stats.speculation
    assert pairs.drafted == [counts.drafted / 48] and pairs.accepted == [counts.accepted / 48]
    assert 0 < counts.accepted <= counts.drafted
    assert other.seconds["propose"] > 0 and pairs.parts["propose"][0] > 0


def test_a_prefix_hit_leaves_a_row(found: Comparison) -> None:
    for texts in found.texts.values():
        assert len({tuple(text) for text in texts}) > 0.9 * len(texts)
        assert all(len(text) % PAGE_SIZE == 1 for text in texts)


def test_time_is_counted_where_it_is_spent(
    found: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inner parts are not counted twice, and a slow drafter is not the plain engine's time."""
    off, other = found.engines["off"], found.engines["zero"]
    plan = other.engine.control.plan

    def slow(sequences: Sequence[Any], load: Any) -> list[int]:
        time.sleep(0.02)
        return list(plan(sequences, load))

    for timed in (off, other):
        found.fill(timed, ["random"])
    monkeypatch.setattr(other.engine, "control", type(other.engine.control)(k=0))
    object.__setattr__(other.engine.control, "plan", other._timed("plan", slow))
    pairs = Pairs()
    pairs.run(off, other, found.texts["random"][:2], "random", 5, "random")
    assert pairs.seconds[0] - pairs.off[0] > 4 * 0.02
    assert 4 * 0.02 < other.seconds["plan"] < 2 * 5 * 0.02
    assert other.seconds["step"] < other.step_seconds - other.seconds["plan"]
    assert pairs.parts["plan"][0] > max(pairs.parts[part][0] for part in PARTS if part != "plan")


def test_unequal_work_is_refused(found: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    other = found.engines["zero"].engine
    add = other.add

    def shorter(text: list[int], params: SamplingParams, **options: Any) -> Request:
        return add(text, replace(params, max_tokens=3), **options)

    monkeypatch.setattr(other, "add", shorter)
    with pytest.raises(SystemExit, match="equal work"):
        Pairs().run(found.engines["off"], found.engines["zero"], [[5, 6, 7]], "code", 4, "")


def test_prompts_that_left_the_cache_are_refused(found: Comparison) -> None:
    off, other = found.engines["off"], found.under("fixed(k=0)", Stack.parse(STACK), KV_BYTES)
    found.fill(off, ["code"])
    with pytest.raises(SystemExit, match="left the cache"):
        Pairs().run(off, other, found.texts["code"][:1], "code", 4, found.tenant("code"))


def test_the_interval_is_students_over_logarithms() -> None:
    assert interval([0.5, 2.0, 1.0]) == pytest.approx((1.0, 0.1789, 5.589), rel=1e-3)
    assert interval([1.1] * 7) == pytest.approx((1.1, 1.1, 1.1))
