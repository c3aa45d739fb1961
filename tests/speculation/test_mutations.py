"""Planted faults: each is a mistake somebody could make, and the tests must notice it.

A fault patches one place of the code; its detector is a small part of the suite that passes
without it. A detector that still passes with the fault fails here.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from hasten.cache.manager import CacheManager
from hasten.decoding.constraints.grammar import GrammarState
from hasten.decoding.sampling import Sampler
from hasten.engine import recording
from hasten.engine.batch import Batch
from hasten.engine.executor import InlineExecutor
from hasten.engine.walk import SequenceWalk
from hasten.models.base import Decoder
from hasten.speculation import verification
from hasten.speculation.draft_model import DraftModel
from hasten.speculation.drafters.pearl import PearlDrafting
from hasten.speculation.drafters.s2d import SortedDraftModel
from hasten.speculation.tree import TokenTree
from hasten.speculation.verifiers import chain, k_seq, recursive
from hasten.speculation.verifiers.chain import Chain
from hasten.speculation.verifiers.k_seq import KSeq
from hasten.speculation.verifiers.recursive import Recursive
from hasten.speculation.verifiers.sample_match import SampleMatch
from tests.decoding.constraints import test_grammar
from tests.engine.world import World, params_of, prompt_of
from tests.speculation import test_draft_model
from tests.speculation.drafters import test_nested, test_s2d
from tests.speculation.examples import tiny_draft
from tests.speculation.verifiers.harness import RULES, Markov, total_variation

Make = Callable[..., Decoder]
Patch = pytest.MonkeyPatch


# ---- what notices -------------------------------------------------------------------------------


def same_as_alone(tiny: Make, folder: Path) -> None:
    """Random requests with scripted drafts of every kind in a small pool."""
    for architecture, sizes in (("llama", {}), ("mistral", {"sliding_window": 20})):
        for seed in range(4):
            rng = random.Random(seed)
            world = World(tiny(architecture, **sizes), drafts="mixed", blocks=9, seed=seed)
            for _ in range(25):
                world.add(prompt_of(rng, 61, rng.randint(1, 30)), params_of(rng, 61))
            world.drain()


def constrained(tiny: Make, folder: Path) -> None:
    """Random requests under grammars, the same way."""
    test_grammar.same_as_alone(tiny)


def rows_of_drafts(tiny: Make, folder: Path) -> None:
    """The draft model's rows against plain passes."""
    test_draft_model.test_rows_of_a_growing_tree_are_those_of_plain_passes(tiny, "llama")


def exits(tiny: Make, folder: Path) -> None:
    test_s2d.test_each_answer_is_that_of_its_exit(tiny, 0.2)


def pearl(tiny: Make, folder: Path) -> None:
    from hasten.models.loading import load_model

    draft = tiny_draft(folder)
    rng = random.Random(3)
    target = load_model(draft, progress=False)
    world = World(target, drafts=None, choices=f"draft=pearl(path={draft},k=3)", blocks=30)
    for _ in range(12):
        world.add(prompt_of(rng, 61, 8), params_of(rng, 61))
    world.drain()


def nested(tiny: Make, folder: Path) -> None:
    test_nested.test_token_for_token_what_the_draft_model_proposes(tiny, folder, "joined")


def law(verifier: Any, rule: str, tiny: Make, folder: Path) -> None:
    rng = random.Random(rule)
    draft = RULES[rule](Markov(4, 104), rng)
    history = [rng.randrange(4), rng.randrange(4)]
    assert total_variation(verifier.verify, draft, Markov(4, 4), history) < 1e-12


Detector = Callable[[Make, Path], None]
chains: Detector = partial(law, Chain(), "chain of 2")
without_replacement: Detector = partial(law, Recursive(), "siblings 3")
independent: Detector = partial(law, Recursive(), "groups 3")
together: Detector = partial(law, KSeq(), "groups 3")


# ---- faults -------------------------------------------------------------------------------------


