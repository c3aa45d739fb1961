"""Definition of the activations in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def gated(x: Tensor, kind: str) -> Tensor:
    gate, up = x.chunk(2, -1)
    if kind == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh") * up


def softcap(x: Tensor, cap: float) -> Tensor:
    if cap <= 0:
        raise ValueError("the cap must be positive")
    return cap * torch.tanh(x / cap)
