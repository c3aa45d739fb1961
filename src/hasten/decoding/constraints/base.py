"""The constrain slot: which tokens may follow, by what a request says its text must be.

A method in a stack is data; what it needs while an engine runs (a table of the vocabulary, compiled
grammars) is made by ``start`` and lives in what that returns. What belongs to a sequence is a
`ConstraintState`:

    method (frozen dataclass)  --start(context)-->  Constraining  (one an engine)
                                                    open(params) --> state (one a sequence)

A sequence's `Sampler` owns its state and asks it for the mask wherever it asks for penalties, so
the law that verifiers see, the tokens that are drawn and plain decoding are masked alike. The state
moves with the history: a token that becomes output advances it; to see a law further down a path,
the path's tokens advance it and are rolled back afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from hasten.decoding.params import SamplingParams

if TYPE_CHECKING:
    from hasten.models.tokenizer import Tokenizer


class ConstraintError(ValueError):
    """A constraint that cannot be had, or that outgrew its limits; the text says what to change."""


@dataclass(frozen=True)
class ConstrainContext:
    """What a constraint may use of the engine that starts it.

    Attributes:
        vocab_size: columns of a row of logits; a tokenizer may know fewer ids.
        tokenizer: what ids stand for, or None if the engine runs on token ids alone.
    """

    vocab_size: int
    tokenizer: Tokenizer | None


class ConstraintState(Protocol):
    """Where the text of one sequence stands."""

    def mask(self, row: NDArray[np.float32]) -> None:
        """Set the logits [V] of all tokens that may not follow to -inf, in place.

        A token that ends the sequence may follow only where the text may end. Behind such a token
        nothing is masked, since nothing follows it.
        """
        ...

    def advance(self, token: int) -> None:
        """The token follows. Raises ``ValueError`` if it may not: a mask was not applied."""
        ...

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` tokens."""
        ...

    def allowed(self, paths: Sequence[Sequence[int]]) -> list[int]:
        """How many tokens of each path may follow, one after the other. Nothing is changed, and
        where it would cost too much to tell, all of them count as allowed."""
        ...

    def fork(self) -> Self:
        """The same place, for another sequence."""
        ...

    def is_accepting(self) -> bool:
        """Whether the text may end here."""
        ...

    def is_complete(self) -> bool:
        """Whether it must: it may, and no token but an end can follow."""
        ...


class Constraining(Protocol):
    """A constraint at work in one engine. Requests that ask for none cost it nothing.

    ``open`` is called by the engine between two steps, so that what takes it long keeps every
    running sequence waiting. Servers have that done before, in another thread: ``prepare``.
    """

    def is_prepared(self, params: SamplingParams) -> bool:
        """Whether ``open`` is quick. From any thread."""
        ...

    def prepare(self, params: SamplingParams) -> None:
        """Make ``open`` quick for these ``params``, where its result can be kept. From any thread,
        also while the engine runs. Raises ``ConstraintError`` as ``open`` would."""
        ...

    def open(self, params: SamplingParams, eos: Set[int]) -> ConstraintState | None:
        """The state before the first token, or None if ``params`` ask for no constraint.

        Args:
            eos: tokens that end the sequence.

        Raises:
            ConstraintError: what is asked for is no schema or grammar, or too large.
        """
        ...


class Constraint(Protocol):
    """A method of the slot ``constrain``."""

    def start(self, context: ConstrainContext) -> Constraining: ...
