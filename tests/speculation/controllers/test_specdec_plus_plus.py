"""The acceptance head: which token it judges, when drafts end, and what files are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hasten import LLM
from hasten.decoding.params import SamplingParams
from hasten.methods import MethodError
from hasten.speculation.base import ControlContext, DraftProgress, Load
from hasten.speculation.controllers.specdec_plus_plus import (
    AcceptanceHead,
    SpecDecControl,
    SpecDecPlusPlus,
    fingerprint,
)
from hasten.speculation.drafters.model import ModelDraft
from hasten.training.acceptance_head import Head, save_head

WIDTH = 4


def reading_head() -> AcceptanceHead:
    """Says sigmoid(hidden[0])."""
    out = np.zeros(WIDTH, np.float32)
    out[0] = 1
    none = np.zeros((0, WIDTH, WIDTH), np.float32)
    return AcceptanceHead(none, none[:, 0], out, 0.0)


def progress(depth: int, probability: float, sequence: Any) -> DraftProgress:
    hidden = np.zeros(WIDTH, np.float32)
    hidden[0] = np.log(probability / (1 - probability))
    return DraftProgress(sequence, depth, 0.01, hidden)


def stops(probabilities: list[float], **parameters: Any) -> int:
    """Candidates of a draft; ``probabilities[d]`` is what the head says at depth d + 1."""
    control = SpecDecControl(SpecDecPlusPlus(**parameters), reading_head())
    sequence: Any = SimpleNamespace()
    for depth, probability in enumerate(probabilities, 1):
        if control.should_stop(progress(depth, probability, sequence)):
            return depth
    return len(probabilities) + 1


def test_the_head_judges_the_candidate_before() -> None:
    # the row of the first candidate has read the pending token: what the head says there is void
    assert stops([0.01] + [0.99] * 30, most=25) == 25
    # the row of candidate 3 has read candidate 2
    assert stops([0.99, 0.99, 0.1, 0.99]) == 3


def test_the_product_counts_not_the_last_factor() -> None:
    # .9^4 = .656 is the first below .7; it is known when candidate 5 is drawn
    assert stops([0.9] * 30) == 5


def test_bounds() -> None:
    assert stops([0.01] * 30, least=4) == 4
    assert stops([0.999] * 30) == 20
    control = SpecDecControl(SpecDecPlusPlus(), reading_head())
    sequences: list[Any] = [SimpleNamespace() for _ in range(3)]
    assert control.plan(sequences, Load(decoding=3, rows_taken=3, rows_left=10)) == [3, 3, 3]
    assert control.plan(sequences, Load(decoding=3, rows_taken=3, rows_left=99)) == [20] * 3


def test_a_new_draft_begins_anew() -> None:
    control = SpecDecControl(SpecDecPlusPlus(), reading_head())
    sequence: Any = SimpleNamespace()
    for _ in range(3):
        assert not control.should_stop(progress(1, 0.01, sequence))
        assert control.should_stop(progress(2, 0.01, sequence))
    control.close(sequence)
    assert not control.all_accepted


def test_the_trained_module_and_the_head_that_runs_agree(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = Head(WIDTH, 3)
    save_head(head, "whose", tmp_path / "head")
    found, whose = AcceptanceHead.load(tmp_path / "head", "")
    states = torch.randn(7, WIDTH)
    expected = torch.sigmoid(head(states)).tolist()
    assert whose == "whose"
    assert [found.probability(s.numpy()) for s in states] == pytest.approx(expected, abs=1e-6)


def context(draft: Any) -> ControlContext:
    return ControlContext(draft=draft, drafting=lambda: None, max_batch_tokens=8)  # type: ignore[arg-type, return-value]


def test_refusals(tmp_path: Path) -> None:
    draft = ModelDraft()
    with pytest.raises(MethodError, match="hasten train acceptance-head --draft reference-draft"):
        SpecDecPlusPlus().start(context(draft))
    with pytest.raises(MethodError, match="choose draft=model"):
        SpecDecPlusPlus(head="x").start(context(SimpleNamespace()))
    with pytest.raises(MethodError, match="cannot read"):
        SpecDecPlusPlus(head=str(tmp_path / "none")).start(context(draft))
    (tmp_path / "cut").write_bytes(b"\x10\x00")
    with pytest.raises(MethodError, match="cannot read"):
        SpecDecPlusPlus(head=str(tmp_path / "cut")).start(context(draft))
    save_file({"weight": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(MethodError, match="is no acceptance head"):
        SpecDecPlusPlus(head=str(tmp_path / "other")).start(context(draft))
    save_head(Head(WIDTH, 1), fingerprint("reference"), tmp_path / "foreign")
    with pytest.raises(MethodError, match="trained for another draft model"):
        SpecDecPlusPlus(head=str(tmp_path / "foreign")).start(context(draft))


def test_output_is_that_of_plain_decoding(tmp_path: Path) -> None:
    torch.manual_seed(1)
    path = tmp_path / "head.safetensors"
    save_head(Head(128, 3), fingerprint("reference-draft"), path)
    params = SamplingParams(max_tokens=40, temperature=0.0)
    texts = ["def add(a, b):", "import os\nimport "]
    found = []
    for stack in (None, f"draft=model(k=20),control=specdec++(head={path})"):
        llm = LLM("reference", stack=stack, max_sequences=2, max_length=256)
        found.append([o.text for o in llm.generate(texts, params)])
    assert found[0] == found[1]
    assert llm.engine.stats.speculation.drafted > 0


@pytest.mark.parametrize("bad", [{"threshold": 1.0}, {"least": 0}, {"least": 5, "most": 4}])
def test_bad_parameters(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        SpecDecPlusPlus(**bad)
