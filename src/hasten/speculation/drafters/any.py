"""Several drafters at hand, one of them at a time for each sequence."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hasten.methods import method
from hasten.speculation.base import (
    Computed,
    Draftable,
    DraftContext,
    Drafter,
    Drafting,
    Outcome,
    StatelessDrafting,
)
from hasten.speculation.drafters.prompt_lookup import PromptLookup
from hasten.speculation.parts import PartView, check_parts
from hasten.speculation.tree import TokenTree


@method(
    "any",
    slot="draft",
    exact="bitwise",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens",),
)
@dataclass(frozen=True)
class AnyOf:
    """A portfolio, ``any(of=prompt-lookup|model)``: the controller picks who drafts, per sequence.

    With ``control=auto`` each sequence gets the drafters that gain it most time. With a controller
    that does not pick, the first of them that proposes something does. All of them learn from all
    tokens, whoever proposed. By default long and short matches of prompt lookup.
    """

    of: tuple[Drafter, ...] = (PromptLookup(min_ngram=2), PromptLookup(k=2, max_ngram=1))

    def __post_init__(self) -> None:
        if len(self.of) < 2:
            raise ValueError("name at least two drafters: any(of=prompt-lookup|model)")
        check_parts(self.of)

    def start(self, context: DraftContext) -> Portfolio:
        names = [str(part.card.name) for part in self.of]  # type: ignore[attr-defined]
        return Portfolio([part.start(context) for part in self.of], names)


@dataclass(slots=True)
class Parts:
    """State of a sequence: its view for each drafter, and who drafts."""

    views: list[PartView]
    shares: Sequence[tuple[int, int]] | None = None
    """Drafters in the order in which they are asked, and their budgets; None = all of them."""
    open: int = 0
    """Drafters, as bits, whose last proposal has not been settled by an outcome."""


class Portfolio:
    """`Drafting` by one of several for each sequence."""

    def __init__(self, parts: Sequence[Drafting], names: Sequence[str]) -> None:
        self.parts = list(parts)
        deaf = StatelessDrafting.observe
        self._learning = {
            arm
            for arm, part in enumerate(parts)
            if getattr(type(part), "observe", None) is not deaf
        }
        """Drafters that learn from outcomes: telling the others would take time."""
        self.sources = list(names)
        self.clock = time.perf_counter
        self.seconds = [0.0] * len(self.parts)
        """Time that each drafter took since the last ``propose`` began."""
        self._turns: dict[int, list[int]] = {}

    @property
    def capture(self) -> Sequence[int]:
        """Read anew each step, as a drafter may look at some steps only."""
        return sorted({layer for part in self.parts for layer in part.capture})

    def open(self, sequence: Draftable) -> Parts:
        views = [PartView(sequence, sequence.tokens) for _ in self.parts]
        for part, view in zip(self.parts, views, strict=True):
            view.draft_state = part.open(view)
        return Parts(views)

    def assign(self, sequence: Draftable, shares: Sequence[tuple[int, int]]) -> None:
        """From now on, let these drafters propose for a sequence: (drafter, budget), each where
        those before it have nothing."""
        sequence.draft_state.shares = shares

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        trees = [TokenTree.root(s.tokens[-1]) for s in sequences]
        self.seconds, self._turns = [0.0] * len(self.parts), {}
        everyone = [(arm, max(budgets)) for arm in range(len(self.parts))]
        without = [i for i, budget in enumerate(budgets) if budget]
        for turn in range(len(self.parts)):
            asked: dict[int, list[tuple[int, int]]] = {}  # by drafter: places and budgets
            for i in without:
                shares = sequences[i].draft_state.shares
                if shares is None:
                    shares = everyone
                if turn < len(shares):
                    arm, budget = shares[turn]
                    asked.setdefault(arm, []).append((i, min(budget, budgets[i])))
            without = []
            for arm, places in asked.items():
                found = self.ask(arm, [sequences[i] for i, _ in places], [b for _, b in places])
                for (i, _), tree in zip(places, found, strict=True):
                    self._turns.setdefault(id(sequences[i]), []).append(arm)
                    trees[i] = tree
                    if len(tree) == 1:
                        without.append(i)
            if not without:
                break
        return trees

    def take_turns(self) -> dict[int, list[int]]:
        """Who was asked for each sequence (by its ``id``) in the last ``propose``, told once."""
        turns, self._turns = self._turns, {}
        return turns

    def grade(self, arm: int, sequence: Draftable) -> int:
        """See `hasten.speculation.base.Grading`: of one of the drafters, which must grade."""
        part: Any = self.parts[arm]
        return int(part.grade(sequence.draft_state.views[arm]))

    def ask(
        self, arm: int, sequences: Sequence[Draftable], budgets: Sequence[int]
    ) -> list[TokenTree]:
        """What one of the drafters proposes, whoever is assigned."""
        began = self.clock()
        views = [s.draft_state.views[arm] for s in sequences]
        trees = self.parts[arm].propose(views, budgets)
        for sequence, tree in zip(sequences, trees, strict=True):
            if len(tree) > 1:
                tree.source = [0] + [1 << arm] * (len(tree) - 1)
                sequence.draft_state.open |= 1 << arm
        self.seconds[arm] += self.clock() - began
        return trees

    def absorb(self, chunks: Sequence[Computed]) -> None:
        for arm, part in enumerate(self.parts):
            if part.capture:
                part.absorb(
                    [replace(c, sequence=c.sequence.draft_state.views[arm]) for c in chunks]
                )

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for arm, part in enumerate(self.parts):
            if arm in self._learning:
                part.observe([_seen_by(arm, outcome) for outcome in outcomes])
        for outcome in outcomes:
            outcome.sequence.draft_state.open = 0

    def rollback(self, sequence: Draftable, length: int) -> None:
        for part, view in zip(self.parts, sequence.draft_state.views, strict=True):
            part.rollback(view, length)

    def close(self, sequence: Draftable) -> None:
        for part, view in zip(self.parts, sequence.draft_state.views, strict=True):
            part.close(view)


def _seen_by(arm: int, outcome: Outcome) -> Outcome:
    """What a drafter is told. One whose own proposal was not verified sees no candidates: it may
    hold keys and values of what it proposed, and would take the tree for its own."""
    parts, tree, path = outcome.sequence.draft_state, outcome.tree, outcome.path
    logits, hidden = outcome.logits, outcome.hidden
    if parts.open >> arm & 1 and (len(tree) == 1 or not tree.source[1] >> arm & 1):
        tree, path = TokenTree.root(tree.token[0]), [0]
        logits = logits[:1]
        hidden = {layer: rows[:1] for layer, rows in hidden.items()}
    return Outcome(parts.views[arm], outcome.start, tree, path, outcome.tokens, logits, hidden)
