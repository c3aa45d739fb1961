"""The static tree of draft=token-recycling, fitted to what a model writes.

The model writes texts while Token Recycling drafts as it does in service, so that its table learns
what it would learn there. At every place where a draft began, the text that came then is followed
through the table *as the draft found it*: which rank had the next token, which the one after that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hasten.speculation.base import Draftable, Outcome
from hasten.speculation.calibration import RankCounts
from hasten.speculation.drafters.token_recycling import (
    WIDTH,
    TokenRecycling,
    TokenRecyclingDrafting,
)

if TYPE_CHECKING:
    from hasten.api.llm import LLM
    from hasten.decoding.params import SamplingParams

AT_ONCE = 4
"""Prompts that are handed over together."""


Entries = dict[tuple[str, int], NDArray[np.int32]]
"""By tenant and token."""


class RankWatch(TokenRecyclingDrafting):
    """Token Recycling that counts which ranks the target's tokens had.

    A text is known some steps after a draft began in it, when the table has changed. What a step
    overwrites is therefore kept until the last draft that could see it is judged: memory is that
    of the entries which ``depth`` tokens a sequence overwrite.
    """

    def __init__(self, vocab_size: int, depth: int) -> None:
        super().__init__(TokenRecycling(), vocab_size)
        self.counts = RankCounts(depth, WIDTH)
        self._step = 0
        self._roots: deque[tuple[Draftable, int, int]] = deque()  # (sequence, position, step)
        self._overwritten: deque[Entries] = deque()  # by the latest steps

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        before: Entries = {}
        for outcome in outcomes:
            sequence = outcome.sequence
            table = self._table(sequence)
            for token in set(outcome.tree.token):
                before[sequence.tenant, token] = table[token].copy()
            self._roots.append((sequence, outcome.start, self._step))
        self._overwritten.append(before)
        self._step += 1
        super().observe(outcomes)
        self._judge(self.counts.depth)

    def close(self, sequence: Draftable) -> None:
        self._judge(1, sequence)
        super().close(sequence)

    def _judge(self, least: int, ended: Draftable | None = None) -> None:
        """Count what is known: roots of which ``least`` tokens follow, of one sequence or all."""
        waiting: deque[tuple[Draftable, int, int]] = deque()
        for root in self._roots:
            sequence, position, step = root
            follow = sequence.tokens[position + 1 : position + 1 + self.counts.depth]
            other = ended is not None and sequence is not ended
            if other or len(follow) < least:
                waiting.append(root)
            else:
                self.counts.add(self._ranks(sequence, sequence.tokens[position], follow, step))
        self._roots = waiting
        oldest = min((step for _, _, step in waiting), default=self._step)
        while len(self._overwritten) > self._step - oldest:
            self._overwritten.popleft()

    def _ranks(
        self, sequence: Draftable, token: int, follow: Sequence[int], step: int
    ) -> list[int | None]:
        """Of each token the rank among the continuations of the one before, up to the first that
        is none of them."""
        ranks: list[int | None] = []
        for after in follow:
            found = np.flatnonzero(self._entry(sequence, token, step) == after)
            ranks.append(int(found[0]) if len(found) else None)
            if not len(found):
                break
            token = after
        return ranks

    def _entry(self, sequence: Draftable, token: int, step: int) -> NDArray[np.int32]:
        """A token's entry as it stood before a step."""
        since = len(self._overwritten) - (self._step - step)
        for before in islice(self._overwritten, since, None):
            found = before.get((sequence.tenant, token))
            if found is not None:
                return found
        entry: NDArray[np.int32] = self._table(sequence)[token]
        return entry


def measure_ranks(
    llm: LLM,
    prompts: Sequence[str],
    params: SamplingParams,
    depth: int,
    report: Callable[[int], None] = lambda _: None,
) -> RankCounts:
    """Let a model write after prompts, and count.

    Args:
        llm: made with ``draft=token-recycling``; its drafter is replaced by one that counts.
        params: each prompt gets another seed, from ``params.seed`` (0 if None) on.
        depth: levels to measure.
        report: hears now and then how many prompts are done.
    """
    engine = llm.engine
    engine.drafting = watch = RankWatch(engine.model.config.vocab_size, depth)
    for first in range(0, len(prompts), AT_ONCE):
        some = list(prompts[first : first + AT_ONCE])
        seed = first + (params.seed or 0)
        llm.generate(some, [replace(params, seed=seed + i) for i in range(len(some))])
        report(first + len(some))
    return watch.counts
