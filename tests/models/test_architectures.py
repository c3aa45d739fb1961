"""Each architecture against transformers in float32, and against itself bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

from hasten.api.frontend import Frontend
from hasten.engine.batch import Segment
from hasten.models import gemma3
from hasten.models.base import Decoder
from hasten.models.facts import CheckpointError, Facts
from hasten.models.loading import load_model, locate
from hasten.speculation.tree import TokenTree
from tests.models.drive import Driver, chunked, greedy, ragged, whole
from tests.models.tiny import CONFIGS, edit, randomized

Checkpoint = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def loaded(checkpoint: Checkpoint) -> Callable[[str], tuple[Decoder, Any]]:
    models: dict[str, tuple[Decoder, Any]] = {}

    def get(name: str) -> tuple[Decoder, Any]:
        if name not in models:
            folder, reference = checkpoint(name)
            models[name] = load_model(folder), reference
        return models[name]

    return get


def prompt(model: Decoder, length: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(token) for token in rng.integers(0, model.config.vocab_size, length)]


def reference_logits(reference: Any, text: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(torch.tensor([text])).logits[0].float()


@pytest.mark.parametrize("name", CONFIGS)
def test_matches_transformers_in_every_way_of_running(name: str, loaded: Any) -> None:
    """Logits within 1e-4 and 64 greedy tokens equal; whole, chunked, step by step and ragged
    give the same bits. The text is longer than a window, a page and an attention chunk."""
    model, reference = loaded(name)
    start = prompt(model, 29)
    text = start + greedy(model, start, 64)
    ours, theirs = whole(model, text), reference_logits(reference, text)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    # Each token is the argmax of the reference given those before it: its greedy text too.
    assert theirs[28:-1].argmax(-1).tolist() == text[29:]
    assert len(set(text[29:])) > 4, "a constant text proves little"

    assert torch.equal(ours, chunked(model, text, [5, 16, 1, 30]))
    assert torch.equal(ours, chunked(model, text, [1]))
    others = [prompt(model, length, seed=length) for length in (70, 3, 41)]
    alone = [whole(model, other) for other in others]
    for got, expected in zip(ragged(model, [text, *others]), [ours, *alone], strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma2",
        "mixtral",
        "gemma3_text",
        "phi3-longrope",
        "olmo2",
        "qwen3_moe",
        "deepseek_v2-groups",
    ],
)
def test_tree_rows_equal_their_chains(name: str, loaded: Any) -> None:
    """Each node of a draft tree has the logits of the text that its path spells."""
    model, _ = loaded(name)
    text = prompt(model, 61)  # candidates cross the boundary of an attention chunk
    tokens = [text[-1], 3, 5, 7, 11, 13, 17, 19]
    parents = [-1, 0, 0, 0, 1, 2, 4, 5]
    driver = Driver(model)
    driver.logits([Segment(0, 0, text[:-1], wanted="none")])
    out = driver.logits([Segment(0, 60, text[-1:], TokenTree(tokens, parents))])
    assert len(out) == len(tokens)
    for node in range(len(tokens)):
        path, at = [], node
        while at > 0:
            path.append(tokens[at])
            at = parents[at]
        assert torch.equal(out[node], whole(model, text + path[::-1])[-1])


def test_layer_ranges_and_captures_compose(loaded: Any) -> None:
    """Running [0, 2) and then the rest from its hidden state is the whole pass."""
    model, reference = loaded("gemma2")
    text = prompt(model, 21)
    segments = [Segment(0, 0, text, wanted="all")]
    driver = Driver(model)
    batch, full = driver.hidden(segments, capture=(0, 1))
    assert sorted(full.captured) == [0, 1]
    again = Driver(model)
    _, first = again.hidden(segments, layers=range(2))
    kept = first.rows.clone()
    _, rest = again.hidden(segments, layers=range(2, 4), hidden=first.rows)
    assert torch.equal(first.rows, full.captured[1])
    assert torch.equal(rest.rows, full.rows)
    assert torch.equal(first.rows, kept), "the given hidden state was changed"
    with torch.inference_mode():
        states = reference(torch.tensor([text]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(full.captured[0], states[1][0], atol=1e-4, rtol=0)
    assert torch.equal(model.logits(full, batch.wanted[[4, 9]]), whole(model, text)[[4, 9]])


def test_a_row_of_hidden_states_may_replace_a_token(loaded: Any) -> None:
    model, _ = loaded("llama")
    text = prompt(model, 9)
    driver = Driver(model)
    embedded = model.embed(torch.tensor(text))
    batch, hidden = driver.hidden([Segment(0, 0, [0] * 9, wanted="all")], hidden=embedded)
    assert torch.equal(model.logits(hidden, batch.wanted), whole(model, text))


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gemma3_text", "phi3", "qwen3_moe", "deepseek_v2"]
)
def test_bfloat16_weights_compute_in_float32(name: str, checkpoint: Checkpoint) -> None:
    """Matrices rounded to bfloat16, everything else float32: the reference with those weights.

    Norm weights are not rounded; the embedding scale of Gemma is, as it was in training."""
    folder, _ = checkpoint(name)
    model = load_model(folder, dtype=torch.bfloat16)
    assert model.config.dtype is torch.bfloat16
    reference = randomized(CONFIGS[name]())
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.bfloat16())
        if name.startswith("gemma"):
            scale = reference.model.embed_tokens.embed_scale
            scale.copy_(scale.bfloat16())
    text = prompt(model, 40)
    torch.testing.assert_close(
        whole(model, text), reference_logits(reference, text), atol=1e-4, rtol=0
    )
    assert torch.equal(whole(model, text), chunked(model, text, [1, 7]))


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v2-groups"])
def test_bfloat16_pages_keep_the_bits_of_every_chunking(name: str, loaded: Any) -> None:
    model, _ = loaded(name)
    text = prompt(model, 37)
    one = Driver(model, dtype=torch.bfloat16).logits([Segment(0, 0, text, wanted="all")])
    driver = Driver(model, dtype=torch.bfloat16, seed=5)
    steps = [driver.logits([Segment(0, i, text[i : i + 1])]) for i in range(37)]
    assert torch.equal(one, torch.cat(steps))


@pytest.mark.parametrize(("stored", "held"), [("float16", "float32"), ("bfloat16", "bfloat16")])
def test_dtype_of_the_checkpoint(stored: str, held: str, tmp_path: Path) -> None:
    reference = randomized(CONFIGS["llama"]()).to(getattr(torch, stored))
    reference.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", dtype=None)
    for changes in ({}, {"torch_dtype": stored}):
        edit(tmp_path / "config.json", **changes)
        model = load_model(tmp_path)
        assert model.config.dtype is getattr(torch, held)
    widened = randomized(CONFIGS["llama"]())
    with torch.no_grad():
        for wide, narrow in zip(widened.parameters(), reference.parameters(), strict=True):
            wide.copy_(narrow)
    text = prompt(model, 12)
    torch.testing.assert_close(
        whole(model, text), reference_logits(widened, text), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", ["llama-llama3", "llama-linear", "llama-yarn"])
def test_rope_scaling_in_the_spelling_of_transformers_4(
    name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder, reference = checkpoint(name)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rope = dict(reference.config.rope_parameters)
    theta = rope.pop("rope_theta")
    if name == "llama-linear":
        rope["type"] = rope.pop("rope_type")
    edit(tmp_path / "config.json", rope_parameters=None, rope_scaling=rope, rope_theta=theta)
    text = list(range(90))
    assert torch.equal(whole(load_model(tmp_path), text), whole(load_model(folder), text))


def test_gemma3_in_the_spelling_of_transformers_4(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Rotations of the two kinds of layers and the pattern of kinds, as published checkpoints
    state them; what they leave unsaid has the published sizes."""
    folder, _ = checkpoint("gemma3_text")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit(
        tmp_path / "config.json",
        rope_parameters=None,
        layer_types=None,
        sliding_window_pattern=3,
        rope_theta=5000.0,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
        rope_local_base_freq=100,
    )
    text = list(range(90))
    assert torch.equal(whole(load_model(tmp_path), text), whole(load_model(folder), text))

    published = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
    published |= {"num_hidden_layers": 34, "sliding_window": 1024}
    published["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
    stated = {"model_type": "gemma3", "text_config": published, "eos_token_id": [1, 106]}
    config = gemma3.configure(Facts(stated, "config.json"), torch.bfloat16)
    reference = Gemma3TextConfig(**published)
    assert config.windows == tuple(
        1024 if kind == "sliding_attention" else None for kind in reference.layer_types
    )
    for name in ("vocab_size", "hidden_size", "head_dim"):
        assert getattr(config, name) == getattr(reference, name)
    assert (config.num_heads, config.num_kv_heads, config.max_positions) == (8, 4, 131072)
    assert config.score_scale == reference.query_pre_attn_scalar**-0.5
    assert (config.tied, config.eos_ids, config.norm_eps) == (True, (1, 106), 1e-6)
    dims = torch.arange(0, 256, 2) / 256
    for rope, theta, factor in ((config.rope, 1e6, 8), (config.local_rope, 1e4, 1)):
        expected = 1 / theta**dims / factor
        torch.testing.assert_close(torch.tensor(rope.frequencies), expected, rtol=1e-6, atol=0)


def test_gemma3_with_images_is_its_text_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A checkpoint with an image tower, saved by transformers, without what only images need."""
    folder, text_only = checkpoint("gemma3_text")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    stated = text_only.config.to_dict()
    config = Gemma3Config(text_config=stated, vision_config=vision, mm_tokens_per_image=4)
    both = Gemma3ForConditionalGeneration(config)
    both.model.language_model.load_state_dict(text_only.model.state_dict())
    both.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", eos_token_id=[7, 9])
    (tmp_path / "generation_config.json").unlink()
    model = load_model(tmp_path)
    assert (model.config.architecture, model.config.eos_ids) == ("gemma3", (7, 9))
    text = prompt(model, 40)
    assert torch.equal(whole(model, text), whole(load_model(folder), text))
    edit(tmp_path / "config.json", text_config=None)
    with pytest.raises(CheckpointError, match="'text_config' must be an object"):
        load_model(tmp_path)


def test_longrope_is_chosen_by_the_longest_sequence_that_may_run(checkpoint: Checkpoint) -> None:
    """Within the original context of 32 positions the short factors, beyond it the long ones: for
    the texts that each is chosen for, what transformers computes. No key depends on when it was
    computed, which chunking would show."""
    folder, reference = checkpoint("phi3-longrope")
    short, long = load_model(folder, max_length=32), load_model(folder, max_length=33)
    text = prompt(short, 90)
    for model, length in ((short, 32), (long, 33), (load_model(folder), 90)):
        torch.testing.assert_close(
            whole(model, text[:length]),
            reference_logits(reference, text[:length]),
            atol=1e-4,
            rtol=0,
        )
    assert not torch.allclose(whole(short, text[:32]), whole(long, text[:32]), atol=1e-2)
    assert torch.equal(whole(long, text), chunked(long, text, [31, 2, 1]))


def test_the_length_asked_of_the_engine_chooses_longrope(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("phi3-longrope")[0], tmp_path / "model"))
    for file in locate("reference").glob("tokenizer*"):
        shutil.copy(file, folder)
    sizes = {"max_sequences": 2, "kv_bytes": 1 << 20}
    fronts = [Frontend(folder, max_length=32, **sizes)]  # type: ignore[arg-type]
    for length in (32, 33):
        fronts.append(Frontend(folder, max_length=length, share=fronts, **sizes))  # type: ignore[arg-type]
    short, shared, long = (front.engine.model for front in fronts)
    assert shared is short and long is not short
    ropes = [load_model(folder, max_length=length).config.rope for length in (32, 33)]
    assert [short.config.rope, long.config.rope] == ropes and ropes[0] != ropes[1]


def test_empty_batch(loaded: Any) -> None:
    for name in ("llama", "olmo2", "qwen3_moe", "deepseek_v2"):
        model, _ = loaded(name)
        assert Driver(model).logits([]).shape == (0, model.config.vocab_size)
