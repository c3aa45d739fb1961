"""The same draft budget for everybody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.methods import method
from hasten.speculation.base import Draftable, Load


@method("fixed", slot="control", exact="bitwise", does=("sets-budgets",))
@dataclass(frozen=True)
class Fixed:
    """``k`` candidates a sequence while the step has room, shared evenly when it has not."""

    k: int = 16

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ValueError(f"k={self.k}: a budget cannot be negative")

    def plan(self, sequences: Sequence[Draftable], load: Load) -> list[int]:
        share = load.rows_left // max(len(sequences), 1)
        return [min(self.k, share)] * len(sequences)