def first_candidate_unverified(patch: Patch) -> None:
    def verify(self: SampleMatch, tree: TokenTree, walk: Any) -> list[int]:
        path = [0]
        if children := tree.children(0):
            path.append(children[0])
            if walk.emit(0, tree.token[children[0]]):
                return path
        walk.emit(path[-1], walk.choose(path[-1]))
        return path

    patch.setattr(SampleMatch, "verify", verify)


def one_more_after_a_rejection(patch: Patch) -> None:
    """A bonus token also where the last candidate was rejected."""
    verify = SampleMatch.verify

    def more(self: SampleMatch, tree: TokenTree, walk: Any) -> list[int]:
        path = verify(self, tree, walk)
        rest = tree.children(path[-1])
        if rest and walk.sequence.finish_reason is None:
            walk.emit(rest[0], walk.choose(rest[0]))
        return path

    patch.setattr(SampleMatch, "verify", more)


def accepted_rows_not_moved(patch: Patch) -> None:
    patch.setattr(InlineExecutor, "move", lambda self, batch, moves: None)


def rows_moved_from_one_slot_behind(patch: Patch) -> None:
    move = InlineExecutor.move

    def wrong(self: InlineExecutor, batch: Batch, moves: Any) -> None:
        moves.src = [slot - 1 for slot in moves.src]
        move(self, batch, moves)

    patch.setattr(InlineExecutor, "move", wrong)


def candidates_one_position_late(patch: Patch) -> None:
    build = Batch.build.__func__  # type: ignore[attr-defined]

    def wrong(cls: type[Batch], segments: Any, tables: Any) -> Batch:
        batch: Batch = build(cls, segments, tables)
        for segment, end in zip(segments, batch.segment_rows[1:], strict=True):
            if segment.tree is not None and len(segment.tree) > 1:
                batch.positions[end - len(segment.tree) + 1 : end] += 1
        return batch

    patch.setattr(Batch, "build", classmethod(wrong))


def candidates_see_all_before_them(patch: Patch) -> None:
    patch.setattr(
        TokenTree, "ancestors", lambda self: [(2 << node) - 1 for node in range(len(self))]
    )


def candidates_do_not_see_their_parents(patch: Patch) -> None:
    patch.setattr(TokenTree, "ancestors", lambda self: [1 << node for node in range(len(self))])


def shared_pages_written(patch: Patch) -> None:
    """Copy-on-write without the copy."""
    take = CacheManager.take_copies

    def wrong(self: CacheManager) -> list[Any]:
        take(self)
        return []

    patch.setattr(CacheManager, "take_copies", wrong)


def an_end_within_a_path_ignored(patch: Patch) -> None:
    emit = SequenceWalk.emit

    def wrong(self: SequenceWalk, node: int, token: int) -> bool:
        ended = emit(self, node, token)
        return ended and node == 0

    patch.setattr(SequenceWalk, "emit", wrong)


def processors_see_the_roots_history(patch: Patch) -> None:
    push, emit = Sampler.push, SequenceWalk.emit

    def wrong(self: SequenceWalk, node: int, token: int) -> bool:
        if node and not self.greedy:
            return emit(self, node, token)
        patch.setattr(Sampler, "push", lambda sampler, token: None)
        try:
            ended = emit(self, node, token)
        finally:
            patch.setattr(Sampler, "push", push)
        late = getattr(self.sequence, "draft_state", None) or []
        late.append(token)
        self.sequence.draft_state = late
        if node == 0 or ended:
            for token in late:
                push(self.sequence.sampler, token)
            late.clear()
        return ended

    patch.setattr(SequenceWalk, "emit", wrong)


def a_mask_of_the_parents_place(patch: Patch) -> None:
    """Within a step, masks do not know the last token of the path."""
    begin, emit, mask = SequenceWalk.__init__, SequenceWalk.emit, GrammarState.mask
    places: dict[GrammarState, GrammarState] = {}

    def wrong_begin(self: SequenceWalk, sequence: Any, *others: Any) -> None:
        begin(self, sequence, *others)
        places.pop(sequence.sampler.constraint, None)

    def wrong_emit(self: SequenceWalk, node: int, token: int) -> bool:
        state = self.sequence.sampler.constraint
        assert isinstance(state, GrammarState)
        before = state.fork()
        ended = emit(self, node, token)
        places[state] = before
        return ended

    patch.setattr(SequenceWalk, "__init__", wrong_begin)
    patch.setattr(SequenceWalk, "emit", wrong_emit)
    patch.setattr(GrammarState, "mask", lambda self, row: mask(places.get(self, self), row))


