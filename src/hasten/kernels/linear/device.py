"""Weights of a linear layer in the order in which Triton kernels read them: output by output.

The CPU's panels are made for its vectors; on a device a tile wants the inputs of an output side by
side. `hasten.models.device` brings a loaded model's weights into this form, once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DeviceWeight:
    """A weight [n, k], or one for each of G groups, on a device.

    Attributes:
        data: what is multiplied, contiguous: float32 or bfloat16 [n, k] (or [G, n, k]); int8
            [n, k]; or the nibbles of 4-bit codes uint8 [n, ceil(k / (2 group)), group], where
            byte j of pair p holds input j of group 2 p in its low half and of group 2 p + 1 in
            its high half.
        scale: float32 [n] of int8, float16 [n, k / group] of 4 bits, else None.
        zero: uint8 [n, k / group] of asymmetric 4 bits, else None.
        group: inputs that share a scale; 0 unless 4 bits.
        gated: the first half of the outputs are gates, the second what they multiply.
    """

    data: Tensor
    n: int
    k: int
    scale: Tensor | None = None
    zero: Tensor | None = None
    group: int = 0
    gated: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def size(self) -> int:
        """Numbers in the weight, without padding."""
        groups = self.data.shape[0] if not self.group and self.data.dim() == 3 else 1
        return groups * self.n * self.k

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.data, self.scale, self.zero) if part is not None)


def pair_nibbles(codes: Tensor, group: int) -> Tensor:
    """Codes uint8 [n, k] in [0, 15] to `DeviceWeight`'s bytes [n, pairs, group]."""
    n, k = codes.shape
    parts = codes.new_zeros((n, -(-k // (2 * group)) * 2, group))
    parts[:, : k // group] = codes.view(n, -1, group)
    pairs = parts.view(n, -1, 2, group)
    return pairs[:, :, 0] | pairs[:, :, 1] << 4
