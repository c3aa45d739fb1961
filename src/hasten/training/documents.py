"""Token ids of texts to train heads on: files that are given, or code and generated tasks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from hasten.models.tokenizer import Tokenizer
from hasten.training.reference import Texts

TASK_SHARE = 0.5


def documents(
    tokenizer: Tokenizer, length: int, files: Sequence[Path] = (), seed: int = 0
) -> Iterator[list[int]]:
    """Documents of up to ``length`` tokens, each with the tokens that begin a text.

    From ``files`` every part once, in order. Without files there is no end of them: pieces of the
    training side of the standard library and generated tasks (the texts of the reference models).
    """
    if files:
        for path in files:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} cannot be read as text: {error}") from None
            yield from _pieces(tokenizer, text, length)
        return
    texts = Texts.load()
    rng = random.Random(seed)
    tasks, weights = zip(*texts.training_tasks(), strict=True)
    while True:
        if rng.random() < TASK_SHARE:
            task = rng.choices(tasks, weights)[0]
            yield tokenizer.encode(task.generate(rng, length).text)[:length]
        else:
            text = rng.choice(texts.train)
            start = rng.randrange(max(1, len(text) - 4 * length))
            yield tokenizer.encode(text[start : start + 8 * length])[:length]


def _pieces(tokenizer: Tokenizer, text: str, length: int) -> Iterator[list[int]]:
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = tokenizer.encode(text, add_special_tokens=False)
    size = length - len(begin)
    for start in range(0, len(ids), size):
        yield [*begin, *ids[start : start + size]]
