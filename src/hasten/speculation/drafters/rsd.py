"""Draft trees whose siblings are drawn without replacement, by the Gumbel-top-k trick."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hasten.decoding.sampling import Number, generator, gumbel
from hasten.methods import method
from hasten.speculation.base import Draftable, DraftContext
from hasten.speculation.draft_model import DraftModel, DraftRows, DraftState, load_draft
from hasten.speculation.draft_trees import TreeDrafting, draft_law, draw

Law = NDArray[np.float64]


@method(
    "rsd",
    slot="draft",
    paper="Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without "
    "Replacement (2024)",
    exact="bitwise",
    training="a draft model of the target's vocabulary (hasten train draft)",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens", "runs-draft-model", "tells-root-law"),
)
@dataclass(frozen=True)
class RSD:
    """Candidates that never repeat a sibling, as whole sequences or node by node.

    ``tree="beam"`` (RSD-S) keeps the ``width`` best partial sequences of stochastic beam search
    (Kool et al., 2019): the Gumbel noise of children is conditioned so that its maximum is their
    parent's, so sequences are drawn without replacement and unlikely branches end early.
    ``tree="constant"`` (RSD-C) draws ``width`` children of every node at the first level and one
    below each of them (``width`` chains that start apart). Both are meant for ``verify=recursive``.
    ``tree="independent"`` draws ``width`` sequences with replacement, as SpecTr's ``verify=k-seq``
    takes them: the competitor at equal rows.

    Requests without sampling, and verifiers that weigh no laws, get the likeliest sequences
    (those of the beam) instead of drawn ones.
    """

    path: str = "reference-draft"
    tree: Literal["beam", "constant", "independent"] = "beam"
    width: int = 4
    depth: int = 4

    def __post_init__(self) -> None:
        if self.tree not in ("beam", "constant", "independent"):
            raise ValueError(f"tree='{self.tree}', expected beam, constant or independent")
        if self.width < 1 or self.depth < 1:
            raise ValueError(f"width={self.width} and depth={self.depth} must be at least 1")

    def start(self, context: DraftContext) -> RSDDrafting:
        runtime = DraftModel(load_draft(self.path, context), context, self.width * self.depth)
        return RSDDrafting(runtime, context.drawn, self)


@dataclass(frozen=True, slots=True)
class _Beam:
    """A partial sequence: its last node, log-probability and perturbed log-probability."""

    node: int
    score: float
    noisy: float


@dataclass
class RSDDrafting(TreeDrafting):
    """`TreeDrafting` level by level, all sequences of a level in one pass."""

    method: RSD

    def __post_init__(self) -> None:
        self.independent = self.drawn and self.method.tree == "independent"

    def propose_trees(
        self, sequences: Sequence[Draftable], budgets: Sequence[int], first: DraftRows
    ) -> list[dict[int, Law]]:
        laws: list[dict[int, Law]] = [{} for _ in sequences]
        beams = [[_Beam(0, 0.0, 0.0)] for _ in sequences]
        rows = first
        for level in range(self.method.depth):
            row, going = 0, []
            for i, sequence in enumerate(sequences):
                if not beams[i]:
                    continue
                count = len({beam.node for beam in beams[i]})
                room = budgets[i] - (len(sequence.draft_state.parent) - 1)
                grow = self._level
                if self.independent and not sequence.sampler.greedy:
                    grow = self._independent_level
                beams[i] = grow(sequence, beams[i], rows, row, level, room, laws[i])
                row += count
                left = budgets[i] - (len(sequence.draft_state.parent) - 1)
                if level + 1 == self.method.depth or left < 1:
                    beams[i] = []
                if beams[i]:
                    going.append(i)
            if not going:
                break
            rows = self.compute(
                [sequences[i].draft_state for i in going],
                [list(dict.fromkeys(beam.node for beam in beams[i])) for i in going],
            )
        return laws

    def _level(
        self,
        sequence: Draftable,
        beams: list[_Beam],
        rows: DraftRows,
        row: int,
        level: int,
        room: int,
        laws: dict[int, Law],
    ) -> list[_Beam]:
        """Add the children that a level keeps, siblings in the order of their noise."""
        state: DraftState = sequence.draft_state
        sampler = sequence.sampler
        drawn = self.drawn and not sampler.greedy
        constant = self.method.tree == "constant"
        width = self.method.width if not constant or level == 0 else 1
        found: list[tuple[float, float, int, int]] = []  # (noisy, score, beam, token)
        for place, beam in enumerate(beams):
            law = _law(rows, row + place, sequence)
            scores = beam.score + np.log(np.maximum(law, np.finfo(np.float64).tiny))
            noisy = scores
            if drawn:
                numbers = generator(
                    sampler.seed,
                    sampler.stream,
                    len(sequence.tokens) + level,
                    Number.DRAFT,
                    beam.node,
                )
                noisy = scores + gumbel(numbers, len(law))
                if not constant:
                    noisy = shift_maximum(noisy, beam.noisy)
            noisy = np.where(law > 0, noisy, -np.inf)
            most = min(width, int(np.count_nonzero(law)))
            top = np.argpartition(-noisy, most - 1)[:most]
            found += [(float(noisy[t]), float(scores[t]), place, int(t)) for t in top]
            if drawn:
                laws[beam.node] = law
        found.sort(key=lambda entry: (-entry[0], entry[2], entry[3]))
        if not constant:
            found = found[:width]
        kept = []
        for noise, score, place, token in found[: max(room, 0)]:
            if not self.runtime.room(state, len(state.parent)):
                break
            kept.append(_Beam(state.add(beams[place].node, token), score, noise))
        for beam in beams:
            if beam.node not in (state.parent[k.node] for k in kept):
                laws.pop(beam.node, None)
        return kept

    def _independent_level(
        self,
        sequence: Draftable,
        beams: list[_Beam],
        rows: DraftRows,
        row: int,
        level: int,
        room: int,
        laws: dict[int, Law],
    ) -> list[_Beam]:
        """One draw a sequence. Sequences that agree share their nodes; the sibling that repeats a
        token stands for its draw and has no children."""
        state: DraftState = sequence.draft_state
        sampler, position = sequence.sampler, len(sequence.tokens) + level
        if level == 0:
            beams = beams * self.method.width
        places = {node: row + k for k, node in enumerate(dict.fromkeys(b.node for b in beams))}
        kept: list[_Beam] = []
        child: dict[tuple[int, int], int] = {}
        for index, beam in enumerate(beams[: max(room, 0)]):
            if not self.runtime.room(state, len(state.parent)):
                break
            if beam.node not in laws:
                laws[beam.node] = draft_law(rows, places[beam.node], sequence)
            number = generator(sampler.seed, sampler.stream, position, Number.DRAFT, index)
            token = draw(laws[beam.node], number.random())
            node = state.add(beam.node, token)
            kept.append(_Beam(child.setdefault((beam.node, token), node), 0.0, 0.0))
        return kept


def _law(rows: DraftRows, row: int, sequence: Draftable) -> Law:
    if sequence.sampler.greedy:
        weights = np.exp(rows.logits[row].astype(np.float64) - float(rows.lse[row]))
        return weights / weights.sum()
    return draft_law(rows, row, sequence)


def shift_maximum(noisy: Law, maximum: float) -> Law:
    """Perturbed scores [V] under the condition that the largest is ``maximum``.

    The conditional Gumbel of stochastic beam search in its stable form: with the scores G and
    their maximum Z, v = maximum - G + log1p(-exp(G - Z)), and the result is
    maximum - max(v, 0) - log1p(exp(-|v|)).
    """
    largest = float(noisy.max())
    if not math.isfinite(largest):
        return noisy
    with np.errstate(divide="ignore", invalid="ignore"):
        v = maximum - noisy + np.log1p(-np.exp(noisy - largest))
    # at the maximum itself v is -inf, and the result is `maximum`
    shifted: Law = maximum - np.maximum(v, 0.0) - np.log1p(np.exp(-np.abs(v)))
    return np.where(np.isneginf(noisy), -np.inf, shifted)
