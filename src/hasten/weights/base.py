"""Protocol of the slot `weights`: in what form a model's matrices are held.

A format turns what a checkpoint stores into what `hasten.kernels.linear` multiplies by. An
architecture names tensors and shapes and knows no format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch
from torch import Tensor

from hasten.kernels.linear import Weight

if TYPE_CHECKING:
    from hasten.models.base import Weights
    from hasten.weights.forms import Form

Role = Literal["layer", "embedding", "head", "router"]
ROLES: tuple[Role, ...] = get_args(Role)
"""What a matrix does. Every step reads the head (which may be the embedding, too) as a whole, and
of an embedding that is no head only the rows of its tokens. A router's choices flip with small
errors, and it is small."""


@dataclass(frozen=True)
class Matrix:
    """A matrix that a model asks for: the rows of one or several stored tensors, stacked.

    Attributes:
        outputs: tensor name without ``.weight`` -> its rows, in the order of stacking.
        inputs: columns.
        gated: the first half of the rows are gates, the second what they multiply; they are
            packed for `hasten.kernels.linear.linear_gated`.
    """

    outputs: dict[str, int]
    inputs: int
    role: Role = "layer"
    gated: bool = False

    @property
    def rows(self) -> int:
        return sum(self.outputs.values())

    def read(self, source: Weights) -> Iterator[Tensor]:
        """The rows in parts [any, inputs], in the source's own type.

        All shapes are checked by the call, before memory of the sizes that a config states is
        asked for.
        """
        parts = [
            source.rows(f"{name}.weight", (rows, self.inputs))
            for name, rows in self.outputs.items()
        ]
        return chain(*parts)


class WeightFormat(Protocol):
    """A way to hold matrices. Vectors (norms, biases) stay float32 in all of them."""

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The type in which matrices are read from the checkpoint; None keeps its own."""

    def form(self, role: Role) -> Form | None:
        """How the rows of a matrix become integers; None if it holds numbers as they are read."""

    def matrix(self, source: Weights, wanted: Matrix) -> Weight:
        """Read a matrix and bring it into this form, holding little beside the result."""
