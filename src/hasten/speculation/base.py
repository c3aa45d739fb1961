"""The three seams of speculation: who proposes, who accepts, who decides how much.

A method in a stack is data; what it needs while an engine runs (tables, a draft model with its own
cache, averages) is made by ``start``, once an engine, and lives in what ``start`` returns:

    method (frozen dataclass)  --start(context)-->  Drafting / Controlling  (one an engine)
                                                     open(sequence) --> state (one a sequence)

A method that keeps nothing an engine returns itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hasten.cache.layout import PAGE_SIZE
from hasten.methods import MethodError
from hasten.speculation.tree import TokenTree

if TYPE_CHECKING:
    from hasten.cache.manager import CacheManager, Stream
    from hasten.decoding.params import SamplingParams
    from hasten.decoding.sampling import Sampler
    from hasten.engine.executor import Executor, Runner
    from hasten.models.base import Decoder
    from hasten.models.tokenizer import Tokenizer


class Draftable(Protocol):
    """What a drafter sees of a sequence."""

    tokens: list[int]
    """Known tokens; the last one is the pending token, the root of the tree to propose."""
    draft_state: Any
    """What ``Drafting.open`` returned for this sequence."""

    @property
    def num_prompt(self) -> int:
        """How many of ``tokens`` were given."""
        ...

    @property
    def tenant(self) -> str:
        """Whose request it is. Tables that learn from texts never cross tenants."""
        ...

    @property
    def sampler(self) -> Sampler:
        """How the target chooses; a drafter that samples follows its temperature."""
        ...

    @property
    def stream(self) -> Stream:
        """Its pages in the target's cache."""
        ...


@dataclass(frozen=True)
class DraftContext:
    """What a drafter may use of the engine that starts it.

    Attributes:
        model: the target.
        runner: runs the target; ``executor`` orders what runs on it.
        cache: the target's page tables.
        tokenizer: the target's, or None if the engine runs on token ids alone.
        max_sequences: sequences that hold pages at the same time.
        max_batch_tokens: rows of a step.
        max_length: longest sequence.
        prefix_reuse: whether pages may be shared between requests.
        should_stop: the controller's rule for drafters that draft token by token.
        hidden: whether the rule reads hidden states of the draft model.
        root_law: whether trees should carry what the draft model expects after the root, for a
            drafter that prunes by it.
        drawn: whether the verifier weighs candidates by the law they were drawn from. If not,
            the likeliest candidates are the best ones, also where the target samples.
    """

    model: Decoder
    runner: Runner
    executor: Executor
    cache: CacheManager
    tokenizer: Tokenizer | None
    max_sequences: int
    max_batch_tokens: int
    max_length: int
    prefix_reuse: bool
    should_stop: StopRule
    hidden: bool = False
    root_law: bool = False
    drawn: bool = False

    def check_fits(self, candidates: int) -> None:
        """
        Raises:
            MethodError: no draft of so many candidates could ever have pages.
        """
        check_fits(f"a draft of {candidates} tokens", candidates, self.cache.num_blocks)


def check_fits(what: str, candidates: int, blocks: int) -> None:
    """See `DraftContext.check_fits`."""
    if candidates > blocks * PAGE_SIZE:
        raise MethodError(
            f"{what} does not fit the {blocks} pages of {PAGE_SIZE} positions; draft fewer, or "
            "raise kv_bytes"
        )


@dataclass(frozen=True, slots=True)
class DraftProgress:
    """Where a token-by-token draft stands when a controller is asked whether it should go on.

    Attributes:
        sequence: whose draft.
        depth: candidates proposed so far on this path.
        probability: of the candidate drafted last, under the law that it was drawn from.
        hidden: the draft model's normed last hidden state float32 [H] at the row that the last
            candidate was drawn from, if the drafter has one.
    """

    sequence: Draftable
    depth: int
    probability: float
    hidden: NDArray[np.float32] | None = None


StopRule = Callable[[DraftProgress], bool]
"""Whether to stop and verify. What was drafted is submitted either way: withdrawing a drawn
candidate because of what it is would bias the output (sheet, section 5)."""


