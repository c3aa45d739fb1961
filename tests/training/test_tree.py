"""Ranks of what a model says in the tables of Token Recycling, as each draft found them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine, EngineConfig
from hasten.models.base import Decoder
from hasten.speculation.base import Outcome
from hasten.speculation.calibration import RankCounts
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack
from hasten.training.tree import RankWatch

DEPTH = 4


class WholeTables(RankWatch):
    """The plain way: a copy of the whole table for each draft, judged when all texts are known."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size, DEPTH)
        self.seen: list[tuple[Any, int, Any]] = []

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            table = self._table(outcome.sequence).copy()
            self.seen.append((outcome.sequence, outcome.start, table))
        super().observe(outcomes)

    def expected(self) -> RankCounts:
        counts = RankCounts(DEPTH, 8)
        for sequence, start, table in self.seen:
            ranks: list[int | None] = []
            for before, after in zip(
                sequence.tokens[start : start + DEPTH], sequence.tokens[start + 1 :], strict=False
            ):
                row = table[before].tolist()
                ranks.append(row.index(after) if after in row else None)
                if ranks[-1] is None:
                    break
            counts.add(ranks)
        return counts


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_counts_against_copies_of_the_tables(
    tiny: Callable[..., Decoder], temperature: float
) -> None:
    model = tiny("llama")
    engine = Engine(
        model,
        Stack.parse("draft=token-recycling,control=fixed(k=12)"),
        EngineConfig(max_sequences=3),
    )
    engine.drafting = watch = WholeTables(model.config.vocab_size)
    for number in range(8):
        params = SamplingParams(
            max_tokens=5 + 9 * number, temperature=temperature, seed=number, ignore_eos=True
        )
        engine.add([5, 6, 7 + number], params, tenant=str(number % 2))
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, len(watch._overwritten))
    expected = watch.expected()
    assert (watch.counts.reached == expected.reached).all()
    assert (watch.counts.hits == expected.hits).all()
    assert expected.reached[-1] > 5 and expected.reached[0] == len(watch.seen)
    assert most <= DEPTH + 1, "no more is kept than drafts wait for"
    assert not watch._roots and not watch._overwritten


def test_a_draft_is_judged_by_what_the_table_said_when_it_began() -> None:
    watch = RankWatch(20, 3)
    watch.tables[""][:] = -1
    watch.tables[""][5, :2] = [7, 6]
    sequence: Any = SimpleNamespace(tokens=[4, 5, 6], tenant="", draft_state=None)

    def step(start: int, *best: int) -> None:
        logits = np.full((1, 20), -9.0, np.float32)
        logits[0, list(best)] = -np.arange(len(best))
        root = TokenTree.root(sequence.tokens[start])
        watch.observe([Outcome(sequence, start, root, [0], [sequence.tokens[-1]], logits)])

    step(1, 6, 7)  # 5 -> 6: rank 1 before this step, rank 0 after it
    sequence.tokens.append(5)
    step(2, 5)  # 6 -> 5 was not known at the first step
    sequence.tokens.append(6)
    step(3, 6)
    watch.close(sequence)
    # from 5: rank 1, then unknown. From 6: unknown. From 5 again: rank 0.
    assert watch.counts.reached.tolist() == [3, 1, 0]
    assert watch.counts.hits[0, :2].tolist() == [1, 1]
