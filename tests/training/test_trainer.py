"""A short run learns, an interrupted run continues exactly, an export is the same model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from hasten.training.data import Mixture
from hasten.training.export import export_model, load_exported
from hasten.training.model import Llama, LlamaShape
from hasten.training.tasks import all_tasks
from hasten.training.trainer import (
    Optimizer,
    TrainConfig,
    cross_entropy,
    distillation,
    load_checkpoint,
    pick_precision,
    train,
)

MICRO = LlamaShape(1024, 64, 2, 4, 2, 16, 128)
SOURCES = ["def add(first, second):\n    total = first + second\n    return total\n" * 40]
CONFIG = TrainConfig(
    tokens=20 * 512,
    batch_tokens=512,
    phases=((0.5, 64), (1.0, 128)),
    warmup_steps=5,
    precision="float32",
)


def micro(seed: int = 0) -> Llama:
    return Llama(MICRO, torch.Generator().manual_seed(seed))


@pytest.fixture
def mixture(tokenizer: Tokenizer) -> Mixture:
    return Mixture(tokenizer, SOURCES, all_tasks(SOURCES), seed=2)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "loss.jsonl").read_text().splitlines()]


def test_twenty_steps_lower_the_loss(tmp_path: Path, mixture: Mixture) -> None:
    state = train(micro(), mixture, CONFIG, tmp_path)
    found = losses(tmp_path)
    assert state.step == len(found) == 20
    assert state.tokens == CONFIG.tokens
    assert sum(found[-5:]) / 5 < sum(found[:3]) / 3 - 1.0


def test_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path, mixture: Mixture) -> None:
    whole = micro()
    train(whole, mixture, CONFIG, tmp_path / "whole")

    class Interrupted:
        """Raises Ctrl-C's exception path by asking for a stop at one step."""

        def __init__(self, at: int) -> None:
            self.at = at

        def batch(self, step: int, rows: int, length: int):  # type: ignore[no-untyped-def]
            if step == self.at:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGINT)
            return mixture.batch(step, rows, length)

    parts = tmp_path / "parts"
    state = train(micro(), Interrupted(7), CONFIG, parts)
    assert state.step == 8
    state = train(micro(), Interrupted(12), CONFIG, parts)
    assert state.step == 13
    resumed = micro(seed=9)  # its values must come from the checkpoint
    train(resumed, mixture, CONFIG, parts)
    assert losses(parts) == losses(tmp_path / "whole")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_checkpoint_refuses_another_shape(tmp_path: Path, mixture: Mixture) -> None:
    train(micro(), mixture, replace(CONFIG, tokens=512), tmp_path)
    other = Llama(replace(MICRO, num_hidden_layers=3))
    with pytest.raises(ValueError, match="another shape"):
        load_checkpoint(tmp_path / "checkpoint", other, Optimizer(other, CONFIG))


def test_schedule() -> None:
    config = replace(CONFIG, warmup_steps=10, decay_share=0.5, learning_rate=1.0)
    assert config.rate(0, 0.0) == pytest.approx(0.1)
    assert config.rate(9, 0.1) == config.rate(50, 0.5) == 1.0
    assert config.rate(50, 0.75) == pytest.approx(0.5)
    assert config.rate(50, 1.0) == 0.0
    assert [config.length(p) for p in (0.0, 0.49, 0.5, 1.0)] == [64, 64, 128, 128]


def test_precision_is_asked_for_or_measured() -> None:
    assert pick_precision("bfloat16") == torch.bfloat16
    assert pick_precision("auto") in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="precision"):
        pick_precision("float64")


def test_distilling_from_itself_leaves_only_the_truth(mixture: Mixture) -> None:
    model = micro()
    batch = mixture.batch(0, 4, 64)
    plain = cross_entropy(model)(batch.tokens, batch.rows, batch.targets, batch.mask)
    mixed = distillation(model, model, 0.75)(batch.tokens, batch.rows, batch.targets, batch.mask)
    torch.testing.assert_close(mixed, plain * 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_loads_in_transformers(
    tmp_path: Path, tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    transformers = pytest.importorskip("transformers")
    model = micro()
    export_model(model, tokenizer, tmp_path / "model", dtype)
    export_model(model, tokenizer, tmp_path / "model", dtype)  # replaces
    again, _ = load_exported(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    )
    tokens = torch.randint(0, 1024, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            again.logits(again(tokens)), theirs(tokens).logits, atol=2e-5, rtol=1e-4
        )
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    turns = [{"role": "user", "content": "hi"}]
    text = loaded.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == "<|bos|><|user|>hi<|end|><|assistant|>"
    assert loaded("hi").input_ids == tokenizer.encode("hi").ids
    assert sorted(theirs.generation_config.eos_token_id) == [1, 6]
