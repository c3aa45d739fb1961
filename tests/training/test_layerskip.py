"""LayerSkip: the weights of its loss, repeatable draws, and exits that become readable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from hasten.training.data import Mixture
from hasten.training.export import export_model, load_exported
from hasten.training.layerskip import (
    RUN,
    LayerSkip,
    early_exit_loss,
    exit_agreement,
    train_layerskip,
)
from hasten.training.model import Llama, LlamaShape
from hasten.training.tasks import all_tasks
from hasten.training.trainer import cross_entropy

MICRO = LlamaShape(1024, 64, 4, 4, 2, 16, 128)
SOURCES = ["def add(first, second):\n    total = first + second\n    return total\n" * 40]


def micro() -> Llama:
    return Llama(MICRO, torch.Generator().manual_seed(0))


@pytest.fixture
def mixture(tokenizer: Tokenizer) -> Mixture:
    return Mixture(tokenizer, SOURCES, all_tasks(SOURCES), seed=2)


def test_chances_and_weights() -> None:
    settings = LayerSkip(dropout=0.2, exit_scale=0.5)
    assert settings.skip_chance(0, 4) == 0
    assert settings.skip_chance(3, 4) == pytest.approx(0.2)
    assert settings.skip_chance(1, 4) < settings.skip_chance(2, 4) / 2
    weights = settings.weights(4, [0, 1, 2])
    raw = [0.0, 0.5, 1.5, 3 + 0.5 * 3]
    assert [weights[i] for i in range(4)] == pytest.approx([r / sum(raw) for r in raw])
    assert settings.weights(4, [1]) == pytest.approx({1: 0.1, 3: 0.9})
    assert LayerSkip(exit_scale=0).weights(4, [0, 2]) == {0: 0.0, 2: 0.0, 3: 1.0}


def test_without_exits_and_dropout_it_is_plain_training(mixture: Mixture) -> None:
    model, batch = micro(), mixture.batch(0, 4, 64)
    plain = cross_entropy(model)(batch.tokens, batch.rows, batch.targets, batch.mask)
    loss = early_exit_loss(model, LayerSkip(dropout=0.0, exit_scale=0.0))
    torch.testing.assert_close(loss(batch.tokens, batch.rows, batch.targets, batch.mask), plain)


def test_draws_repeat_with_the_batch(mixture: Mixture) -> None:
    loss = early_exit_loss(micro(), LayerSkip(dropout=0.5))
    batches = [mixture.batch(step, 4, 64) for step in (0, 1, 0)]
    values = [loss(b.tokens, b.rows, b.targets, b.mask).item() for b in batches]
    assert values[0] == values[2] != values[1]


def test_exits_become_readable(tmp_path: Path, mixture: Mixture, tokenizer: Tokenizer) -> None:
    export_model(micro(), tokenizer, tmp_path / "from", torch.float32)
    config = replace(
        RUN,
        tokens=40 * 512,
        batch_tokens=512,
        phases=((1.0, 64),),
        learning_rate=4e-3,
        warmup_steps=5,
        precision="float32",
    )
    out = {}
    for name, settings in (("plain", LayerSkip(0.0, 0.0)), ("skip", LayerSkip())):
        done = train_layerskip(
            tmp_path / "from",
            tmp_path / name,
            tmp_path / f"work-{name}",
            config,
            settings,
            lambda tokenizer: mixture,
        )
        assert done
        model, _ = load_exported(tmp_path / name)
        out[name] = exit_agreement(model, mixture.batch(10**5, 4, 64).tokens)
    assert out["skip"][-1] == out["plain"][-1] == 1.0
    assert out["skip"][1] > out["plain"][1] + 0.1, out


@pytest.mark.parametrize("bad", [{"dropout": 1.0}, {"exit_scale": -1.0}, {"spacing": 0}])
def test_bad_settings(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        LayerSkip(**bad)  # type: ignore[arg-type]
