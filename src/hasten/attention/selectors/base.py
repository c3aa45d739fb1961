"""The select slot: which of the visible positions attention reads."""

from __future__ import annotations

from typing import Protocol

from hasten.cache.layout import LayerGroup


class Selector(Protocol):
    """What every selector offers.

    A selection that depends on positions alone is stated once, before the first step, as the view
    of a layer group; kernels and the page manager then honour it by themselves (pages that no
    later row can see are given back). It is position-pure by construction.
    """

    def view(self, group: LayerGroup) -> LayerGroup:
        """The group with the window and sinks that this selector imposes on it."""
        ...
