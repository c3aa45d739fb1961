"""Attention sinks beside a recent window."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hasten.cache.layout import LayerGroup
from hasten.methods import method


@method(
    "sink-window",
    slot="select",
    paper="Efficient Streaming Language Models with Attention Sinks (arXiv:2309.17453)",
    exact="lossy",
    needs=("full-attention-layers",),
    does=("limits-view",),
)
@dataclass(frozen=True)
class SinkWindow:
    """Each row reads the first ``sinks`` positions and the ``window`` most recent ones.

    The sinks keep the softmax of a model that parks attention on its first tokens intact; memory
    held and time per token become constant, and what lies between is lost. Positions stay absolute
    (the paper re-indexes them inside the cache, which matters beyond the trained context). The
    window counts positions, itself included, and is exact to the token, never rounded to pages.
    Layers that have a sliding window of their own keep it.
    """

    sinks: int = 4
    window: int = 512

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise ValueError(f"sinks={self.sinks}, window={self.window}: need >= 0 and >= 1")

    def view(self, group: LayerGroup) -> LayerGroup:
        if group.window is not None:
            return group
        return replace(group, window=self.window, sinks=self.sinks)
