"""The feature store: it holds what the model computes, resumes, and checks what it goes on with."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hasten.models.base import Decoder
from hasten.training.features import FeatureStore, TeacherHead, write_features
from tests.models.drive import whole
from tests.speculation.self_drafts import SHAPES


def texts(count: int = 12, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, 61) for _ in range(rng.randint(5, 90))] for _ in range(count)]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_rows_are_the_models(tiny: Callable[..., Decoder], tmp_path: Path, kind: str) -> None:
    model = tiny(kind, **SHAPES[kind])
    wanted = texts()
    store = write_features(
        model, wanted, tmp_path, [2, 4], top=5, tokens=10**6, longest=64, shard_tokens=100
    )
    assert len(store.shards) > 2
    assert store.tokens == sum(min(64, len(text)) for text in wanted)
    head = TeacherHead(model)
    for text, found in zip(wanted, store.documents(), strict=True):
        logits = whole(model, text[:64])
        assert found["tokens"].tolist() == text[:64]
        torch.testing.assert_close(found["lse"], logits.logsumexp(-1))
        values, ids = logits.topk(5)
        assert torch.equal(found["top_ids"].long(), ids)
        torch.testing.assert_close(found["top_logits"], values)
        # the last hidden state, rounded, through the head in torch
        again = head(found["hidden.4"].float())
        assert (again - logits).abs().max() < 0.03 * logits.abs().max()
        assert found["hidden.2"].shape == found["hidden.4"].shape


def test_an_interrupted_run_goes_on(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    model = tiny("llama", **SHAPES["llama"])
    asked: list[int] = []

    def documents(limit: int) -> Iterator[list[int]]:
        for number, text in enumerate(texts()):
            if number == limit:
                raise KeyboardInterrupt
            asked.append(number)
            yield text

    settings = {"tokens": 10**6, "longest": 64, "shard_tokens": 100}
    whole_run = write_features(model, texts(), tmp_path / "whole", [1], **settings)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        write_features(model, documents(7), tmp_path / "cut", [1], **settings)  # type: ignore[arg-type]
    done = FeatureStore(tmp_path / "cut").tokens
    assert 0 < done < whole_run.tokens
    resumed = write_features(model, documents(99), tmp_path / "cut", [1], **settings)  # type: ignore[arg-type]
    assert resumed.shards == whole_run.shards
    for own, expected in zip(resumed.documents(), whole_run.documents(), strict=True):
        assert all(torch.equal(own[name], value) for name, value in expected.items())
    assert not list((tmp_path / "cut").glob("*.new"))


def test_other_settings_texts_or_models_are_refused(
    tiny: Callable[..., Decoder], tmp_path: Path
) -> None:
    model = tiny("llama", **SHAPES["llama"])
    write_features(model, texts(), tmp_path, [1], tokens=200, longest=64)
    again = {"tokens": 200, "longest": 64}
    with pytest.raises(ValueError, match="another model or with other settings"):
        write_features(model, texts(), tmp_path, [2], **again)
    with pytest.raises(ValueError, match="another model or with other settings"):
        other = tiny("llama", seed=5, **SHAPES["llama"])
        write_features(other, texts(), tmp_path, [1], **again)
    with pytest.raises(ValueError, match="other texts"):
        write_features(model, texts(seed=1), tmp_path, [1], **again)
    with pytest.raises(ValueError, match="outside"):
        write_features(model, texts(), tmp_path / "new", [5], **again)


def test_batches_are_spans_of_documents(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    model = tiny("llama", **SHAPES["llama"])
    store = write_features(model, texts(), tmp_path, [1], top=61, tokens=10**6, longest=64)
    kept = [text[:64] for text in texts()]
    rows = store.batch(3, 8, 20)
    assert rows.tokens.shape == (8, 20)
    for span in rows.tokens.tolist():
        assert any(span == text[i : i + 20] for text in kept for i in range(len(text) - 19))
    torch.testing.assert_close(rows.probabilities.sum(-1), torch.ones(8, 20))
    assert torch.equal(store.batch(3, 8, 20).tokens, rows.tokens)
    assert not torch.equal(store.batch(4, 8, 20).tokens, rows.tokens)
    with pytest.raises(ValueError, match="no document"):
        store.batch(0, 1, 65)
