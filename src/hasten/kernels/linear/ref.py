"""Definition of the linear layer in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.linear.packed import PANEL, PackedWeight, packed_dtype


def pack(weight: Tensor, data: Tensor | None = None) -> PackedWeight:
    n, k = weight.shape
    panels = -(-n // PANEL)
    padded = weight.new_zeros((panels * PANEL, k), dtype=packed_dtype(weight.dtype))
    padded[:n] = weight
    packed = padded.view(panels, PANEL, k).transpose(1, 2)
    return PackedWeight(packed.contiguous() if data is None else data.copy_(packed), n, k)


def unpack(w: PackedWeight) -> Tensor:
    return w.data.transpose(1, 2).reshape(-1, w.k)[: w.n].contiguous()


def linear(
    x: Tensor, w: PackedWeight, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    y = x @ unpack(w).to(x.dtype).T
    if bias is not None:
        y = y + bias
    return y if out is None else out.copy_(y)


def linear_in_order(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """The kernel's order of operations, one k at a time, to about the last bit.

    A product of float32 is exact in float64; what is left is that adding rounds twice, first to
    float64 and then to float32, where a fused multiply-add rounds once.
    """
    weight = unpack(w).double()
    acc = torch.zeros(x.shape[0], w.n, dtype=torch.float32)
    for k in range(w.k):
        acc = (x[:, k, None].double() * weight[None, :, k] + acc.double()).float()
    return acc if bias is None else acc + bias


def linear_grouped(x: Tensor, w: PackedWeight, out: Tensor | None = None) -> Tensor:
    parts = [PackedWeight(data, w.n, w.k) for data in w.data]
    y = torch.stack([linear(x[:, g], part) for g, part in enumerate(parts)], 1)
    return y if out is None else out.copy_(y)
