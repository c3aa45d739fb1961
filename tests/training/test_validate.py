"""Measures: loops, exact match by one pass, agreement."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from hasten.training import validate
from hasten.training.model import Llama, LlamaShape
from hasten.training.tasks import Sample, Segment

SHAPE = LlamaShape(1024, 32, 1, 2, 1, 16, 64)


def test_loops() -> None:
    start = list(range(100, 200))
    assert not validate.ends_in_loop(start)
    assert not validate.ends_in_loop([1] * 23)
    assert validate.ends_in_loop(start + [1] * 24)
    assert validate.ends_in_loop(start + [1, 2, 3] * 8)
    assert not validate.ends_in_loop(start + [1, 2, 3] * 8 + [4])
    assert validate.ends_in_loop(start + list(range(40)) * 3)
    assert not validate.ends_in_loop(start + list(range(40)) * 2)


class Parrot:
    """Stands in for a model: its argmax after position i is ``answers[i]``."""

    def __init__(self, answers: list[int]) -> None:
        self.answers = answers

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        best = torch.tensor(self.answers[: hidden.shape[1]])
        return torch.nn.functional.one_hot(best, 1024)[None].float()


@pytest.mark.parametrize("stop", ["\n", "<|end|>"])
def test_exact_match_needs_every_token_and_the_stop(tokenizer: Tokenizer, stop: str) -> None:
    sample = Sample("t", (Segment("key:"), Segment(f" some value{stop}", answer=True)), stop)
    ids = tokenizer.encode(sample.text).ids
    right: Any = Parrot([*ids[1:], 0])
    assert validate.answered(right, tokenizer, sample)
    prompt = len(tokenizer.encode(sample.prompt).ids)
    for position in range(prompt - 1, len(ids) - 1):
        wrong = list(right.answers)
        wrong[position] = (wrong[position] + 1) % 1024
        fake: Any = Parrot(wrong)
        assert not validate.answered(fake, tokenizer, sample)
    before: Any = Parrot([0] * (prompt - 1) + right.answers[prompt - 1 :])
    assert validate.answered(before, tokenizer, sample)


def test_agreement_counts_runs() -> None:
    text = validate.Continuation("code", [1, 2], [3, 4, 5, 6])
    fake: Any = Parrot([0, 3, 4, 9, 6])
    found = validate.agreement(fake, [text], depth=2)
    assert found.tokens == 4
    assert found.share == pytest.approx(3 / 4)
    assert found.accepted == pytest.approx((2 + 1 + 0 + 1) / 4)


def test_perplexity_of_an_untrained_model_is_the_vocabulary(tokenizer: Tokenizer) -> None:
    model = Llama(SHAPE, torch.Generator().manual_seed(0))
    score = validate.score_code(model, tokenizer, ["x = 1\n" * 30, "y = 2\n" * 30], length=50)
    assert score.perplexity == pytest.approx(1024, rel=0.1)
    assert score.tokens == len(tokenizer.encode("x = 1\n" * 30).ids) * 2 + 1
