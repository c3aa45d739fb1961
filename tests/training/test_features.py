"""The feature store: it holds what the model computes, resumes, and checks what it goes on with."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hasten.models.base import Decoder
from hasten.training.features import (
    SLICE,
    FeatureStore,
    Rows,
    TeacherHead,
    write_features,
)
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


def test_steps_read_every_shard_alike(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    model = tiny("llama", **SHAPES["llama"])
    wanted = [[2 + number] * 20 for number in range(48)]  # a document is told by its token
    store = write_features(model, wanted, tmp_path, [1], tokens=960, longest=64, shard_tokens=160)
    turns = [shard["documents"] for shard in store.shards]
    assert turns == [8] * 6
    for seed in (0, 1):
        visited = []
        for step in range(3 * 6 * 4):  # four steps of 2 x 20 tokens read a shard
            chosen = {int(token) - 2 for token in store.batch(step, 2, 20, seed).tokens[:, 0]}
            (shard,) = {number // 8 for number in chosen}
            visited.append(shard)
        for epoch in range(3):
            own = visited[24 * epoch : 24 * (epoch + 1)]
            assert sorted(own) == sorted([*range(6)] * 4)
            assert all(len(set(own[4 * i : 4 * i + 4])) == 1 for i in range(6))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("length", [1, SLICE - 3, SLICE + 5])
def test_the_sliced_loss_is_the_cross_entropy(
    tiny: Callable[..., Decoder], kind: str, length: int
) -> None:
    """Loss and gradient against log-softmax in float64, over slices that do not divide."""
    model = tiny(kind, **SHAPES[kind])
    head, vocab = TeacherHead(model), model.config.vocab_size
    teacher = (3 * torch.randn(2, length, vocab)).softmax(-1)
    shares, ids = teacher.topk(7)
    rows = Rows(torch.zeros(2, length, dtype=torch.long), {}, ids, shares)
    stream = torch.randn(2, length, model.config.hidden_size)

    exact = stream.double().requires_grad_()
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + head.eps)
    logits = normed * head.get_buffer("norm").double() @ head.get_buffer("matrix").double().T
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    expected = -(shares.double() * logits.log_softmax(-1).gather(-1, ids)).sum(-1).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    assert exact.grad is not None

    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        own = stream.clone().requires_grad_()
        loss = head.soft_cross_entropy(own, rows, dtype)
        (3 * loss).backward()
        assert abs(loss.item() - expected.item()) < tolerance * expected.item()
        assert own.grad is not None
        apart = (own.grad - 3 * exact.grad).norm() / (3 * exact.grad).norm()
        assert apart < tolerance, (dtype, apart)
