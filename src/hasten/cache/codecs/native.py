"""Keys and values stored as computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hasten.methods import method

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@method("native", slot="codec", exact="bitwise", does=("changes-values",))
@dataclass(frozen=True)
class Native:
    """Keys and values in a floating-point type, without further encoding.

    ``dtype`` is float32 or bfloat16. Both are position-pure: a row reads the same stored bits
    whatever the batch, so every exactness promise holds under either; bfloat16 halves the bytes.
    """

    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is '{self.dtype}', expected one of {', '.join(_DTYPES)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]
