"""The measuring parts of claim scripts: what they count is what happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.random_checkpoint import write
from benchmarks.speculation import claims_report
from benchmarks.speculation.claims import pearl, smartspec
from benchmarks.speculation.claims.request_stream import params_of, prompts_of
from benchmarks.speculation.claims.specdec_plus_plus import (
    better,
    calibration,
    judged,
    separation,
)
from hasten import LLM, _native
from hasten.models.loading import load_model
from hasten.speculation.base import StepReport
from hasten.speculation.controllers.specdec_plus_plus import fingerprint
from hasten.training.acceptance_head import Head, save_head


def test_a_conversation_asks_its_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts").mkdir()
    line = json.dumps({"question_id": 1, "category": "qa", "turns": ["How deep is it?", "Why?"]})
    (tmp_path / "prompts" / "spec_bench_even.jsonl").write_text(line + "\n")
    monkeypatch.setenv("HASTEN_DATA", str(tmp_path))
    llm = LLM("reference", max_sequences=1)
    prompt = llm.tokenizer.decode(prompts_of(llm, "spec-bench", 1)[0])
    assert "How deep is it?" in prompt and "Why?" not in prompt


def test_passes_saved_at_equal_discards() -> None:
    curve = [{"discarded": 1.0, "verified": 0.4}, {"discarded": 0.0, "verified": 0.8}]
    assert better(curve, {"discarded": 0.5, "verified": 0.75}) == pytest.approx(0.2)
    assert better(curve, {"discarded": 0.5, "verified": 0.5}) == pytest.approx(-0.2)
    assert better(curve, {"discarded": 1.1, "verified": 0.5}) is None


def test_separation_is_the_share_of_ordered_pairs() -> None:
    said, accepted = np.array([0.1, 0.4, 0.3, 0.9]), np.array([0.0, 1.0, 1.0, 0.0])
    assert separation(said, accepted) == pytest.approx(2 / 4)


def test_the_weight_of_rejections_is_undone_and_a_shift_shows() -> None:
    rng = np.random.default_rng(5)
    chance = rng.uniform(0.05, 0.95, 40_000)
    accepted = (rng.random(len(chance)) < chance).astype(np.float64)
    own = chance / (chance + 6 * (1 - chance))
    before = np.concatenate([[np.nan], own[:-1]])
    found = calibration(np.stack([own, before, accepted], axis=1), 6.0)
    assert found["error"] < 0.02 < 0.15 < found["error_uncorrected"]
    assert found["separation_own_token"] > 0.75
    assert found["separation_shifted_by_one"] == pytest.approx(0.5, abs=0.02)


def test_judged_candidates_are_those_that_were_examined(tmp_path: Path) -> None:
    torch.manual_seed(3)
    save_head(Head(128, 1), fingerprint("reference-draft"), tmp_path / "head")
    control = f"specdec++(head={tmp_path / 'head'},least=4,most=4)"
    llm = LLM("reference", stack=f"draft=model(k=4),control={control}", max_sequences=1)
    expected: list[bool] = []

    def observe(report: StepReport) -> None:
        for outcome in report.outcomes:
            accepted = len(outcome.path) - 1
            judged_by_the_head = len(outcome.tree) - 1 - 2  # the rule is not asked at the last one
            happened = [*[True] * accepted, False][:judged_by_the_head]
            expected.extend(happened if judged_by_the_head > 0 else [])

    llm.engine.control.observe = observe
    prompts = [llm.tokenizer.encode(text) for text in ("def add(a, b):", "import os\n")]
    rows = judged(llm, prompts, params_of(2, 40, 0.0))
    assert rows[:, 2].tolist() == expected and 0 < sum(expected) < len(expected)
    firsts = np.isnan(rows[:, 1])
    assert (rows[1:, 1] == rows[:-1, 0])[~firsts[1:]].all()


def test_the_virtual_clock_decides_what_a_step_takes(tmp_path: Path) -> None:
    write(tmp_path / "model", smartspec.MODEL)
    model = load_model(tmp_path / "model", progress=False)

    def speed(control: str, acceptance: float, batch: int) -> float:
        engine = smartspec.Replay(model, control, acceptance, 4)
        for number in range(batch):
            engine.ask(number, 400)
        engine.run(2)
        return engine.run(30)

    assert speed("off", 1.0, 1) == pytest.approx(1 / smartspec.READ)
    assert speed("k=4", 1.0, 2) == pytest.approx(10 / (smartspec.READ + 4 * smartspec.DRAFT))
    assert speed("k=4", 0.0, 40) == pytest.approx(40 / (200 * smartspec.ROW + 4 * smartspec.DRAFT))
    assert speed("auto", 0.7, 8) == speed("auto", 0.7, 8)


def test_pearl_is_held_against_serial_speculation_and_modelled() -> None:
    def row(rate: float, passes: float, waited: float, tau: float = 3.0) -> dict[str, float]:
        return {
            "tokens_per_second": rate,
            "tau": tau,
            "target_pass": 0.02,
            "draft_passes_a_step": passes,
            "waited_for_draft": waited,
        }

    rows = {arm: [row(50.0, 0, 0.0), row(60.0, 0, 0.0), row(70.0, 0, 0.0)] for arm in pearl.ARMS}
    rows[pearl.SERIAL] = [row(rate, 4, 0.02) for rate in (100.0, 200.0, 400.0)]
    rows[pearl.PEARL] = [row(rate, 5, 0.001, 2.0) for rate in (50.0, 300.0, 320.0)]
    found = pearl.answer(rows)
    assert found["pearl_against"][pearl.SERIAL] == 0.8  # the middle of 0.5, 1.5 and 0.8
    model = found["modelled_tokens_per_second_on_two_processors"]
    assert model["serial"] == pytest.approx(3 / (0.02 + 4 * 0.005))
    assert model["pearl"] == pytest.approx(2 / 0.025)  # the draft is the longer one
    sizes = {"target": 490_000_000, "draft": 26_000_000}
    answer = pearl.report({"d": {"weight_bytes": sizes, **found}}, "")
    assert answer["shape"]["d: faster_on_two_processors_by_the_model"]
    assert "0.80 times serial speculation on all cores" in answer["because"]


def test_pearl_arms_decode_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([0.0, 60.0, *[60.0] * 20])  # others disturb the first turn, which is repeated
    monkeypatch.setattr(pearl, "others", lambda: next(taken))
    threads = _native.get_num_threads()
    _native.set_num_threads(2)
    try:
        found = pearl.measure(requests=1, tokens=12, rounds=2)
        assert _native.get_num_threads() == 2
    finally:
        _native.set_num_threads(threads)
    assert len(list(taken)) == 0
    measured = found["measured"]
    assert found["weight_bytes"]["draft"] < found["weight_bytes"]["target"]
    assert set(measured) == set(pearl.ARMS)
    assert all(len(rates) == 2 for rates in found["rounds"].values())
    for arm, (drafter, _) in pearl.ARMS.items():
        assert (measured[arm]["draft_passes_a_step"] > 0) == (drafter != "none")
        assert measured[arm]["tau"] >= 1


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the kernel does not tell")
def test_the_work_of_other_processes_is_seen() -> None:
    before = pearl.others()
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", busy], check=True)
    assert pearl.others() - before > 0.4


def test_the_page_is_that_of_the_kept_results() -> None:
    assert (claims_report.HERE / "claims.md").read_text() == claims_report.page()
    for path in claims_report.RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        assert path.stem in claims_report.CLAIMS
        assert found["shape_reproduced"] or found["because"], path.stem
