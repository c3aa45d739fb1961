"""A widened model is the same function: logits, greedy tokens, head mapping, silent layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from hasten.training.export import export_model, load_exported
from hasten.training.model import Llama, LlamaShape
from hasten.training.widen import Copies, Preset, compositions, real_places, widen

transformers = pytest.importorskip("transformers")
MICRO = LlamaShape(1024, 64, 2, 4, 2, 16, 96)
WIDE = Preset(hidden_size=256, intermediate_size=288, num_hidden_layers=5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A micro model with lively attention: large weights, norms that differ."""
    generator = torch.Generator().manual_seed(0)
    model = Llama(MICRO, generator)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value.uniform_(0.5, 1.5, generator=generator)
            else:
                value.normal_(0, 0.15, generator=generator)
    folder = tmp_path_factory.mktemp("widen") / "source"
    export_model(model, tokenizer, folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1])
def test_same_logits_and_greedy_tokens(
    tmp_path: Path, source: Path, dtype: torch.dtype, seed: int
) -> None:
    """Also with bfloat16 weights: shares are powers of two, so no weight is rounded."""
    out = widen(
        source, tmp_path / "wide", WIDE, dtype=dtype, seed=seed, max_shard_bytes=300_000,
        progress=False,
    )  # fmt: skip
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    load = transformers.AutoModelForCausalLM.from_pretrained
    small, wide = (load(folder, dtype=torch.float32) for folder in (source, out))
    assert wide.config.num_hidden_layers == 5
    assert wide.config.num_attention_heads == 16 and wide.config.num_key_value_heads == 8
    tokens = torch.randint(7, 1024, (2, 60), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        torch.testing.assert_close(wide(tokens).logits, small(tokens).logits, atol=2e-4, rtol=1e-4)
    ours, theirs = (
        model.generate(tokens[:1], max_new_tokens=200, do_sample=False, eos_token_id=None)
        for model in (small, wide)
    )
    assert torch.equal(ours, theirs)
    note = json.loads((out / "config.json").read_text())["hasten_widened_from"]
    assert note["name"] == "source" and note["real_layers"] == [0, 2]


def test_silent_layers_write_nothing_and_hold_no_zeros(tmp_path: Path, source: Path) -> None:
    out = widen(source, tmp_path / "wide", WIDE, progress=False)
    wide = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = torch.randint(7, 1024, (1, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        # The last entry is after the final norm; layer i turns states[i] into states[i + 1].
        states = wide(tokens, output_hidden_states=True).hidden_states
    assert not torch.equal(states[0], states[1])
    assert torch.equal(states[1], states[2])
    assert torch.equal(states[3], states[4])
    for name, value in wide.named_parameters():
        assert (value != 0).all(), name


def test_no_row_is_a_multiple_of_another(tmp_path: Path, source: Path) -> None:
    out = widen(source, tmp_path / "wide", WIDE, progress=False)
    wide = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        rows = wide.model.layers[0].get_submodule(name).weight
        rows = rows / rows.norm(dim=1, keepdim=True)
        cosines = (rows @ rows.T).abs().fill_diagonal_(0)
        assert cosines.max() < 0.9999, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_shares(dtype: torch.dtype, parts: int) -> None:
    shares = compositions(parts, dtype, torch.Generator().manual_seed(0), rows=100)
    assert shares.shape == (100, parts)
    assert (shares > 0).all()
    assert torch.equal(shares.sum(1), torch.ones(100))
    if dtype == torch.bfloat16:
        assert torch.equal(shares, 2.0 ** shares.log2().round())


def test_copies_are_numbered() -> None:
    copies = Copies.shuffled(5, 4, torch.Generator().manual_seed(0))
    pairs = set(zip(copies.source.tolist(), copies.copy.tolist(), strict=True))
    assert pairs == {(unit, copy) for unit in range(5) for copy in range(4)}
    assert real_places(6, 28) == [0, 4, 9, 14, 18, 23]


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        (Preset(192, 288, 5), "power-of-two"),
        (Preset(256, 288, 1), "layers"),
        ("9b", "unknown preset"),
    ],
)
def test_refusals(tmp_path: Path, source: Path, preset: Preset | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        widen(source, tmp_path / "wide", preset, progress=False)
    assert not (tmp_path / "wide").exists()


def test_widened_weights_load_as_ours_too(tmp_path: Path, source: Path) -> None:
    """The training model reads a single-shard widened checkpoint: names and mapping agree."""
    out = widen(source, tmp_path / "wide", WIDE, progress=False)
    (out / "model-00001-of-00001.safetensors").rename(out / "model.safetensors")
    small, wide = load_exported(source)[0], load_exported(out)[0]
    tokens = torch.randint(7, 1024, (1, 50), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(
            wide.logits(wide(tokens)), small.logits(small(tokens)), atol=2e-4, rtol=1e-4
        )
