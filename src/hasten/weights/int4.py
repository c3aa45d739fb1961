"""Matrices as 4-bit integers with one scale for each output and group of inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hasten.kernels.linear import GROUPS, Weight
from hasten.methods import method
from hasten.weights.base import Matrix, Role
from hasten.weights.forms import Form, Int4Form, Int8Form, quantized

if TYPE_CHECKING:
    from hasten.models.base import Weights


@method(
    "int4",
    slot="weights",
    paper="ZeroQuant (arXiv:2206.01861), its group-wise weights",
    exact="lossy",
    does=("changes-weights",),
)
@dataclass(frozen=True)
class Int4:
    """Weights rounded to 4 bits at load, a scale for each group of inputs; activations to 8 bits.

    ``group`` inputs (32, 64 or 128) of an output share a scale, which is stored as float16;
    ``asymmetric`` adds a zero to each. ``head`` says how the output matrix and the embedding are
    held, as int8 or int4: see docs/slots/weights.md.

    What bounds the loss: a weight moves by at most one code, about 1/8 of the largest magnitude in
    its group (half a code but at the clipped end), unless a clipped scale has less squared error.
    """

    group: int = 32
    asymmetric: bool = False
    head: str = "int8"

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(
                f"group is {self.group}, expected one of {', '.join(map(str, GROUPS))}"
            )
        if self.head not in ("int8", "int4"):
            raise ValueError(f"head is '{self.head}', expected int8 or int4")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return None

    def form(self, role: Role) -> Form | None:
        if role == "router":
            return None
        if role != "layer" and self.head == "int8":
            return Int8Form()
        return Int4Form(self.group, self.asymmetric)

    def matrix(self, source: Weights, wanted: Matrix) -> Weight:
        return quantized(self.form(wanted.role), source, wanted)