def numbers_depend_on_the_node(patch: Patch) -> None:
    choose = Sampler.choose

    def wrong(self: SequenceWalk, node: int) -> int:
        row = self.rows.logits[self.root + node]
        return choose(self.sequence.sampler, row, len(self.sequence.tokens) + node)

    patch.setattr(SequenceWalk, "choose", wrong)


def the_parents_row_read(patch: Patch) -> None:
    choose = SequenceWalk.choose
    patch.setattr(SequenceWalk, "choose", lambda self, node: choose(self, max(node - 1, 0)))


def recorded_steps_with_an_old_mask(patch: Patch) -> None:
    patch.setattr(recording, "INPUTS", tuple(n for n in recording.INPUTS if n != "mask"))


def recorded_steps_with_old_slots(patch: Patch) -> None:
    patch.setattr(recording, "INPUTS", tuple(n for n in recording.INPUTS if n != "slots"))


def a_rejected_draft_row_kept(patch: Patch) -> None:
    settle = DraftModel.settle

    def wrong(self: DraftModel, state: Any, outcome: Any) -> None:
        settle(self, state, outcome)
        if state.stream.computed < len(outcome.sequence.tokens):
            state.stream.computed += 1

    patch.setattr(DraftModel, "settle", wrong)


def draft_rows_not_moved(patch: Patch) -> None:
    settle = DraftModel.settle

    def wrong(self: DraftModel, state: Any, outcome: Any) -> None:
        move, self.runner.move = self.runner.move, lambda tables, moves: None  # type: ignore[method-assign]
        try:
            settle(self, state, outcome)
        finally:
            self.runner.move = move  # type: ignore[method-assign]

    patch.setattr(DraftModel, "settle", wrong)


def rows_of_inner_candidates_not_moved(patch: Patch) -> None:
    def wrong(self: DraftModel, state: Any, path: Any) -> None:
        state.become_chain([state.token[node] for node in path], (1 << len(path)) - 1)

    patch.setattr(DraftModel, "keep_path", wrong)


def a_rejected_inner_candidate_stays_visible(patch: Patch) -> None:
    keep_path = DraftModel.keep_path

    def wrong(self: DraftModel, state: Any, path: Any) -> None:
        seen = state.seen[-1]
        keep_path(self, state, path)
        state.seen[-1] |= seen

    patch.setattr(DraftModel, "keep_path", wrong)


def holes_left_behind(patch: Patch) -> None:
    remember = SortedDraftModel._remember

    def wrong(self: SortedDraftModel, batch: Any, stream: Any, level: Any) -> None:
        remember(self, batch, stream, level)
        self._shallow.clear()

    patch.setattr(SortedDraftModel, "_remember", wrong)


def what_is_ahead_taken_without_a_match(patch: Patch) -> None:
    """The first token drafted ahead is taken for verified, as if it were the target's own."""
    propose = PearlDrafting.propose

    def wrong(self: PearlDrafting, sequences: Any, budgets: Any) -> list[TokenTree]:
        trees = propose(self, sequences, budgets)
        for sequence, tree in zip(sequences, trees, strict=True):
            if len(tree) > 2:
                sequence.tokens[-1] = tree.token[0] = tree.token[1]
        return trees

    patch.setattr(PearlDrafting, "propose", wrong)


def rejection_draws_from_p(patch: Patch) -> None:
    for module in (chain, recursive):
        patch.setattr(module, "residual", lambda p, q: p)


def always_accepted(patch: Patch) -> None:
    for module in (chain, recursive, k_seq):
        patch.setattr(module, "ratio", lambda p, q, token: 1e9)


def ratio_upside_down(patch: Patch) -> None:
    for module in (chain, recursive, k_seq):
        patch.setattr(module, "ratio", lambda p, q, token: float(q[token] / max(p[token], 1e-9)))


