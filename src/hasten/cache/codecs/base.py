"""The codec slot: in what form keys and values are stored."""

from __future__ import annotations

from typing import Literal, Protocol, cast

from hasten.cache.layout import KVLayout


class Codec(Protocol):
    """What every codec offers.

    A form that depends on each position alone is stated once, as a layout: kernels write and read
    it by themselves. It is position-pure by construction.
    """

    def layout(self, plain: KVLayout) -> KVLayout:
        """The layout of a model's cache in the form of this codec; ``plain`` is float32."""
        ...


def key_space(keys: str) -> Literal["rotated", "pre-rope"]:
    """``KVLayout.key_space`` of a codec's parameter ``keys``; ValueError if there is none."""
    if keys not in ("rotated", "pre-rope"):
        raise ValueError(f"keys is '{keys}', expected rotated or pre-rope")
    return cast(Literal["rotated", "pre-rope"], keys)
