"""No constraints: requests that ask for one are refused."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from hasten.decoding.constraints.base import ConstrainContext, ConstraintError
from hasten.decoding.params import SamplingParams
from hasten.methods import method


@method("none", slot="constrain", exact="bitwise")
@dataclass(frozen=True)
class NoConstraint:
    """Outputs are free text: requests for structured outputs are refused."""

    def start(self, context: ConstrainContext) -> NoConstraint:
        return self

    def is_prepared(self, params: SamplingParams) -> bool:
        return True

    def prepare(self, params: SamplingParams) -> None:
        pass

    def open(self, params: SamplingParams, eos: Set[int]) -> None:
        if params.structured_outputs is not None:
            raise ConstraintError(
                "structured_outputs is refused by this stack (constrain=none); "
                "choose constrain=grammar"
            )
