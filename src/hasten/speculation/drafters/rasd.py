"""A draft model's tree joined with retrieved continuations that the model finds plausible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hasten.methods import method
from hasten.speculation.base import Draftable, DraftContext, Drafter
from hasten.speculation.drafters.model import ModelDraft
from hasten.speculation.drafters.prompt_lookup import PromptLookup
from hasten.speculation.parts import PartsDrafting, Union, check_parts
from hasten.speculation.tree import TokenTree


@method(
    "rasd",
    slot="draft",
    paper="RASD: Retrieval-Augmented Speculative Decoding (arXiv:2503.03434)",
    exact="bitwise",
    training="that of base",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens",),
)
@dataclass(frozen=True)
class RASD:
    """Adds retrieved continuations to a draft model's tree, unless the model objects.

    Pays on questions about documents, summaries and code: what is retrieved reaches further than
    the draft model can write, and the model keeps out what does not fit here. ``of`` names what
    retrieves (`retrieval` from a datastore, `prompt-lookup` or `copyspec` from the context). A
    retrieved continuation stays if its first token is among the ``top`` that ``base`` expects, or
    has at least the probability ``floor``. The likelier first token goes first, its continuations
    whole, until the budget is used; ``base`` comes before all. Deeper tokens are not weighed by
    the model: it has not computed them.
    """

    base: Drafter = field(default=ModelDraft())
    of: tuple[Drafter, ...] = field(default=(PromptLookup(),))
    top: int = 10
    floor: float = 0.05

    def __post_init__(self) -> None:
        if not self.of:
            raise ValueError("of is empty; name a drafter that retrieves, such as retrieval")
        check_parts((self.base, *self.of))
        if "tells-root-law" not in self.base.card.does:  # type: ignore[attr-defined]
            raise ValueError(
                f"base={self.base.card.name} cannot tell which tokens it expects, "  # type: ignore[attr-defined]
                "so nothing could be pruned; take a draft model, such as base=model, or use fuse"
            )
        if self.top < 1:
            raise ValueError(f"top={self.top} must be at least 1")
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor={self.floor} must be above 0 and at most 1")
        for part in self.of:
            if "runs-draft-model" in part.card.does:  # type: ignore[attr-defined]
                raise ValueError(
                    f"of={part.card.name} runs a draft model; only base may"  # type: ignore[attr-defined]
                )

    def start(self, context: DraftContext) -> RASDDrafting:
        return RASDDrafting(self, context)


OVERASK = 4
"""How many times its room a retriever is asked for, since much of what it finds is pruned."""


class RASDDrafting(PartsDrafting):
    """`RASD` at work."""

    def __init__(self, method: RASD, context: DraftContext) -> None:
        super().__init__((method.base, *method.of), replace(context, root_law=True))
        self.method = method

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        self.forget(sequences)
        unions = [Union(s.tokens[-1]) for s in sequences]
        expected = []
        for s, union, tree in zip(sequences, unions, self.ask(0, sequences, budgets), strict=True):
            bits = [self.source(0, tree, node) for node in range(len(tree))]
            union.add_whole(s.draft_state.views[0], bits)
            expected.append(tree.root_law)
        for part in range(1, len(self.parts)):
            rooms = [
                OVERASK * (budget - len(union))
                for union, budget in zip(unions, budgets, strict=True)
            ]
            trees = self.ask(part, sequences, rooms)
            for i, (s, tree) in enumerate(zip(sequences, trees, strict=True)):
                bits = [self.source(part, tree, node) for node in range(len(tree))]
                order = self._kept(tree, expected[i])
                unions[i].add(s.draft_state.views[part], bits, budgets[i], order)
        for sequence, union in zip(sequences, unions, strict=True):
            sequence.draft_state.tree = union.build()
        return [sequence.draft_state.tree for sequence in sequences]

    def _kept(self, tree: TokenTree, root_law: NDArray[np.float32] | None) -> list[int]:
        """The nodes of a retrieved tree to take, in this order. Without the model's opinion (it
        could not draft in this step) all of them."""
        first = tree.children(0)
        if root_law is not None:
            top = min(self.method.top, len(root_law))
            least = min(self.method.floor, float(np.partition(root_law, -top)[-top]))
            first = [node for node in first if root_law[tree.token[node]] >= least]
            first.sort(key=lambda node: -root_law[tree.token[node]])
        kept: list[int] = []
        for start in first:
            below = {start}
            for node in range(start, len(tree)):
                if node == start or tree.parent[node] in below:
                    below.add(node)
                    kept.append(node)
        return kept
