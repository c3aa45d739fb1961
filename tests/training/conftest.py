"""A small tokenizer for the tests of the training package; one thread, as models are tiny."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer

from hasten.training.bpe import train_tokenizer
from hasten.training.tasks import all_tasks

SOURCES = ["def add(first, second):\n    total = first + second\n    return total\n" * 40]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    rng = random.Random(0)
    tasks = [task for task, _ in all_tasks(SOURCES)]
    texts = [rng.choice(tasks).generate(rng, 200).text for _ in range(200)]
    return train_tokenizer(texts, 1024)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
