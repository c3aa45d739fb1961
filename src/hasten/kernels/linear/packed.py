"""Weights of a linear layer in the order in which the kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from hasten import _native

PANEL = 16
"""Outputs in a panel: the width of the kernels' vectors."""

GROUP = 4
"""Panels in a group, which are read side by side."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [n, k] as one stream: groups of 64 outputs, in a group ascending inputs.

    Outputs stand in panels of 16, four panels a group; the last group may have fewer. A group of c
    panels is [k, c, 16] float32, or [ceil(k / 2), c, 16, 2] bfloat16 where two neighbouring inputs
    share a word; groups follow each other in ``data`` [packed_size]. What pads the last panel and
    an odd k is zero. So a kernel reads memory from front to back.

    With ``gated`` the outputs are two halves, gate and up, whose panels alternate (gate 0, up 0,
    gate 1, ...), so that a group has both sides of its results.

    Weights of several groups of rows lie one after the other, ``data`` [groups, packed_size].
    """

    data: Tensor
    n: int
    k: int
    gated: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def size(self) -> int:
        """Numbers in the weight, without the padding."""
        groups = self.data.shape[0] if self.data.dim() == 2 else 1
        return groups * self.n * self.k

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def packed_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which weights of this type are kept: float16 becomes float32."""
    kept = {
        torch.float32: torch.float32,
        torch.bfloat16: torch.bfloat16,
        torch.float16: torch.float32,
    }
    if dtype not in kept:
        raise TypeError(f"weights are float32, bfloat16 or float16, not {dtype}")
    return kept[dtype]


def depth(dtype: torch.dtype) -> int:
    """Neighbouring inputs that stand side by side."""
    return 4 // dtype.itemsize


def panels(n: int, gated: bool) -> int:
    return 2 * -(-n // (2 * PANEL)) if gated else -(-n // PANEL)


def packed_size(n: int, k: int, dtype: torch.dtype, gated: bool = False) -> int:
    """Numbers in a packed weight with its padding."""
    if gated and n % 2:
        raise ValueError(f"a weight of {n} outputs has no gate and up halves")
    return panels(n, gated) * PANEL * -(-k // depth(dtype)) * depth(dtype)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The same matrix of each expert, [n, k] all, for one call over rows grouped by expert.

    ``weights`` are all of one kind, and equal in everything but their numbers.
    """

    weights: tuple[Any, ...]
    table: _native.TensorList = field(repr=False)

    @property
    def n(self) -> int:
        return int(self.weights[0].n)

    @property
    def k(self) -> int:
        return int(self.weights[0].k)

    @property
    def gated(self) -> bool:
        return bool(self.weights[0].gated)


def stack_experts(weights: Sequence[Any]) -> ExpertWeights:
    """Gather the weights of experts, of any kind that `linear` takes, which stay where they are.

    Raises ValueError unless there is at least one and all are alike in shape, type and gate.
    """

    def facts(w: Any) -> tuple[Any, ...]:
        return type(w), w.data.dtype, *(getattr(w, f.name) for f in fields(w) if f.name != "data")

    if len({facts(w) for w in weights}) != 1:
        raise ValueError("the weights of experts must all have one shape and type")
    return ExpertWeights(tuple(weights), _native.TensorList([w.data for w in weights]))
