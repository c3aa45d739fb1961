"""Each architecture against transformers in float32, and against itself bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hasten.engine.batch import Segment
from hasten.models.base import Decoder
from hasten.models.loading import load_model
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


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
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


@pytest.mark.parametrize("name", ["llama", "gemma2"])
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
        if name == "gemma2":
            scale = reference.model.embed_tokens.embed_scale
            scale.copy_(scale.bfloat16())
    text = prompt(model, 40)
    torch.testing.assert_close(
        whole(model, text), reference_logits(reference, text), atol=1e-4, rtol=0
    )
    assert torch.equal(whole(model, text), chunked(model, text, [1, 7]))


def test_bfloat16_pages_keep_the_bits_of_every_chunking(loaded: Any) -> None:
    model, _ = loaded("qwen3")
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


def test_empty_batch(loaded: Any) -> None:
    model, _ = loaded("llama")
    assert Driver(model).logits([]).shape == (0, model.config.vocab_size)
