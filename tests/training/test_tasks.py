"""Every task makes samples whose checker accepts the right answer and refuses others."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from hasten.training.data import Curriculum, Mixture, encode_sample
from hasten.training.tasks import Arithmetic, JsonFill, ListOperation, Task, all_tasks
from hasten.training.validate import sample_of_length

SOURCES = ["def add(first, second):\n    total = first + second\n    return total\n" * 40]
TASKS = [task for task, _ in all_tasks(SOURCES)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_checker_accepts_right_and_refuses_wrong(task: Task) -> None:
    for seed in range(20):
        sample = task.generate(random.Random(seed), 120)
        assert sample.task == task.name
        assert sample.expected and sample.stop
        assert sample.text.startswith(sample.prompt)
        assert sample.check(sample.expected)
        assert sample.check(sample.expected + sample.stop + "more text")
        assert not sample.check(sample.expected + "x" + sample.stop)
        assert not sample.check(sample.expected[:-1] + sample.stop)
        assert not sample.check("")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_samples_repeat_with_their_seed_only(task: Task) -> None:
    first = [task.generate(random.Random(7), 100).text for _ in range(2)]
    other = [task.generate(random.Random(seed), 100).text for seed in range(8, 16)]
    assert first[0] == first[1]
    assert len(set(other)) > 1


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_one_question_means_one(task: Task) -> None:
    sample = task.generate(random.Random(3), 100, queries=1)
    assert sum(segment.answer for segment in sample.segments) == 1


def test_answers_are_true() -> None:
    for seed in range(50):
        for task in (ListOperation(), Arithmetic()):
            sample = task.generate(random.Random(seed), 60)
            if ">>>" not in sample.text:
                continue
            scope: dict[str, object] = {}
            lines = sample.text.splitlines()
            for line, result in zip(lines, [*lines[1:], ""], strict=True):
                if line.startswith(">>> a = "):
                    scope["a"] = eval(line[8:])  # noqa: S307
                elif line.startswith(">>> "):
                    assert repr(eval(line[4:], scope)) == result  # noqa: S307
        sample = JsonFill().generate(random.Random(seed), 60)
        schema = json.loads(sample.prompt.split("\n")[1])
        assert list(json.loads(sample.expected)) == schema["required"]


@pytest.mark.parametrize("tokens", [128, 512])
def test_samples_reach_a_length(tokenizer: Tokenizer, tokens: int) -> None:
    for task in TASKS:
        if not task.name.startswith(("retrieve", "copy")):
            continue
        sample = sample_of_length(task, tokenizer, random.Random(1), tokens)
        assert sample is not None
        assert 0.8 * tokens <= len(encode_sample(tokenizer, sample)[0]) <= tokens + 2


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_scored_tokens_are_the_answers(tokenizer: Tokenizer, task: Task) -> None:
    """The marked tokens decode to the answers, and the prompt's tokens are a prefix."""
    sample = task.generate(random.Random(5), 100)
    ids, scored = encode_sample(tokenizer, sample)
    answers = "".join(segment.text for segment in sample.segments if segment.answer)
    decoded = tokenizer.decode(list(ids[scored]), skip_special_tokens=False)
    assert decoded.removesuffix("<|eos|>").strip() == answers.strip()
    prompt = tokenizer.encode(sample.prompt).ids
    assert list(ids[: len(prompt)]) == prompt


def test_batches_are_a_function_of_seed_and_step(tokenizer: Tokenizer) -> None:
    mixture = Mixture(tokenizer, SOURCES, all_tasks(SOURCES), seed=4)
    one, same, other = (mixture.batch(step, 4, 96) for step in (3, 3, 4))
    assert one.tokens.shape == (4, 96)
    assert one.rows.shape == one.targets.shape == one.mask.shape == (int(4 * 96 * 0.6),)
    for name in ("tokens", "rows", "targets", "mask"):
        assert np.array_equal(getattr(one, name), getattr(same, name))
    assert not np.array_equal(one.tokens, other.tokens)
    # A target is the token that follows its row's position.
    flat = one.tokens.flatten()
    inside = (one.mask > 0) & (one.rows % 96 != 95)
    assert np.array_equal(flat[one.rows[inside] + 1], one.targets[inside])


def test_curriculum_changes_with_the_length(tokenizer: Tokenizer) -> None:
    main = Mixture(tokenizer, SOURCES, all_tasks(SOURCES), seed=4)
    first = main.with_shares(0.0, {"chat": 0.0})
    assert dict(zip((task.name for task in first.tasks), first.weights, strict=True))["chat"] == 0
    curriculum = Curriculum(first, main, 64)
    for length, source in ((64, first), (96, main)):
        wanted, found = source.batch(1, 4, length), curriculum.batch(1, 4, length)
        assert np.array_equal(wanted.tokens, found.tokens)
    assert not np.array_equal(main.batch(1, 4, 64).tokens, first.batch(1, 4, 64).tokens)
