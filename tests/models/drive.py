"""Runs a model the way the engine does, without an engine: pages, tables, batches by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.cache.layout import PAGE_SIZE, KVStorage
from hasten.engine.batch import Batch, Segment
from hasten.models.base import Decoder, Hidden
from hasten.models.paged import PagedKV


class Driver:
    """Page tables for ``rows`` sequences of up to ``length`` positions.

    With ``seed`` the page ids are shuffled and the pages hold garbage, so that a read of a slot
    that was never written shows.
    """

    def __init__(
        self,
        model: Decoder,
        rows: int = 1,
        length: int = 256,
        seed: int | None = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        layout = model.config.kv_layout(dtype)
        blocks = -(-length // PAGE_SIZE)
        rng = np.random.default_rng(seed)
        self.tables: list[NDArray[np.int32]] = []
        for group in layout.groups:
            pages = np.arange(rows * group.head_groups * blocks, dtype=np.int32)
            if seed is not None:
                rng.shuffle(pages)
            self.tables.append(pages.reshape(rows, group.head_groups, blocks))
        self.storage = KVStorage(layout, [table.size for table in self.tables])
        if seed is not None:
            for pages_ in self.storage.k:
                pages_.fill_(1e4)
            for pages_ in self.storage.v:
                pages_[..., : layout.value_dim].fill_(1e4)

    def hidden(self, segments: Sequence[Segment], **options: object) -> tuple[Batch, Hidden]:
        batch = Batch.build(segments, self.tables)
        kv = PagedKV(self.storage, batch)
        return batch, self.model.forward(batch, kv, **options)  # type: ignore[arg-type]

    def logits(self, segments: Sequence[Segment]) -> torch.Tensor:
        """Logits [n, V] of the wanted rows."""
        batch, hidden = self.hidden(segments)
        return self.model.logits(hidden, batch.wanted)


def whole(model: Decoder, tokens: Sequence[int]) -> torch.Tensor:
    """Logits [L, V] of a text in one step."""
    return Driver(model).logits([Segment(0, 0, tokens, wanted="all")])


def chunked(model: Decoder, tokens: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """The same in chunks of the given sizes, repeated until the text ends."""
    driver, parts, start, turn = Driver(model, seed=1), [], 0, 0
    while start < len(tokens):
        end = min(len(tokens), start + sizes[turn % len(sizes)])
        parts.append(driver.logits([Segment(0, start, tokens[start:end], wanted="all")]))
        start, turn = end, turn + 1
    return torch.cat(parts)


def ragged(model: Decoder, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Several texts at once, each advancing by a size of its own and starting at another step."""
    driver = Driver(model, rows=len(texts), seed=2)
    starts = [0] * len(texts)
    parts: list[list[torch.Tensor]] = [[] for _ in texts]
    step = 0
    while any(start < len(text) for start, text in zip(starts, texts, strict=True)):
        segments = []
        for row, text in enumerate(texts):
            size = (1, 7, 19, 3)[(row + step) % 4]
            if step < row or starts[row] == len(text):
                continue
            chunk = text[starts[row] : starts[row] + size]
            segments.append(Segment(row, starts[row], chunk, wanted="all"))
        out = driver.logits(segments)
        at = 0
        for segment in segments:
            rows = len(segment.tokens)
            parts[segment.table_row].append(out[at : at + rows])
            starts[segment.table_row] += rows
            at += rows
        step += 1
    return [torch.cat(part) for part in parts]


def greedy(model: Decoder, prompt: Sequence[int], count: int) -> list[int]:
    """Plain greedy decoding: the prompt in one step, then one token a step."""
    driver, text = Driver(model), list(prompt)
    out = driver.logits([Segment(0, 0, text)])
    for _ in range(count - 1):
        text.append(int(out[-1].argmax()))
        out = driver.logits([Segment(0, len(text) - 1, text[-1:])])
    text.append(int(out[-1].argmax()))
    return text[len(prompt) :]
