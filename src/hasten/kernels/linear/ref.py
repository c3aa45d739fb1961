"""Definition of the linear layer in plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hasten.kernels.activation import ref as activation
from hasten.kernels.linear.packed import GROUP, PANEL, ExpertWeights, PackedWeight, depth, panels


def rows_in_order(n: int, gated: bool) -> Tensor:
    """Which output each place of the panels holds, int64 [panels * 16], n for none."""
    half = n // 2 if gated else n
    order = torch.arange(-(-half // PANEL) * PANEL).view(-1, PANEL)
    order = torch.where(order < half, order, -1)
    if gated:
        order = torch.stack([order, torch.where(order < 0, -1, order + half)], 1)
    return torch.where(order < 0, n, order).flatten()


def pack(rows: Tensor, first: int, n: int, gated: bool, data: Tensor) -> None:
    weight = torch.zeros((n + 1, rows.shape[1]), dtype=data.dtype)
    weight[:n] = unpack(PackedWeight(data, n, rows.shape[1], gated))
    weight[first : first + len(rows)] = rows
    at = 0
    for group in weight[rows_in_order(n, gated)].split(GROUP * PANEL):
        count, d = len(group) // PANEL, depth(data.dtype)
        group = torch.nn.functional.pad(group, (0, -group.shape[1] % d))
        stream = group.view(count, PANEL, -1, d).permute(2, 0, 1, 3).flatten()
        data[at : at + len(stream)] = stream
        at += len(stream)


def unpack(w: PackedWeight) -> Tensor:
    d = depth(w.dtype)
    steps = -(-w.k // d)
    weight = w.data.new_empty((w.n + 1, w.k))
    order = rows_in_order(w.n, w.gated).split(GROUP * PANEL)
    for rows, stream in zip(order, w.data.split(GROUP * PANEL * steps * d), strict=True):
        group = stream.view(steps, -1, PANEL, d).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
        weight[rows] = group[:, : w.k]
    assert len(order) * GROUP >= panels(w.n, w.gated)
    return weight[: w.n].contiguous()


def linear(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    y = x @ unpack(w).to(x.dtype).T
    if bias is not None:
        y = y + bias
    if add is not None:
        y = y + add
    return y if out is None else out.copy_(y)


def linear_gated(
    x: Tensor, w: PackedWeight, kind: str, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    y = activation.gated(linear(x, w, bias), kind)
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


def linear_experts(x: Tensor, w: ExpertWeights, offsets: Tensor, kind: str | None = None) -> Tensor:
    parts = zip(rows_of_experts(x, offsets, len(w.weights)), w.weights, strict=True)
    return torch.cat(
        [linear(part, e) if kind is None else linear_gated(part, e, kind) for part, e in parts]
    )


def rows_of_experts(x: Tensor, offsets: Tensor, count: int) -> list[Tensor]:
    """The rows of each of ``count`` experts: those from ``offsets[e]`` to ``offsets[e + 1]``."""
    bounds = offsets.tolist()
    if len(bounds) != count + 1 or bounds != sorted(bounds) or bounds[0] or bounds[-1] != len(x):
        raise ValueError(f"offsets {bounds} do not divide {len(x)} rows among {count}")
    return [x[begin:end] for begin, end in pairwise(bounds)]


def rows_of_table(table: Tensor, ids: Tensor) -> Tensor:
    """Rows ``ids`` int64 of a table [N, K]. Raises IndexError for one that it lacks."""
    for i, row in enumerate(ids.tolist()):
        if not 0 <= row < len(table):
            raise IndexError(f"ids[{i}] is {row}, but the table has {len(table)} rows")
    return table[ids]
