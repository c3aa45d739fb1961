"""The same draft budget for everybody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.methods import method
from hasten.speculation.base import (
    ControlContext,
    Draftable,
    DraftProgress,
    Load,
    StepReport,
)


@method("fixed", slot="control", exact="bitwise", does=("sets-budgets",))
@dataclass(frozen=True)
class Fixed:
    """``k`` candidates a sequence while the step has room, shared evenly when it has not."""

    k: int = 16

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ValueError(f"k={self.k}: a budget cannot be negative")

    def start(self, context: ControlContext) -> Fixed:
        context.check_fits(self.k)
        return self

    def plan(self, sequences: Sequence[Draftable], load: Load) -> list[int]:
        share = load.rows_left // max(len(sequences), 1)
        return [min(self.k, share)] * len(sequences)

    def should_stop(self, progress: DraftProgress) -> bool:
        return False

    def observe(self, report: StepReport) -> None:
        pass

    def close(self, sequence: Draftable) -> None:
        pass
