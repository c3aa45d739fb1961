"""Weights of several kinds whose outputs stand one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StackedWeight:
    """A weight [n, k] whose rows are those of ``parts``, of any kind that `linear` takes.

    A file may store query and key in one type and value in another; each part is computed by its
    own kernel into its own columns, so the bits are those of the parts.
    """

    parts: tuple[Any, ...]

    @property
    def n(self) -> int:
        return sum(part.n for part in self.parts)

    @property
    def k(self) -> int:
        return int(self.parts[0].k)

    @property
    def gated(self) -> bool:
        return False

    @property
    def name(self) -> str:
        """How the weight is kept, for tables and messages."""
        return "+".join(part.name for part in self.parts)

    @property
    def data(self) -> Tensor:
        """Of the first part; which device the weight is on."""
        data: Tensor = self.parts[0].data
        return data

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class StackedOperations:
    """What a family of kernels offers, for stacked weights; ``family`` finds that of a part."""

    def __init__(self, family: Callable[[Any], Any]) -> None:
        self.family = family

    def linear(
        self,
        x: Tensor,
        w: StackedWeight,
        bias: Tensor | None = None,
        out: Tensor | None = None,
        add: Tensor | None = None,
    ) -> Tensor:
        out = x.new_empty((x.shape[0], w.n)) if out is None else out
        end = 0
        for part in w.parts:
            begin, end = end, end + part.n
            self.family(part).linear(
                x,
                part,
                None if bias is None else bias[begin:end],
                out[:, begin:end],
                None if add is None else add[:, begin:end],
            )
        return out

    def unpack(self, w: StackedWeight) -> Tensor:
        return torch.cat([self.family(part).unpack(part).float() for part in w.parts])