def siblings_weighed_by_the_first_ones_law(patch: Patch) -> None:
    patch.setattr(recursive, "without", lambda q, token: q)


def independent_draws_taken_for_without_replacement(patch: Patch) -> None:
    verify = Recursive.verify

    def wrong(self: Recursive, tree: TokenTree, walk: Any) -> list[int]:
        tree.independent = False
        return verify(self, tree, walk)

    patch.setattr(Recursive, "verify", wrong)


def rho_of_one_candidate(patch: Patch) -> None:
    patch.setattr(k_seq, "smallest_rho", lambda p, q, k: 1.0)


def leftover_from_the_plain_residual(patch: Patch) -> None:
    patch.setattr(k_seq, "leftover", lambda p, q, k, rho: verification.residual(p, q))


def siblings_sorted_by_probability(patch: Patch) -> None:
    """The order of draws is lost."""
    children = TokenTree.children

    def wrong(self: TokenTree, node: int) -> list[int]:
        q = self.law.get(node)
        found = children(self, node)
        return found if q is None else sorted(found, key=lambda c: -q[self.token[c]])

    patch.setattr(TokenTree, "children", wrong)


def a_law_cut_to_its_head(patch: Patch) -> None:
    """The drafter declares its two likeliest tokens only, without scaling them."""
    verify = Recursive.verify

    def wrong(self: Recursive, tree: TokenTree, walk: Any) -> list[int]:
        for node, q in tree.law.items():
            tree.law[node] = np.where(q >= np.sort(q)[-2], q, 1e-3)
        return verify(self, tree, walk)

    patch.setattr(Recursive, "verify", wrong)


class Fault(NamedTuple):
    plant: Callable[[Patch], None]
    detector: Detector


FAULTS = [
    *(
        Fault(plant, same_as_alone)
        for plant in (
            first_candidate_unverified,
            one_more_after_a_rejection,
            accepted_rows_not_moved,
            rows_moved_from_one_slot_behind,
            candidates_one_position_late,
            candidates_see_all_before_them,
            candidates_do_not_see_their_parents,
            shared_pages_written,
            an_end_within_a_path_ignored,
            processors_see_the_roots_history,
            numbers_depend_on_the_node,
            the_parents_row_read,
            recorded_steps_with_an_old_mask,
            recorded_steps_with_old_slots,
        )
    ),
    Fault(a_mask_of_the_parents_place, constrained),
    Fault(a_rejected_draft_row_kept, rows_of_drafts),
    Fault(draft_rows_not_moved, rows_of_drafts),
    Fault(rows_of_inner_candidates_not_moved, nested),
    Fault(a_rejected_inner_candidate_stays_visible, nested),
    Fault(holes_left_behind, exits),
    Fault(what_is_ahead_taken_without_a_match, pearl),
    Fault(rejection_draws_from_p, chains),
    Fault(always_accepted, chains),
    Fault(ratio_upside_down, without_replacement),
    Fault(siblings_weighed_by_the_first_ones_law, without_replacement),
    Fault(siblings_sorted_by_probability, without_replacement),
    Fault(a_law_cut_to_its_head, without_replacement),
    Fault(independent_draws_taken_for_without_replacement, independent),
    Fault(rho_of_one_candidate, together),
    Fault(leftover_from_the_plain_residual, together),
]

DETECTORS = {fault.detector: None for fault in FAULTS}


def test_there_are_enough_of_them() -> None:
    assert len({fault.plant for fault in FAULTS}) == len(FAULTS) >= 20


@pytest.mark.parametrize("number", range(len(DETECTORS)))
def test_without_a_fault_nothing_is_noticed(tiny: Make, tmp_path: Path, number: int) -> None:
    list(DETECTORS)[number](tiny, tmp_path)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.plant.__name__)
def test_a_planted_fault_is_noticed(tiny: Make, tmp_path: Path, fault: Fault) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch)
        with pytest.raises((AssertionError, ValueError, IndexError)):
            fault.detector(tiny, tmp_path)
