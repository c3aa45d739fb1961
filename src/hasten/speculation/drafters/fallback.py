"""A second drafter for where the first has nothing to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hasten.methods import method
from hasten.speculation.base import Draftable, DraftContext, Drafter
from hasten.speculation.drafters.copyspec import CopySpec
from hasten.speculation.drafters.prompt_lookup import PromptLookup
from hasten.speculation.parts import PartsDrafting, check_parts
from hasten.speculation.tree import TokenTree


@method(
    "fallback",
    slot="draft",
    paper="CopySpec (copying has priority, a draft model writes otherwise)",
    exact="bitwise",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens",),
)
@dataclass(frozen=True)
class Fallback:
    """Asks ``first``, and ``then`` for the sequences where ``first`` proposes nothing.

    Pays where a cheap drafter is silent most of the time and nearly always right when it is not,
    as copying is: the costly one runs only in between. `fuse` verifies both at once instead.
    """

    first: Drafter = field(default=CopySpec())
    then: Drafter = field(default=PromptLookup())

    def __post_init__(self) -> None:
        check_parts((self.first, self.then))

    def start(self, context: DraftContext) -> FallbackDrafting:
        # one part makes the whole tree, so both may draw
        return FallbackDrafting((self.first, self.then), context, all_draw=True)


class FallbackDrafting(PartsDrafting):
    """`Fallback` at work."""

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        self.forget(sequences)
        trees = self.ask(0, sequences, budgets)
        used = [0] * len(trees)
        silent = [i for i, tree in enumerate(trees) if len(tree) == 1 and budgets[i]]
        if silent:
            others = self.ask(1, [sequences[i] for i in silent], [budgets[i] for i in silent])
            for i, tree in zip(silent, others, strict=True):
                trees[i], used[i] = tree, 1
        for i, (sequence, tree) in enumerate(zip(sequences, trees, strict=True)):
            bits = [0, *(self.source(used[i], tree, node) for node in range(1, len(tree)))]
            tree = trees[i] = with_source(tree, bits)
            sequence.draft_state.tree = tree
            sequence.draft_state.views[used[i]].place = list(range(len(tree)))
        return trees


def with_source(tree: TokenTree, source: list[int]) -> TokenTree:
    """The same tree with other source bits."""
    if len(tree) == 1:
        return tree
    return TokenTree(
        tree.token,
        tree.parent,
        law=tree.law,
        independent=tree.independent,
        source=source,
        auxiliary=tree.auxiliary,
        layers=tree.layers,
        hidden=tree.hidden,
    )
