"""The shipped reference models are there, small, bfloat16, and load in transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hasten.training.model import Llama
from hasten.training.reference import SHIPPED, Recipe, budget, inherit_embedding, weight_bytes

MODELS = ("target", "draft")
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.mark.parametrize("name", MODELS)
def test_files_and_types(name: str) -> None:
    folder = SHIPPED / name
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 (not a dict)
            assert tensors.get_tensor(key).dtype == torch.bfloat16, key
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and config["tie_word_embeddings"]
    assert config["max_position_embeddings"] == 4096
    assert config["num_key_value_heads"] >= 4
    assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]


def test_small_enough_to_ship_and_one_tokenizer() -> None:
    assert weight_bytes(SHIPPED) < 45e6
    target, draft = ((SHIPPED / name / "tokenizer.json").read_text() for name in MODELS)
    assert target == draft


@pytest.mark.parametrize("name", MODELS)
def test_answers_from_context_and_stops(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = SHIPPED / name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "river: stone_4\nlamp: garden_7\nmouse: velvet_1\nWhat is the code for lamp?"
    turns = [{"role": "user", "content": text}]
    tokens = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**tokens, max_new_tokens=24, do_sample=False)[0]
    answer = output[tokens["input_ids"].shape[1] :]
    assert answer[-1].item() in model.generation_config.eos_token_id
    if name == "target":
        assert tokenizer.decode(answer, skip_special_tokens=True) == "garden_7"


def test_report_is_complete() -> None:
    report = json.loads((SHIPPED / "report.json").read_text())
    assert {"date", "hardware", "versions", "target", "draft", "agreement"} <= set(report)
    text = (SHIPPED / "REPORT.md").read_text()
    for task in report["target"]["exact_match"]:
        assert task in text


def test_budgets() -> None:
    assert budget(None, None) == {}
    assert budget(5, None)["tokens"] >= 10**9
    assert budget(None, 1000)["minutes"] == float("inf")
    recipe = Recipe()
    assert recipe.target_shape.head_dim == recipe.draft_shape.head_dim
    assert Path(SHIPPED).name == "reference"


def test_draft_inherits_which_tokens_are_alike() -> None:
    """Tokens spread over few directions keep their angles in fewer units."""
    recipe = Recipe()
    small = replace(recipe.draft_shape, vocab_size=200, num_hidden_layers=1)
    target = Llama(replace(recipe.target_shape, vocab_size=200, num_hidden_layers=1))
    wide = target.model.embed_tokens.weight
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        flat = torch.randn(200, 100, generator=generator)
        wide.copy_(flat @ torch.randn(100, wide.shape[1], generator=generator))
    draft = Llama(small)
    inherit_embedding(draft, target)
    narrow = draft.model.embed_tokens.weight
    cosines = [torch.nn.functional.normalize(e, dim=1) for e in (wide, narrow)]
    torch.testing.assert_close(
        cosines[0] @ cosines[0].T, cosines[1] @ cosines[1].T, atol=1e-4, rtol=0
    )
