"""Keys and values stored as computed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hasten.cache.codecs.base import key_space
from hasten.cache.layout import KVLayout
from hasten.methods import method

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@method("native", slot="codec", exact="bitwise", does=("changes-values",))
@dataclass(frozen=True)
class Native:
    """Keys and values in a floating-point type, without further encoding.

    ``dtype`` is float32 or bfloat16. Both are position-pure: a row reads the same stored bits
    whatever the batch, so every exactness promise holds under either; bfloat16 halves the bytes.
    ``keys`` is rotated, or pre-rope: keys are stored before the rotation and rotated when they are
    read. In float32 that gives the same output bits.
    """

    dtype: str = "float32"
    keys: str = "rotated"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is '{self.dtype}', expected one of {', '.join(_DTYPES)}")
        key_space(self.keys)

    def layout(self, plain: KVLayout) -> KVLayout:
        """See `hasten.cache.codecs.base.Codec.layout`."""
        return replace(plain, dtype=self.torch_dtype, key_space=key_space(self.keys))

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]
