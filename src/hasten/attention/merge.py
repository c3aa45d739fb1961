"""The merge of partial attentions over disjoint sets of keys.

Attention over a set of keys is summed up by ``(out, lse)``: the normalized output and the natural
log of the sum of exponentiated scores. Two such pairs over disjoint keys give the pair of the
union, so attention may be split at will: shared prefixes, tree nodes, compressed pages, other
devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Combine partial attentions over pairwise disjoint keys.

    Args:
        parts: at least one ``(out, lse)``, ``out`` [..., D] and ``lse`` [...] of one shape. A part
            without visible keys has lse = -inf, and whatever its ``out`` holds is ignored. A
            learned sink is a part with out = 0 and lse = its logit.

    Returns:
        The pair of the union of the keys; 0 and -inf where no part has any. In real arithmetic it
        equals attention over all keys at once and does not depend on the order of the parts; the
        floating-point sum runs in the order given.

    A key that is in two parts counts twice: that the parts are disjoint is the caller's to prove.

    >>> merge([(torch.tensor([1.0]), torch.tensor(0.0)), (torch.tensor([3.0]), torch.tensor(0.0))])
    (tensor([2.]), tensor(0.6931))
    """
    if not parts:
        raise ValueError("a merge needs at least one part")
    shape = parts[0][1].shape
    for out, lse in parts:
        if lse.shape != shape or out.shape[:-1] != shape or out.shape[-1] != parts[0][0].shape[-1]:
            raise ValueError(
                f"parts differ in shape: out {tuple(out.shape)} with lse {tuple(lse.shape)}, "
                f"not {tuple(parts[0][0].shape)} with {tuple(shape)}"
            )
    top = torch.stack([lse for _, lse in parts]).amax(0)
    empty = top == -math.inf
    shift = torch.where(empty, 0.0, top)  # -inf - -inf would be NaN
    total = torch.zeros_like(shift)
    merged = torch.zeros_like(parts[0][0])
    for out, lse in parts:
        weight = torch.exp(lse - shift)
        total = total + weight
        counts = (weight > 0)[..., None]
        merged = merged + torch.where(counts, out * weight[..., None], 0.0)
    merged = torch.where(empty[..., None], 0.0, merged / total[..., None])
    return merged, shift + torch.log(total)
