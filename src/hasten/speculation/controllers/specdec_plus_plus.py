"""Stops a draft when a trained head no longer believes that all of it will be accepted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from hasten.methods import MethodError, method
from hasten.models.loading import locate
from hasten.speculation.base import (
    ControlContext,
    Draftable,
    DraftProgress,
    Load,
    StepReport,
)

FORMAT = "hasten acceptance head 1"
EDGE = 1 << 20
"""Bytes at both ends of a weight file that identify it, together with its size."""


@method(
    "specdec++",
    slot="control",
    paper="SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths "
    "(arXiv:2405.19715)",
    exact="bitwise",
    training="an acceptance head for the draft model (hasten train acceptance-head)",
    needs=("draft-hidden-states",),
    does=("sets-budgets",),
)
@dataclass(frozen=True)
class SpecDecPlusPlus:
    """Drafts on while the chance that some candidate is rejected stays below ``threshold``.

    The chance is 1 minus the product of the acceptance probabilities that a small head reads off
    the draft model's hidden states. Pays with draft models on texts whose difficulty varies: long
    drafts where it is easy, short ones where it is not. At least ``least`` and at most ``most``
    candidates are drafted; the drafter's own limit counts, too, so pair it with
    ``draft=model(k=20)``. ``head`` is the file that ``hasten train acceptance-head`` wrote.
    """

    head: str = ""
    threshold: float = 0.3
    least: int = 2
    most: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold={self.threshold}: need a probability between 0 and 1")
        if not 1 <= self.least <= self.most:
            raise ValueError(f"need 1 <= least ({self.least}) <= most ({self.most})")

    def start(self, context: ControlContext) -> SpecDecControl:
        path = getattr(context.draft, "path", None)
        if path is None:
            raise MethodError(
                "control=specdec++ scores the states of a draft model; choose draft=model"
            )
        make = f"hasten train acceptance-head --draft {path} -o head.safetensors"
        if not self.head:
            raise MethodError(f"control=specdec++ needs head=FILE; make one: {make}")
        head, made_for = AcceptanceHead.load(Path(self.head), make)
        if made_for != fingerprint(path):
            raise MethodError(
                f"the acceptance head {self.head} was trained for another draft model than "
                f"{path}; make one: {make}"
            )
        return SpecDecControl(self, head)


@dataclass(frozen=True)
class AcceptanceHead:
    """Residual layers x + silu(W x + b), then a logistic unit.

    Attributes:
        weight: float32 [layers, H, H]; ``bias`` [layers, H].
        out: float32 [H]; ``offset`` is its bias.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    out: NDArray[np.float32]
    offset: float

    @classmethod
    def load(cls, path: Path, make: str) -> tuple[AcceptanceHead, str]:
        """A head and the fingerprint of its draft model; ``make`` is the advice if it is unfit."""
        try:
            with safe_open(path, "numpy") as file:
                facts = file.metadata() or {}
                if facts.get("format") != FORMAT:
                    raise MethodError(f"{path} is no acceptance head; make one: {make}")
                weight, bias, out, offset = (
                    file.get_tensor(name) for name in ("weight", "bias", "out", "offset")
                )
        except (OSError, SafetensorError) as error:
            raise MethodError(
                f"cannot read the acceptance head {path} ({error}); make one: {make}"
            ) from None
        return cls(weight, bias, out, float(offset[0])), facts["draft"]

    def probability(self, hidden: NDArray[np.float32]) -> float:
        """That the token which the state has just read is accepted. ``hidden`` is float32 [H]."""
        for weight, bias in zip(self.weight, self.bias, strict=True):
            inner = weight @ hidden + bias
            hidden = hidden + inner / (1 + np.exp(-inner))
        return float(1 / (1 + np.exp(-(self.out @ hidden + self.offset))))


def fingerprint(path: str) -> str:
    """Identifies a model by its configuration and the ends of its weight files."""
    folder = locate(path)
    files = [folder]
    if folder.is_dir():
        files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest.update(f"{size} ".encode() + stream.read(EDGE))
            if size > 2 * EDGE:
                stream.seek(-EDGE, 2)
            digest.update(stream.read())
    return digest.hexdigest()


@dataclass
class SpecDecControl:
    """`Controlling` by the product of what the head says along each draft."""

    method: SpecDecPlusPlus
    head: AcceptanceHead
    all_accepted: dict[int, float] = field(default_factory=dict)
    """By sequence: the chance that the candidates judged so far are accepted."""

    def plan(self, sequences: Sequence[Draftable], load: Load) -> list[int]:
        share = load.rows_left // max(len(sequences), 1)
        return [min(self.method.most, share)] * len(sequences)

    def should_stop(self, progress: DraftProgress) -> bool:
        key = id(progress.sequence)
        if progress.depth == 1:
            # the row read the pending token, which is output already: nothing to judge yet
            self.all_accepted[key] = 1.0
        elif progress.hidden is not None:
            # the row that gave candidate `depth` has read candidate `depth - 1`
            self.all_accepted[key] *= self.head.probability(progress.hidden)
        if progress.depth < self.method.least:
            return False
        rejected = 1 - self.all_accepted[key]
        return progress.depth >= self.method.most or rejected > self.method.threshold

    def observe(self, report: StepReport) -> None:
        pass

    def close(self, sequence: Draftable) -> None:
        self.all_accepted.pop(id(sequence), None)
