"""Keys and values as 8-bit codes, each row with a scale of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hasten.cache.codecs.base import key_space
from hasten.cache.layout import KVLayout
from hasten.methods import method


@method("int8", slot="codec", exact="lossy", does=("changes-values",))
@dataclass(frozen=True)
class Int8:
    """Each key and each value of a KV head as 8-bit codes times one float32 scale.

    A row is quantized alone when it is appended (symmetric, scale = largest magnitude / 127), so
    the codec is position-pure: batch, chunks, drafts and prefix hits change nothing. An element is
    off by at most half a scale: 1 / 254 of the largest magnitude in its row. A key of D dimensions
    takes D + 4 bytes, and its value as many.

    ``keys`` is rotated, or pre-rope: keys are quantized before the rotation and rotated when they
    are read.
    """

    keys: str = "rotated"

    def __post_init__(self) -> None:
        key_space(self.keys)

    def layout(self, plain: KVLayout) -> KVLayout:
        """See `hasten.cache.codecs.base.Codec.layout`."""
        return replace(plain, dtype=torch.int8, key_space=key_space(self.keys))