@dataclass(slots=True)
class Outcome:
    """What one step did for one sequence that it extended.

    ``sequence.tokens`` already ends with ``tokens``. Arrays are valid during ``observe`` only.

    Attributes:
        start: position of the tree's root.
        tree: what was verified; a root alone if nothing was drafted.
        path: accepted nodes, root first.
        tokens: what became output: the path's candidates and, unless the sequence ended before,
            the target's own token after the last of them.
        logits: raw, float32 [len(tree), V].
        hidden: layer -> float32 [len(tree), H], for the layers that ``Drafting.capture`` names.
    """

    sequence: Draftable
    start: int
    tree: TokenTree
    path: list[int]
    tokens: list[int]
    logits: NDArray[np.float32]
    hidden: dict[int, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Computed:
    """Known tokens that a step computed in front of any root: a prompt's chunk, a resumption.

    Arrays are valid during ``absorb`` only.

    Attributes:
        start: position of the first of them.
        hidden: layer -> float32 [n, H], for the layers that ``Drafting.capture`` names.
    """

    sequence: Draftable
    start: int
    hidden: dict[int, Tensor]


class Drafting(Protocol):
    """A drafter at work in one engine."""

    @property
    def capture(self) -> Sequence[int]:
        """Target layers whose output ``absorb`` and ``observe`` need. Mostly none. Read once a
        step, after ``propose``."""
        ...

    @property
    def sources(self) -> Sequence[str]:
        """Names of the bits in ``TokenTree.source``; empty for a single drafter."""
        ...

    def open(self, sequence: Draftable) -> Any:
        """State for a new sequence, or for one whose history was forked."""
        ...

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        """One tree a sequence, of at most ``budget`` nodes beside the root; 0 is common."""
        ...

    def absorb(self, chunks: Sequence[Computed]) -> None:
        """The captured states of known tokens, before ``observe`` of the same step. Called only
        where ``capture`` names layers. Positions that came from a prefix hit are in no chunk."""
        ...

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """What became of all sequences that the step extended, with or without candidates."""
        ...

    def rollback(self, sequence: Draftable, length: int) -> None:
        """The sequence is cut to its first ``length`` tokens.

        The step loop never shortens a sequence, since candidates enter it only once accepted;
        strategies that truncate do.
        """
        ...

    def close(self, sequence: Draftable) -> None:
        """The sequence ended or was preempted: give back pages. It may draft again later."""
        ...


GRADES = 4


class Grading(Protocol):
    """What a drafter at work also has whose card says ``grades-proposals``."""

    def grade(self, sequence: Draftable) -> int:
        """How far the proposal that would come now can be trusted: from 0, there is none, to
        ``GRADES``. Asked often, so it takes microseconds."""
        ...


class Drafter(Protocol):
    """A method of the slot ``draft``."""

    def start(self, context: DraftContext) -> Drafting:
        """Raises ``MethodError`` if it cannot run here (another vocabulary, no trained head, no
        room), with the reason and what to do."""
        ...


class StatelessDrafting:
    """The parts of `Drafting` that a drafter without resources leaves alone."""

    capture: Sequence[int] = ()
    sources: Sequence[str] = ()

    def start(self, context: DraftContext) -> Any:
        return self

    def open(self, sequence: Draftable) -> Any:
        return None

    def absorb(self, chunks: Sequence[Computed]) -> None:
        pass

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        pass

    def rollback(self, sequence: Draftable, length: int) -> None:
        sequence.draft_state = self.open(sequence)

    def close(self, sequence: Draftable) -> None:
        pass


class Walk(Protocol):
    """The target's side of one verification, at the place that the walk has reached.

    Laws and choices are those of the current history: processors and constraints have seen every
    token emitted so far, and none of the others in the tree.
    """

    greedy: bool
    """Temperature 0: the law is one token."""

    def choose(self, node: int) -> int:
        """The token that plain decoding would choose after ``node``: the argmax, or the draw with
        the number that belongs to the position."""
        ...

    def law(self, node: int) -> NDArray[np.float64]:
        """The target's distribution after ``node``, processed and filtered, float64 [V]."""
        ...

    def ahead(self, node: int, tokens: Sequence[int]) -> NDArray[np.float64]:
        """``law(node)`` as it would be once ``tokens`` were emitted: at a place not yet reached,
        for rules that compare paths before they take one."""
        ...

    def accept(self, probability: float) -> bool:
        """True with this probability (1 and more: always). Each call takes a fresh random number,
        which depends on seed, sequence, position and the count of calls at the position only and
        is independent of all draft noise."""
        ...

    def draw(self, weights: NDArray[np.float64]) -> int:
        """A token by weight, float64 [V], not normalized, not all 0; a fresh number as above."""
        ...

    def noise(self) -> NDArray[np.float64]:
        """Gumbel noise of the current position, float64 [V]: the same for the same seed, sequence
        and position, so that a drafter may use it, too."""
        ...

    def emit(self, node: int, token: int) -> bool:
        """Make ``token`` output, chosen after ``node``. True if nothing may follow it."""
        ...


class Verifier(Protocol):
    """A method of the slot ``verify``: decides which path of a tree becomes output."""

    def refuses(self, params: SamplingParams) -> str | None:
        """Why a request with these (resolved) parameters cannot be verified so, or None."""
        ...

    def verify(self, tree: TokenTree, walk: Walk) -> list[int]:
        """Walk down from the root: emit the accepted candidates and one more token.

        Returns:
            The accepted nodes, root first. If a candidate's token ended the sequence, the node is
            the last of them, and no further token was emitted.
        """
        ...


@dataclass(frozen=True)
class Load:
    """What the scheduler knows when drafts are planned.

    Attributes:
        decoding: sequences that decode in this step.
        rows_taken: rows of the step that known tokens take.
        rows_left: rows that drafts may still take.
        waiting: sequences that hold no pages yet.
        context: keys and values that the decoding sequences read, in positions.
    """

    decoding: int
    rows_taken: int
    rows_left: int
    waiting: int = 0
    context: int = 0


@dataclass(frozen=True)
class StepReport:
    """What a step cost and gave, for controllers.

    Attributes:
        load: as it was planned.
        rows: rows that ran, candidates included.
        candidates: candidates among them.
        draft_seconds: spent in ``Drafting.propose`` and ``observe``.
        forward_seconds: in the target's forward pass.
        verify_seconds: choosing, verifying, committing.
        step_seconds: the whole step.
        outcomes: of the sequences that were extended.
    """

    load: Load
    rows: int
    candidates: int
    draft_seconds: float
    forward_seconds: float
    verify_seconds: float
    step_seconds: float
    outcomes: Sequence[Outcome]


class Controlling(Protocol):
    """A controller at work in one engine."""

    def plan(self, sequences: Sequence[Draftable], load: Load) -> list[int]:
        """Candidates that each decoding sequence may have in this step."""
        ...

    def should_stop(self, progress: DraftProgress) -> bool:
        """Whether a token-by-token draft ends here. See ``StopRule``."""
        ...

    def observe(self, report: StepReport) -> None:
        """After each step."""
        ...

    def close(self, sequence: Draftable) -> None:
        """The sequence ended: forget it."""
        ...


class Controller(Protocol):
    """A method of the slot ``control``."""

    def start(self, context: ControlContext) -> Controlling: ...


@dataclass(frozen=True)
class ControlContext:
    """What a controller may use of the engine that starts it.

    Attributes:
        draft: the method of the slot ``draft``.
        drafting: gives it at work. It is made after the controller (which it asks when to stop),
            so call it when planning, not in ``start``.
        time_step: runs a pass of a chain of ``rows`` rows behind ``context`` positions on free
            pages and returns its seconds, for a latency table made in ``start``. ``ValueError``
            if that does not fit; None where nothing can be timed.
        max_batch_tokens: rows of a step.
        blocks: pages of the target's cache; None where there is none.
    """

    draft: Any
    drafting: Callable[[], Drafting]
    max_batch_tokens: int
    time_step: Callable[[int, int], float] | None = None
    blocks: int | None = None

    def check_fits(self, candidates: int) -> None:
        """
        Raises:
            MethodError: a budget of so many candidates could never have pages.
        """
        if self.blocks is not None:
            check_fits(f"a budget of {candidates} candidates", candidates, self.blocks)
