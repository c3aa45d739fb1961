"""Read everything."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.cache.layout import LayerGroup
from hasten.methods import method


@method("all", slot="select", exact="bitwise")
@dataclass(frozen=True)
class All:
    """Every visible position, as the model was trained."""

    def view(self, group: LayerGroup) -> LayerGroup:
        return group
