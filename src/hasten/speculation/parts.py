"""Drafters made of drafters: each part keeps its own state and sees its own share of a step.

A combinator hands its parts views of the sequences, joins their trees into one, and afterwards
tells each part what became of the tree that it proposed itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from hasten.methods import is_method, written
from hasten.speculation.base import (
    Computed,
    Draftable,
    DraftContext,
    Drafter,
    Drafting,
    DraftProgress,
    Outcome,
)
from hasten.speculation.tree import TokenTree, TreeBuilder


def check_parts(parts: Sequence[Drafter]) -> None:
    """Raise ``ValueError`` unless these are different drafters that propose something."""
    for part in parts:
        if not is_method(part) or "proposes-tokens" not in part.card.does:  # type: ignore[attr-defined]
            raise ValueError(f"{written(part)} proposes nothing; name drafters")
    if len(set(parts)) < len(parts):
        names = [written(part) for part in parts]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is named twice; a drafter and itself propose the same")


@dataclass(slots=True, eq=False)
class PartView:
    """A sequence as one part sees it (`Draftable`), with that part's state.

    Attributes:
        whole: the sequence.
        tree: what the part proposed in this step, None if it was not asked.
        place: node of ``tree`` -> node of the joined tree, up to the first one that was not taken.
    """

    whole: Draftable
    tokens: list[int]
    draft_state: Any = None
    tree: TokenTree | None = None
    place: list[int] = field(default_factory=list)

    @property
    def num_prompt(self) -> int:
        return self.whole.num_prompt

    @property
    def tenant(self) -> str:
        return self.whole.tenant

    @property
    def sampler(self) -> Any:
        return self.whole.sampler

    @property
    def stream(self) -> Any:
        return self.whole.stream


@dataclass(slots=True, eq=False)
class PartsState:
    """``views`` of a sequence, one a part, and the ``tree`` that was joined from theirs."""

    views: list[PartView]
    tree: TokenTree | None = None


class PartsDrafting:
    """What combinators share: starting the parts, their states, their outcomes.

    Only the first part may draw candidates. What the others propose is chosen, also where the
    verifier weighs draft laws, so that a joined tree has at most one law a node.
    """

    def __init__(
        self, parts: Sequence[Drafter], context: DraftContext, *, all_draw: bool = False
    ) -> None:
        def should_stop(progress: DraftProgress) -> bool:
            view: Any = progress.sequence
            return context.should_stop(replace(progress, sequence=view.whole))

        first = replace(context, should_stop=should_stop)
        others = first if all_draw else replace(first, drawn=False)
        self.parts: list[Drafting] = [
            part.start(others if i else first) for i, part in enumerate(parts)
        ]
        self.sources: list[str] = []
        self.first_bit: list[int] = []
        for method, part in zip(parts, self.parts, strict=True):
            self.first_bit.append(len(self.sources))
            self.sources += part.sources or [written(method)]

    @property
    def capture(self) -> Sequence[int]:
        """Read anew each step, as a part may look at some steps only."""
        return sorted({layer for part in self.parts for layer in part.capture})

    def open(self, sequence: Draftable) -> PartsState:
        views = [PartView(sequence, sequence.tokens) for _ in self.parts]
        for view, part in zip(views, self.parts, strict=True):
            view.draft_state = part.open(view)
        return PartsState(views)

    def ask(
        self, part: int, sequences: Sequence[Draftable], budgets: Sequence[int]
    ) -> list[TokenTree]:
        """The trees of one part, which its views remember."""
        views = [self._view(sequence, part) for sequence in sequences]
        trees = self.parts[part].propose(views, budgets)
        for view, tree in zip(views, trees, strict=True):
            view.tree, view.place = tree, [0]
        return trees

    def source(self, part: int, tree: TokenTree, node: int) -> int:
        """The bits of a part's node: its own, or those of the parts that it has itself."""
        return (tree.source[node] if tree.source else 1) << self.first_bit[part]

    def forget(self, sequences: Sequence[Draftable]) -> None:
        """Before proposing: nothing is proposed yet."""
        for sequence in sequences:
            state: PartsState = sequence.draft_state
            state.tree = None
            for view in state.views:
                view.tree, view.place = None, [0]

    def absorb(self, chunks: Sequence[Computed]) -> None:
        for i, part in enumerate(self.parts):
            if part.capture:
                part.absorb([replace(c, sequence=self._view(c.sequence, i)) for c in chunks])

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for i, part in enumerate(self.parts):
            part.observe([self._outcome(outcome, i) for outcome in outcomes])

    def _outcome(self, outcome: Outcome, part: int) -> Outcome:
        """What became of a part's own tree; its root alone if it has none in what was verified.

        The path ends where it leaves that tree. ``tokens`` are all that became output.
        """
        view = self._view(outcome.sequence, part)
        state: PartsState = outcome.sequence.draft_state
        tree, place = TokenTree.root(outcome.tree.token[0]), [0]
        if view.tree is not None and state.tree is outcome.tree:
            tree, place = subtree(view.tree, range(len(view.place))), view.place
        if len(place) == len(outcome.tree) and place == list(range(len(place))):
            return replace(outcome, sequence=view, tree=tree)
        own = {joined: node for node, joined in reversed(list(enumerate(place)))}
        path = [own[node] for node in outcome.path if node in own]
        rows = {layer: hidden[place] for layer, hidden in outcome.hidden.items()}
        return replace(
            outcome,
            sequence=view,
            tree=tree,
            path=path,
            logits=outcome.logits[place],
            hidden=rows,
        )

    def rollback(self, sequence: Draftable, length: int) -> None:
        self.forget([sequence])
        for i, part in enumerate(self.parts):
            part.rollback(self._view(sequence, i), length)

    def close(self, sequence: Draftable) -> None:
        if sequence.draft_state is not None:
            for i, part in enumerate(self.parts):
                part.close(self._view(sequence, i))

    def _view(self, sequence: Draftable, part: int) -> PartView:
        state: PartsState = sequence.draft_state
        view = state.views[part]
        view.tokens = sequence.tokens
        return view


