"""A draft model that has a drafter of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hasten.methods import method, parts
from hasten.speculation.base import (
    Draftable,
    DraftContext,
    Drafter,
    Drafting,
    DraftProgress,
    Outcome,
)
from hasten.speculation.draft_model import DraftModel, DraftRows, DraftState, load_draft
from hasten.speculation.draft_trees import ChainDrafting
from hasten.speculation.drafters.prompt_lookup import PromptLookup
from hasten.speculation.parts import PartView, check_parts, subtree
from hasten.speculation.tree import TokenTree

Laws = dict[int, NDArray[np.float64]]


@method(
    "nested",
    slot="draft",
    paper="TriForce: Lossless Acceleration of Long Sequence Generation with Hierarchical "
    "Speculative Decoding (arXiv:2404.11912), its hierarchy",
    exact="bitwise",
    training="a draft model of the target's vocabulary (hasten train draft)",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens", "runs-draft-model", "tells-root-law"),
)
@dataclass(frozen=True)
class Nested:
    """Writes the chains of `model` in fewer passes: ``of`` drafts for the draft model.

    The draft model checks several candidates of ``of`` in one pass, keeps those that it would
    have chosen itself, and adds its own next token, until ``k`` tokens stand. What it proposes is
    token for token what `model` would propose. Pays where the draft model is so large that its
    passes are most of the time, and the text copies or ``of`` is another, much smaller model.

    ``of`` is asked for ``width`` candidates for each token that is still to be written: 1 suits
    drafters of chains, trees want more. It learns from the draft model's rows, not the target's.
    """

    of: Drafter = field(default=PromptLookup())
    path: str = "reference-draft"
    k: int = 6
    width: int = 1

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ValueError(f"k={self.k}: the first token needs no drafter, write two or more")
        if self.width < 1:
            raise ValueError(f"width={self.width}: ask for at least one candidate a token")
        check_parts((self.of,))
        for part in parts(self.of):
            alone = len(parts(part)) == 1
            if alone and not part.card.does & {"drafts-from-text", "runs-draft-model"}:
                raise ValueError(
                    f"of={part.card.name} cannot draft for a draft model; name a drafter that "
                    "reads the text, such as prompt-lookup, or one with a model of its own"
                )

    def start(self, context: DraftContext) -> NestedDrafting:
        model = load_draft(self.path, context)
        runtime = DraftModel(model, context, self.k + self.k * self.width)
        # the rule about when to stop is for what the target verifies
        inside = replace(
            context,
            model=model,
            should_stop=lambda progress: False,
            hidden=False,
            root_law=False,
            drawn=False,
        )
        return NestedDrafting(
            runtime, context.drawn, self.k, context.should_stop, self.of.start(inside), self.width
        )


@dataclass(slots=True, eq=False)
class NestedState(DraftState):
    """One sequence in the draft model, and as its drafter sees it.

    Attributes:
        view: its tokens go on with what the draft model wrote last, until the target has judged.
        known: of the view's tokens, those that were the sequence's own when last compared.
    """

    view: PartView = field(kw_only=True)
    known: int = field(kw_only=True)


@dataclass
class NestedDrafting(ChainDrafting):
    """`ChainDrafting`, several tokens a pass."""

    inner: Drafting
    width: int

    def open(self, sequence: Draftable) -> NestedState:
        view = PartView(sequence, list(sequence.tokens))
        view.draft_state = self.inner.open(view)
        stream = self.runtime.open(sequence).stream
        return NestedState(stream, view=view, known=len(sequence.tokens))

    def propose_trees(
        self, sequences: Sequence[Draftable], budgets: Sequence[int], first: DraftRows
    ) -> list[Laws]:
        laws: list[Laws] = [{} for _ in sequences]
        goals = [min(budget, self.k) for budget in budgets]
        for sequence in sequences:
            self._follow(sequence)
        trees = [TokenTree.root(sequence.tokens[-1]) for sequence in sequences]
        active, rows = list(range(len(sequences))), first
        while active:
            outcomes: list[Outcome] = []
            going, row = [], 0
            for i, tree in zip(active, trees, strict=True):
                state: NestedState = sequences[i].draft_state
                start, row = row, row + len(tree)
                # for candidates, `_ask` has taken pages
                if len(tree) == 1 and not self.runtime.room(state, len(state.parent)):
                    continue
                before = len(state.parent) - len(tree)
                path, tokens, ended = self._check(
                    sequences[i], tree, rows, start, before, goals[i], laws[i]
                )
                self.runtime.keep_path(state, [*range(before), *(before + n for n in path)])
                state.add(len(state.parent) - 1, tokens[-1])
                view = state.view
                root = len(view.tokens) - 1
                view.tokens += tokens
                logits = rows.logits[start:row]
                outcomes.append(Outcome(view, root, tree, path, tokens, logits))
                if not ended:
                    going.append(i)
            self.inner.observe(outcomes)
            active = going
            if active:
                states = [sequences[i].draft_state for i in active]
                trees = self._ask(states, [goals[i] for i in active])
                nodes = [_add(state, tree) for state, tree in zip(states, trees, strict=True)]
                rows = self.compute(states, nodes)
        return laws

    def _check(
        self,
        sequence: Draftable,
        tree: TokenTree,
        rows: DraftRows,
        row: int,
        written: int,
        goal: int,
        laws: Laws,
    ) -> tuple[list[int], list[int], bool]:
        """The draft model's own choices down a tree, which starts at row ``row``.

        It chooses without looking at the candidates, which therefore change how many tokens a
        pass gives and nothing else: each token is a draw from the model's law.

        Args:
            written: tokens that stand before the tree; ``goal`` is how many there will be.

        Returns:
            The accepted nodes, the tokens (those of the nodes and one more), and whether the
            draft ends here.
        """
        path: list[int] = [0]
        tokens: list[int] = []
        while True:
            at = row + path[-1]
            token, probability = self._next(rows, at, sequence, written + len(tokens), laws)
            tokens.append(token)
            depth = written + len(tokens)
            hidden = None if rows.hidden is None else rows.hidden[at]
            progress = DraftProgress(sequence, depth, probability, hidden)
            if depth == goal or self.should_stop(progress):
                return path, tokens, True
            child = next((c for c in tree.children(path[-1]) if tree.token[c] == token), None)
            if child is None:
                return path, tokens, False
            path.append(child)

    def _ask(self, states: Sequence[NestedState], goals: Sequence[int]) -> list[TokenTree]:
        """What to check in the next pass: the last token written, and candidates behind it."""
        # the pass gives one more token than the candidates that it finds right
        rooms = [goal - len(state.parent) for goal, state in zip(goals, states, strict=True)]
        trees = self.inner.propose([s.view for s in states], [self.width * r for r in rooms])
        found = []
        for state, room, tree in zip(states, rooms, trees, strict=True):
            tree = subtree(tree, range(sum(depth <= room for depth in tree.depth)))
            if len(tree) > 1 and not self.runtime.room(state, len(state.parent) + len(tree) - 1):
                tree = TokenTree.root(tree.token[0])
            found.append(tree)
        return found

    def _follow(self, sequence: Draftable) -> None:
        """Bring the view to what the target made of the last draft."""
        state: NestedState = sequence.draft_state
        view, tokens, same = state.view, sequence.tokens, state.known
        while same < min(len(tokens), len(view.tokens)) and tokens[same] == view.tokens[same]:
            same += 1
        self._cut(view, same)
        view.tokens += tokens[same:]
        state.known = len(tokens)

    def _cut(self, view: PartView, length: int) -> None:
        if len(view.tokens) > length:
            del view.tokens[length:]
            self.inner.rollback(view, length)

    def rollback(self, sequence: Draftable, length: int) -> None:
        super().rollback(sequence, length)
        state: NestedState = sequence.draft_state
        self._cut(state.view, length)
        state.known = min(state.known, length)

    def close(self, sequence: Draftable) -> None:
        super().close(sequence)
        if sequence.draft_state is not None:
            self.inner.close(sequence.draft_state.view)


def _add(state: DraftState, tree: TokenTree) -> list[int]:
    """Add a tree's candidates below the last node; the numbers of its nodes, root first."""
    numbers = [len(state.parent) - 1]
    for node in range(1, len(tree)):
        numbers.append(state.add(numbers[tree.parent[node]], tree.token[node]))
    return numbers
