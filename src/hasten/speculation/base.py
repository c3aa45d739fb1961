"""The three seams of speculation: who proposes, who accepts, who decides how much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hasten.speculation.tree import TokenTree


class Draftable(Protocol):
    """What a drafter sees of a sequence."""

    tokens: list[int]
    """Known tokens; the last one is the pending token, the root of the tree to propose."""
    draft_state: Any
    """What ``Drafter.open`` returned for this sequence."""


class Drafter(Protocol):
    """Proposes token trees. Holds no state of its own: ``open`` hands one out per sequence."""

    def open(self) -> Any:
        """State for a new sequence, or for one whose history was forked."""
        ...

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        """One tree a sequence, of at most ``budget`` candidates beside the root."""
        ...

    def observe(self, sequence: Draftable, tree: TokenTree, path: list[int], y: int) -> None:
        """The nodes of ``path`` were accepted and ``y`` follows them; tokens already hold both."""
        ...

    def rollback(self, sequence: Draftable, length: int) -> None:
        """The sequence is cut to its first ``length`` tokens.

        The step loop never shortens a sequence, since candidates enter it only once accepted;
        strategies that truncate do.
        """
        ...


class Verifier(Protocol):
    """Decides which path of a tree becomes output."""

    def verify(
        self, tree: TokenTree, choose: Callable[[int], int], ends: Callable[[int], bool]
    ) -> tuple[list[int], list[int]]:
        """
        Args:
            tree: the candidates.
            choose: the target's own token after a node, under the history of the node's path.
            ends: records a token as output; true if nothing may follow it.

        Returns:
            The accepted nodes (root first) and the tokens that became output.
        """
        ...


@dataclass(frozen=True)
class Load:
    """What the scheduler knows when drafts are planned."""

    decoding: int
    """Sequences that decode in this step."""
    rows_taken: int
    """Rows of the step that known tokens take."""
    rows_left: int
    """Rows that drafts may still take."""


class Controller(Protocol):
    """Sets draft budgets."""

    def plan(self, sequences: Sequence[Draftable], load: Load) -> list[int]:
        """Candidates that each decoding sequence may have in this step."""
        ...
