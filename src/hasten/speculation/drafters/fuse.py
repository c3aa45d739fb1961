"""Several drafters propose together: one tree of all their candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from hasten.methods import method
from hasten.speculation.base import Draftable, DraftContext, Drafter, Outcome
from hasten.speculation.drafters.copyspec import CopySpec
from hasten.speculation.drafters.prompt_lookup import PromptLookup
from hasten.speculation.parts import PartsDrafting, PartsState, Union, check_parts
from hasten.speculation.tree import TokenTree


@method(
    "fuse",
    slot="draft",
    paper="RASD: Retrieval-Augmented Speculative Decoding (fusion by longest prefix)",
    exact="bitwise",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens",),
)
@dataclass(frozen=True)
class Fuse:
    """Joins the trees of several drafters along their common prefixes.

    Pays where drafters are right at different places: one knows the language, one copies the
    context. ``of`` names them, the most trusted first: ``fuse(of=token-recycling(k=8)|copyspec)``.
    The budget of a step is shared in proportion to how many of each part's candidates this
    sequence accepted lately, and what one part leaves the next ones may use. Candidates that
    several parts propose cost one row; statistics show them under each.
    """

    of: tuple[Drafter, ...] = field(default=(PromptLookup(), CopySpec()))

    def __post_init__(self) -> None:
        check_parts(self.of)
        if len(self.of) < 2:
            raise ValueError("of names one drafter; fuse needs at least two, with | between them")

    def start(self, context: DraftContext) -> FuseDrafting:
        return FuseDrafting(self.of, context)


MEMORY = 0.9
"""Weight of the past in the running count of accepted candidates, a step."""


@dataclass(slots=True, eq=False)
class FuseState(PartsState):
    """``success``: accepted candidates a step of each part, running mean; 1 before any is known,
    and a part that never succeeds keeps a little, or it could not recover."""

    success: list[float] = field(default_factory=list)


class FuseDrafting(PartsDrafting):
    """`Fuse` at work."""

    def open(self, sequence: Draftable) -> FuseState:
        return FuseState(super().open(sequence).views, success=[1.0] * len(self.parts))

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        self.forget(sequences)
        unions = [Union(s.tokens[-1]) for s in sequences]
        for i in range(len(self.parts)):
            rooms = [
                share(s.draft_state.success[i:], budget - len(union))
                for s, budget, union in zip(sequences, budgets, unions, strict=True)
            ]
            trees = self.ask(i, sequences, rooms)
            for s, budget, union, tree in zip(sequences, budgets, unions, trees, strict=True):
                view = s.draft_state.views[i]
                bits = [self.source(i, tree, node) for node in range(len(tree))]
                if i == 0:
                    union.add_whole(view, bits)
                else:
                    union.add(view, bits, budget)
        for sequence, union in zip(sequences, unions, strict=True):
            sequence.draft_state.tree = union.build()
        return [sequence.draft_state.tree for sequence in sequences]

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        super().observe(outcomes)
        for outcome in outcomes:
            state: FuseState = outcome.sequence.draft_state
            if state.tree is not outcome.tree or len(outcome.tree) == 1:
                continue
            for i, view in enumerate(state.views):
                if view.tree is not None and len(view.tree) > 1:
                    own = set(view.place)
                    accepted = sum(node in own for node in outcome.path[1:])
                    state.success[i] += (1 - MEMORY) * (accepted - state.success[i])


def share(success: Sequence[float], room: int) -> int:
    """Rows for the first of some parts, in proportion; the last one gets all that is left."""
    floored = [max(value, 0.1) for value in success]
    return math.ceil(room * floored[0] / sum(floored))
