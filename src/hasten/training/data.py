"""Batches: rows of code and of generated tasks, a pure function of (seed, step).

No stream has a position to save, so a resumed run sees the batches that an uninterrupted one sees.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from hasten.training.bpe import BOS, END, EOS, PAD
from hasten.training.tasks import Sample, Task

Ids = NDArray[np.int64]
SHORTEST_TASK = 48


@dataclass(frozen=True)
class Batch:
    """``tokens [B, L]`` and, for the rows of the flattened batch that are scored, their targets.

    ``rows [R]`` indexes ``B * L`` positions, ``targets [R]`` are the next tokens, ``mask [R]`` is 0
    where a row only fills up the fixed count R (fixed shapes compile once).
    """

    tokens: Tensor
    rows: Tensor
    targets: Tensor
    mask: Tensor


def encode_sample(tokenizer: Tokenizer, sample: Sample) -> tuple[Ids, NDArray[np.bool_]]:
    """Token ids with <|bos|>, and which of them belong to an answer.

    The document is encoded as a whole, so training sees the tokens that a user's prompt gives.
    """
    encoding = tokenizer.encode(sample.text, add_special_tokens=False)
    in_answer = np.concatenate(
        [np.full(len(segment.text), segment.answer) for segment in sample.segments]
    )
    starts = np.fromiter((start for start, _ in encoding.offsets), np.int64, len(encoding.ids))
    ids = [tokenizer.token_to_id(BOS), *encoding.ids]
    scored = [False, *in_answer[starts]]
    if sample.stop != END:
        ids.append(tokenizer.token_to_id(EOS))
        scored.append(True)
    return np.array(ids, np.int64), np.array(scored, np.bool_)


def encode_files(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Ids, Ids]:
    """All files as one stream ``<|bos|> file <|eos|> ...`` and the offsets where files start."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    parts: list[Ids] = []
    starts: list[int] = []
    total = 0
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        parts.append(np.array([bos, *encoding.ids, eos], np.int64))
        starts.append(total)
        total += len(parts[-1])
    return np.concatenate(parts), np.array(starts, np.int64)


def scored_batch(ids: Ids, scored: NDArray[np.bool_], count: int, seed: tuple[int, int]) -> Batch:
    """The batch of ``ids [B, L + 1]`` with a loss at ``count`` of the ``scored`` tokens.

    More than that many are thinned out at random; where there are fewer, the mask says so.
    """
    picked = np.flatnonzero(scored[:, 1:])
    mask = np.ones(count, np.float32)
    if len(picked) > count:
        order = np.random.default_rng(seed).permutation(len(picked))
        picked = np.sort(picked[order[:count]])
    else:
        mask[len(picked) :] = 0.0
        picked = np.concatenate([picked, np.zeros(count - len(picked), np.int64)])
    return Batch(
        torch.from_numpy(ids[:, :-1].copy()),
        torch.from_numpy(picked),
        torch.from_numpy(ids[:, 1:].reshape(-1)[picked]),
        torch.from_numpy(mask),
    )


class Mixture:
    """Rows of training text: ``code_share`` of them code, the others packed generated tasks."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        tasks: Sequence[tuple[Task, float]],
        *,
        code_share: float = 0.35,
        scored_share: float = 0.6,
        seed: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.code, self.starts = encode_files(tokenizer, texts)
        self.tasks = [task for task, _ in tasks]
        self.weights = [weight for _, weight in tasks]
        self.code_share = code_share
        self.scored_share = scored_share
        self.seed = seed
        self.pad = tokenizer.token_to_id(PAD)

    def with_shares(self, code_share: float, boost: Mapping[str, float]) -> Mixture:
        """The same texts and tasks in other shares; ``boost`` multiplies the weights it names."""
        other = copy.copy(self)
        other.code_share = code_share
        other.weights = [
            weight * boost.get(task.name, 1.0)
            for task, weight in zip(self.tasks, self.weights, strict=True)
        ]
        return other

    def batch(self, step: int, rows: int, length: int) -> Batch:
        """The batch of one step: ``rows`` sequences of ``length`` tokens."""
        rng = random.Random(f"{self.seed}/{step}")
        ids = np.empty((rows, length + 1), np.int64)
        scored = np.empty((rows, length + 1), np.bool_)
        for row in range(rows):
            # Stratified: every batch has its share of code, and so of tasks.
            is_code = (row + rng.random()) / rows < self.code_share
            fill = self._code_row if is_code else self._task_row
            ids[row], scored[row] = fill(rng, length + 1)
        count = int(rows * length * self.scored_share)
        return scored_batch(ids, scored, count, (self.seed, step))

    def _code_row(self, rng: random.Random, length: int) -> tuple[Ids, NDArray[np.bool_]]:
        last = len(self.code) - length
        if rng.random() < 0.25:
            start = min(int(rng.choice(self.starts)), last)
        else:
            start = rng.randrange(last + 1)
        return self.code[start : start + length], np.ones(length, np.bool_)

    def _task_row(self, rng: random.Random, length: int) -> tuple[Ids, NDArray[np.bool_]]:
        """Tasks of log-uniform length until the row is full; the last one is cut."""
        ids = np.full(length, self.pad, np.int64)
        scored = np.zeros(length, np.bool_)
        used = 0
        while length - used > SHORTEST_TASK // 2:
            room = max(SHORTEST_TASK, length - used)
            wanted = int(SHORTEST_TASK * (room / SHORTEST_TASK) ** rng.random())
            task = rng.choices(self.tasks, self.weights)[0]
            new_ids, new_scored = encode_sample(self.tokenizer, task.generate(rng, wanted))
            if len(new_ids) > length - used and len(new_ids) > length // 2 and used:
                continue  # a long document loses its questions when cut: draw another
            new_ids, new_scored = new_ids[: length - used], new_scored[: length - used]
            ids[used : used + len(new_ids)] = new_ids
            scored[used : used + len(new_ids)] = new_scored
            used += len(new_ids)
        return ids, scored


@dataclass(frozen=True)
class Curriculum:
    """One mixture for sequences up to ``length`` tokens, another for longer ones."""

    first: Mixture
    then: Mixture
    length: int

    def batch(self, step: int, rows: int, length: int) -> Batch:
        source = self.first if length <= self.length else self.then
        return source.batch(step, rows, length)