class Union:
    """Trees of several parts grown into one, along common prefixes.

    A node whose children the first part drew takes no other children: their law covers the drawn
    ones only, and a verifier that weighs it would be misled by more. All other candidates of the
    later parts are chosen, which keeps every verifier exact (sheet, section 5): the law after a
    node does not depend on which chosen candidates stand there.
    """

    def __init__(self, root: int) -> None:
        self.builder = TreeBuilder(root)
        self.closed: dict[int, dict[int, int]] = {}  # nodes with drawn children: token -> child
        self.places: list[tuple[PartView, list[int]]] = []
        self.independent = False
        self.auxiliary: set[int] = set()

    def __len__(self) -> int:
        """Nodes beside the root."""
        return len(self.builder) - 1

    def add_whole(self, view: PartView, source: Sequence[int]) -> None:
        """The first tree. ``source`` are the bits of its nodes."""
        tree, place = view.tree, [0]
        assert tree is not None and not len(self)
        for node in range(1, len(tree)):
            parent = place[tree.parent[node]]
            plain = tree.parent[node] not in tree.law and node not in tree.auxiliary
            add = self.builder.add if plain else self.builder.add_drawn
            place.append(add(parent, tree.token[node], source[node]))
        for node, law in tree.law.items():
            drawn: dict[int, int] = {}
            for child in tree.children(node):
                drawn.setdefault(tree.token[child], place[child])
            if drawn:
                self.builder.law[place[node]] = law
                self.closed[place[node]] = drawn
        self.independent = tree.independent
        self.auxiliary = {place[node] for node in tree.auxiliary}
        self.places.append((view, place))

    def add(
        self,
        view: PartView,
        source: Sequence[int],
        room: int,
        order: Sequence[int] | None = None,
    ) -> None:
        """A later tree, as far as there is ``room`` for nodes in all.

        Args:
            source: bits of its nodes.
            order: the nodes to take, the best first and parents before children. The part then
                sees only what was taken of its tree. Without an order it keeps its numbers, up to
                the first node that was not taken.
        """
        tree = view.tree
        assert tree is not None
        place = {0: 0}
        for node in range(1, len(tree)) if order is None else order:
            parent = place.get(tree.parent[node])
            if parent is not None and node not in tree.auxiliary:
                taken = self._join(parent, tree.token[node], source[node], room)
                if taken is not None:
                    place[node] = taken
        if order is None:
            kept = list(takewhile(place.__contains__, range(len(tree))))
        else:
            kept = sorted(place)
            view.tree = subtree(tree, kept)
        self.places.append((view, [place[node] for node in kept]))

    def _join(self, parent: int, token: int, source: int, room: int) -> int | None:
        if parent in self.closed:
            taken = self.closed[parent].get(token)
            if taken is not None:
                self.builder.source[taken] |= source
            return taken
        if len(self) < room or (parent, token) in self.builder:
            return self.builder.add(parent, token, source)
        return None

    def build(self) -> TokenTree:
        """The joined tree; every view learns where its nodes are."""
        tree, order = self.builder.build(self.independent)
        where = {number: node for node, number in enumerate(order)}
        for view, place in self.places:
            view.place = [where[number] for number in place]
        if self.auxiliary:
            tree.auxiliary = frozenset(where[number] for number in self.auxiliary)
        return tree


def subtree(tree: TokenTree, nodes: Sequence[int]) -> TokenTree:
    """Some nodes of a tree, the root and the parents of each among them, in ascending order."""
    if len(nodes) == len(tree):
        return tree
    number = {node: i for i, node in enumerate(nodes)}
    return TokenTree(
        [tree.token[node] for node in nodes],
        [-1, *(number[tree.parent[node]] for node in nodes[1:])],
        law={number[node]: law for node, law in tree.law.items() if node in number},
        independent=tree.independent,
        source=[tree.source[node] for node in nodes] if tree.source else [],
        auxiliary=frozenset(number[node] for node in tree.auxiliary if node in number),
    )
