"""Weights as the checkpoint has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hasten.kernels.linear import Weight, pack_rows
from hasten.methods import method
from hasten.weights.base import Matrix, Role

if TYPE_CHECKING:
    from hasten.models.base import Weights
    from hasten.weights.forms import Form

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@method("checkpoint", slot="weights", exact="bitwise", does=("changes-weights",))
@dataclass(frozen=True)
class Checkpoint:
    """Weights in the checkpoint's own type, or cast once at load.

    ``dtype`` is auto, float32 or bfloat16. Activations are float32 in every case: a bfloat16
    weight is widened in a register, so no result is rounded to bfloat16 on the way.
    """

    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is '{self.dtype}', expected one of {', '.join(_DTYPES)}")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The type to load as; None keeps the checkpoint's."""
        return _DTYPES[self.dtype]

    def form(self, role: Role) -> Form | None:
        return None

    def matrix(self, source: Weights, wanted: Matrix) -> Weight:
        if self.dtype == "auto" and (stored := source.stored(wanted)) is not None:
            return stored
        return pack_rows(
            wanted.read(source), wanted.rows, wanted.inputs, source.dtype, gated=wanted.gated
        )
