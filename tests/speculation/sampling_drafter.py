"""A drafter that draws candidates, for verifiers that weigh the laws they were drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.methods import Card
from hasten.speculation.base import Draftable, StatelessDrafting
from hasten.speculation.tree import TokenTree

Law = NDArray[np.float64]


@dataclass(frozen=True)
class SamplingDrafter(StatelessDrafting):
    """Draws from a table of laws by the last token, with numbers of its own.

    ``kind``: "chain", "siblings" (two a node, without replacement), "groups" (two a node,
    independently), "sequences" (three, independently), "mixed" (drawn and chosen candidates in one
    tree); and two with a planted bias: "likelier" keeps the likelier of two siblings and declares
    the law of one draw, "guess" declares a law for a candidate that it chose.
    """

    kind: str
    vocab: int
    seed: int = 0
    depth: int = 2
    laws: Law = field(init=False)
    numbers: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, 1])
        laws = rng.dirichlet(np.full(self.vocab, 0.8), size=self.vocab)
        object.__setattr__(self, "laws", laws)
        object.__setattr__(self, "numbers", np.random.default_rng([self.seed, 2]))

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        return [self._tree(s.tokens[-1], b) for s, b in zip(sequences, budgets, strict=True)]

    def _tree(self, root: int, budget: int) -> TokenTree:
        """Level by level, until the budget or the depth is reached. How many children a node gets
        is known before they are drawn."""
        tokens, parents, depth, laws = [root], [-1], [0], {}
        node = 0
        while node < len(tokens) and depth[node] < self.depth:
            law = self.laws[tokens[node]]
            children, drawn = self._children(node, law, budget + 1 - len(tokens))
            if children and drawn:
                laws[node] = law
            tokens += children
            parents += [node] * len(children)
            depth += [depth[node] + 1] * len(children)
            node += 1
        independent = self.kind in ("groups", "sequences")
        return TokenTree(tokens, parents, law=laws, independent=independent)

    def _children(self, node: int, law: Law, room: int) -> tuple[list[int], bool]:
        kind = self.kind
        if kind == "mixed":
            kind = ("siblings", "best", "chain")[node % 3]
        count = {"chain": 1, "guess": 1, "likelier": 1, "sequences": 1 if node else 3}.get(kind, 2)
        count = min(count, room)
        if count <= 0:
            return [], True
        if kind == "best":
            return [int(t) for t in np.argsort(-law, kind="stable")[:count]], False
        if kind == "guess":
            return [int(law.argmax())], True
        if kind == "likelier":
            return [max(self._draw(law, 2, False), key=law.__getitem__)], True
        return self._draw(law, count, kind in ("groups", "sequences")), True

    def _draw(self, law: Law, count: int, replace: bool) -> list[int]:
        # one after the other, so that their order is that of the draws
        law, found = law.copy(), []
        for _ in range(count):
            found.append(int(self.numbers.choice(self.vocab, p=law / law.sum())))
            if not replace:
                law[found[-1]] = 0.0
        return found


def card(cls: Any) -> Card:
    """The card of a drafter that is no method for users."""
    needs, does = frozenset({"token-history", "spare-slots"}), frozenset({"proposes-tokens"})
    return Card("sampling", ("draft",), cls, "", "bitwise", "none", needs, does)


SamplingDrafter.card = card(SamplingDrafter)  # type: ignore[attr-defined]
