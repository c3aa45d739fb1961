"""Replayed texts: what a drafter is worth to a target that writes exactly these tokens.

Copying drafters look at tokens only, so their passes can be counted without running the target. A
pass accepts the longest path of the tree that the text follows, and one token more.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from hasten.speculation.base import Drafting, Outcome
from hasten.speculation.statistics import DraftStatistics


@dataclass(slots=True)
class Replayed:
    """``counts`` of one output and the ``seconds`` that drafting it took."""

    counts: DraftStatistics
    seconds: float


def replay(drafting: Drafting, prompt: list[int], output: list[int], budget: int) -> Replayed:
    """Draft along ``output`` with ``budget`` candidates a pass."""
    sequence: Any = SimpleNamespace(
        tokens=list(prompt), num_prompt=len(prompt), tenant="", draft_state=None
    )
    sequence.draft_state = drafting.open(sequence)
    counts, seconds = DraftStatistics(), 0.0
    while (at := len(sequence.tokens) - len(prompt)) < len(output):
        began = time.perf_counter()
        room = min(budget, len(output) - at - 1)
        (tree,) = drafting.propose([sequence], [room])
        seconds += time.perf_counter() - began
        path, rest = [0], output[at:]
        while child := next(
            (c for c in tree.children(path[-1]) if tree.token[c] == rest[len(path) - 1]), 0
        ):
            path.append(child)
        tokens = rest[: len(path)]
        counts.count(tree, path, len(tokens))
        start = len(sequence.tokens) - 1
        sequence.tokens += tokens
        logits = np.zeros((len(tree), 1), np.float32)
        began = time.perf_counter()
        drafting.observe([Outcome(sequence, start, tree, path, tokens, logits)])
        seconds += time.perf_counter() - began
    drafting.close(sequence)
    return Replayed(counts, seconds)
