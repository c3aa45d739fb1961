"""Embedding in Triton: one program a row. An id without a row gives NaN: a device cannot raise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.linear.device import DeviceWeight


@triton.jit
def _embed(
    ids, w, scale, zero, out, n, k, group,
    kind: tl.constexpr, asymmetric: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.load(ids + row).to(tl.int64)
    at = part * block + tl.arange(0, block)
    known = (token >= 0) & (token < n)
    keep = (at < k) & known
    if kind == "int4":
        g = at // group
        groups = k // group
        pairs = (groups + 1) // 2
        both = tl.load(w + (token * pairs + g // 2) * group + at % group, keep, 0).to(tl.int32)
        code = tl.where(g % 2 == 0, both & 15, both >> 4).to(tl.float32)
        if asymmetric:
            code -= tl.load(zero + token * groups + g, keep, 0).to(tl.float32)
        else:
            code -= 8.0
        v = code * tl.load(scale + token * groups + g, keep, 0.0).to(tl.float32)
    else:
        v = tl.load(w + token * k + at, keep, 0).to(tl.float32)
        if kind == "int8":
            v *= tl.load(scale + token, known, 0.0)
    tl.store(out + row * k + at, tl.where(known, v, float("nan")), at < k)


def embed(ids: Tensor, w: DeviceWeight) -> Tensor:
    out = torch.empty((ids.shape[0], w.k), device=ids.device)
    if len(ids):
        kind = "int4" if w.group else "float" if w.scale is None else "int8"
        scale = out if w.scale is None else w.scale
        zero = out if w.zero is None else w.zero
        block = 1024
        _embed[len(ids), triton.cdiv(w.k, block)](
            ids, w.data, scale, zero, out, w.n, w.k, w.group or 1, kind, w.zero is not None, block
        )
    return out
