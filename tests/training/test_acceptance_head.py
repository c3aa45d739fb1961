"""The recipe of the acceptance head: what is judged, what is learned, what the command writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hasten.cli.main import app
from hasten.models.base import Decoder
from hasten.models.loading import load_model, locate
from hasten.speculation.controllers.specdec_plus_plus import AcceptanceHead, fingerprint
from hasten.training.acceptance_head import HeadRecipe, Judged, judge, over, train_head, write_texts


def likely(model: Decoder, tokens: list[int]) -> list[int]:
    """The tokens that carry nearly all of what may follow."""
    law = torch.softmax(over(model, tokens)[0][-1].double(), -1)
    order = torch.argsort(law, descending=True)
    count = int((torch.cumsum(law[order], 0) < 0.999).sum()) + 1
    return order[: min(count, 800)].tolist()


def test_labels_and_states() -> None:
    """Labels are min(1, p/q) of the draft's own tokens: 1 everywhere if draft and target agree;
    the states are those of the rows that have read them."""
    draft = load_model(locate("reference-draft"), progress=False)
    recipe = HeadRecipe(length=24, mixing=0.25)
    texts = write_texts(draft, [[0, 40, 50], [0, 60]], recipe)
    same = judge(draft, draft, texts, recipe)
    assert torch.allclose(same.accepted, torch.ones(len(same.accepted)))
    target = load_model(locate("reference"), progress=False)
    found = judge(target, draft, texts, recipe)
    assert 0 < float(found.accepted.mean()) < 1
    written = sum(len(tokens) - start for start, tokens in texts)
    assert 0.5 * written < len(found.accepted) < written  # a quarter is the target's
    every = judge(target, draft, texts, HeadRecipe(length=24, mixing=0.0))
    assert len(every.accepted) == written == len(every.states)
    # nothing before the first token was drawn: its state depends on the prompt and that token alone
    start, tokens = texts[0]
    first = [
        over(draft, [*tokens[:start], token])[1][start] for token in likely(draft, tokens[:start])
    ]
    assert min(float((every.states[0] - state).abs().max()) for state in first) < 1e-4


def test_a_head_learns_weighted_chances() -> None:
    """Where a state says .5, the head says less: rejections weigh six times as much."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4000, 4, generator=generator)
    states[:, 0] = torch.where(states[:, 0] > 0, 1.0, -1.0)
    chance = torch.where(states[:, 0] > 0, 0.95, 0.5)
    data = Judged(states, chance, torch.arange(4000) // 40)
    head = train_head(data, HeadRecipe(epochs=60, rate=1e-2))
    found = torch.sigmoid(head(states)).detach()
    high, low = found[states[:, 0] > 0].mean(), found[states[:, 0] < 0].mean()
    assert float(low) == pytest.approx(0.5 / (0.5 + 6 * 0.5), abs=0.05)
    assert float(high) == pytest.approx(0.95 / (0.95 + 6 * 0.05), abs=0.06)


def test_the_command(tmp_path: Path) -> None:
    out, prompts = tmp_path / "head.safetensors", tmp_path / "prompts"
    prompts.write_text("def add(a, b):\nimport os\n\nfor i in range(3):\n")
    command = ["train", "acceptance-head", "-o", str(out), "--prompts", str(prompts)]
    result = CliRunner().invoke(app, [*command, "--length", "16", "--epochs", "1"])
    assert result.exit_code == 0, result.output
    head, whose = AcceptanceHead.load(out, "")
    assert whose == fingerprint("reference-draft") and len(head.out) == 128
    assert list(tmp_path.glob("*.new")) == []
    prompts.write_text("")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and "no prompts" in result.output
