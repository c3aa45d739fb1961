"""A decoding engine reduced to what a controller sees: time by a formula, acceptance by lot."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from hasten.speculation.base import ControlContext, Load, Outcome, StatelessDrafting, StepReport
from hasten.speculation.tree import TokenTree

NO_LOGITS = np.empty((0, 0), np.float32)


def machine(fixed: float = 1e-3, row: float = 1e-4, free: int = 1) -> Callable[[int], float]:
    """Seconds of a pass: ``free`` rows are paid with the fixed part, each other costs."""
    return lambda rows: fixed + row * max(0, rows - free)


@dataclass(eq=False)
class Text:
    """A sequence whose next token is its position, so that a draft can be right or wrong.

    ``quality(position)`` is the chance that a candidate there is right.
    """

    quality: Callable[[int], float]
    tokens: list[int] = field(default_factory=lambda: [0])
    tenant: str = ""
    draft_state: Any = None
    num_prompt: int = 1


@dataclass
class Lots(StatelessDrafting):
    """Candidates that are right by lot, all in one chain; ``coverage`` of the proposals exist."""

    seconds: Callable[[int], float]
    rng: random.Random
    coverage: float = 1.0
    which: int = 0
    spent: float = 0.0
    quality: float | None = None
    """Chance that a candidate is right, where it is not the text's."""

    def propose(self, sequences: Sequence[Any], budgets: Sequence[int]) -> list[TokenTree]:
        self.spent += self.seconds(max(budgets))
        return [self._chain(s, b) for s, b in zip(sequences, budgets, strict=True)]

    def _chain(self, text: Any, budget: int) -> TokenTree:
        root = len(text.tokens) - 1
        if self.rng.random() >= self.coverage:
            budget = 0
        text = getattr(text, "whole", text)
        own = self.quality
        right = [
            self.rng.random() < (text.quality(root + 1 + i) if own is None else own)
            for i in range(budget)
        ]
        return TokenTree.chain([root, *(root + 1 + i if ok else -1 for i, ok in enumerate(right))])


class Simulation:
    """Steps of some texts under a controller; ``seconds`` is the time that passed."""

    def __init__(
        self,
        control: Any,
        texts: list[Text],
        pass_seconds: Callable[[int], float],
        *,
        drafting: Any = None,
        does: frozenset[str] = frozenset({"drafts-from-text"}),
        draft: Any = None,
        max_rows: int = 512,
        look: bool = True,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.rng = random.Random(seed)
        self.texts = texts
        self.pass_seconds = pass_seconds
        self.max_rows, self.noise = max_rows, noise
        self.drafting = drafting or Lots(lambda k: 1e-5, random.Random(seed + 1))
        draft = draft or SimpleNamespace(card=SimpleNamespace(does=does))
        self.control = control.start(
            ControlContext(
                draft=draft,
                drafting=lambda: self.drafting,
                max_batch_tokens=max_rows,
                time_step=(lambda rows, context: pass_seconds(rows)) if look else None,
            )
        )
        for timed in (self.control, self.drafting):
            if hasattr(timed, "clock"):
                timed.clock = self._drafted
        for text in texts:
            text.draft_state = self.drafting.open(text)
        self.seconds = 0.0
        self.tokens = 0
        self.candidates = 0
        self.budgets: list[int] = []
        self.accepted: Counter[int] = Counter()
        """Candidates by the source of their tree."""

    def _drafted(self) -> float:
        parts = getattr(self.drafting, "parts", [self.drafting])
        return sum(part.spent for part in parts)

    def step(self) -> None:
        count = len(self.texts)
        load = Load(
            decoding=count,
            rows_taken=count,
            rows_left=self.max_rows - count,
            context=sum(len(t.tokens) for t in self.texts),
        )
        began = self._drafted()
        self.budgets = self.control.plan(self.texts, load)
        assert sum(self.budgets) <= load.rows_left and min(self.budgets) >= 0
        trees = [TokenTree.root(len(t.tokens) - 1) for t in self.texts]
        if any(self.budgets):
            trees = self.drafting.propose(self.texts, self.budgets)
        drafting = self._drafted() - began
        outcomes = [self._verify(text, tree) for text, tree in zip(self.texts, trees, strict=True)]
        self.drafting.observe(outcomes)
        candidates = sum(len(tree) - 1 for tree in trees)
        forward = self.pass_seconds(count + candidates)
        forward *= 1 + self.noise * self.rng.random()
        if self.noise and self.rng.random() < 0.01:
            forward *= 10  # something else ran
        before = self._drafted()
        self.control.observe(
            StepReport(
                load,
                count + candidates,
                candidates,
                drafting,
                forward,
                0.0,
                forward + drafting,
                outcomes,
            )
        )
        self.seconds += forward + drafting + self._drafted() - before
        self.tokens += sum(len(o.tokens) for o in outcomes)
        self.candidates += candidates

    def _verify(self, text: Text, tree: TokenTree) -> Outcome:
        start = len(text.tokens) - 1
        path = [0]
        while path[-1] + 1 < len(tree) and tree.token[path[-1] + 1] == start + len(path):
            path.append(path[-1] + 1)
        if len(path) > 1 and tree.source:
            self.accepted[tree.source[1]] += len(path) - 1
        new = list(range(start + 1, start + 1 + len(path)))
        text.tokens += new
        return Outcome(text, start, tree, path, new, NO_LOGITS)  # type: ignore[arg-type]

    def run(self, tokens: int) -> float:
        """Tokens a second until each text has so many more on average."""
        goal = self.tokens + tokens * len(self.texts)
        began, had = self.seconds, self.tokens
        while self.tokens < goal:
            self.step()
        return (self.tokens - had) / (self.seconds - began)
