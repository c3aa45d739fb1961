"""The target's first layers as a draft model: they write where the target would write.

Rows run through some layers here and through the others in the step that verifies them. A row
computes the same whatever runs beside it, so the keys, values and states are those of one pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hasten.engine.batch import Batch, Segment
from hasten.methods import MethodError
from hasten.speculation.base import Draftable, DraftContext

Chunk = tuple[Draftable, int, Sequence[int]]
"""A sequence, a position, and the tokens there and after it."""


class FirstLayers:
    """Runs layers of the target on the target's pages, between two steps of its engine."""

    def __init__(self, context: DraftContext, drafter: str) -> None:
        """Raises ``MethodError`` on a device, whose passes are recorded whole."""
        if context.model.device.type != "cpu":
            raise MethodError(
                f"draft={drafter} runs the target's layers in parts, which works on the CPU only; "
                "choose another drafter for a device, such as draft=prompt-lookup"
            )
        self.model = context.model
        self.cache = context.cache
        self.executor = context.executor

    def windowed(self, layers: int) -> bool:
        """Whether some of the first layers do not keep all positions."""
        groups = self.cache.layout.groups
        return any(g.window is not None and min(g.layers) < layers for g in groups)

    def reserve(self, sequence: Draftable, candidates: int) -> bool:
        """Take pages for candidates. False where the sequence cannot be drafted for now: pages are
        lacking, or more than the pending token is still to be computed."""
        stream = sequence.stream
        return stream.behind == 1 and self.cache.reserve(stream, len(stream.tokens) + candidates)

    def batch(self, chunks: Sequence[Chunk]) -> Batch:
        """The rows of some chunks, whose slots are reserved or computed already."""
        self.executor.copy(self.cache.take_copies())
        segments = [Segment(s.stream.table_row, at, tokens) for s, at, tokens in chunks]
        return Batch.build(segments, self.cache.tables)

    def run(self, chunks: Sequence[Chunk], layers: int) -> Tensor:
        """The residual stream float32 [R, H] after the first ``layers`` layers."""
        return self.executor.run_layers(self.batch(chunks), range(layers))
