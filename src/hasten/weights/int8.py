"""Matrices as 8-bit integers with one scale for each output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hasten.kernels.linear import Weight
from hasten.methods import method
from hasten.weights.base import Matrix, Role
from hasten.weights.forms import Form, Int8Form, quantized

if TYPE_CHECKING:
    from hasten.models.base import Weights


@method(
    "int8",
    slot="weights",
    paper="Integer Quantization for Deep Learning Inference (arXiv:2004.09602)",
    exact="lossy",
    does=("changes-weights",),
)
@dataclass(frozen=True)
class Int8:
    """Weights rounded to 8 bits at load, one scale an output; activations to 8 bits, one a token.

    What bounds the loss: a weight moves by at most half a code, 1/254 of the largest magnitude in
    its row, and so does an activation within its row, unless a clipped scale has less squared
    error. Sums are exact integers. Norms, biases and routers stay as they are.
    """

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return None

    def form(self, role: Role) -> Form | None:
        return None if role == "router" else Int8Form()

    def matrix(self, source: Weights, wanted: Matrix) -> Weight:
        return quantized(self.form(wanted.role), source, wanted)
