"""Weights of a linear layer as the blocks of a GGUF file, in the order in which kernels read them.

A weight is one stream of as many bytes as the blocks have. Outputs are padded to *strips* of 64,
four panels of 16. A strip is a row of *spans* of 256 inputs (the last may be shorter where blocks
have 32 values); a span of B groups of 32 inputs holds

- headers [4 panels], what scales the codes, [..][16 outputs]: for Q8_0 and Q4_0 d as float16
  [B][16]; for Q4_K d and dmin as float16 [16] each and the block's twelve bytes of scales [12][16];
  for Q6_K d as float16 [16] and the block's scales as int8 [16][16];
- codes [B][4 panels], where a line is [16 outputs][4 inputs] and step s has inputs 4 s to 4 s + 3:
  for Q8_0 code + 128, lines of steps 0 to 7; for Q4_0 and Q4_K lines t = 0 to 3 with step 2 t in
  low halves and 2 t + 1 in high ones; for Q6_K the same with the lower 4 bits, then lines u = 0, 1
  with the upper 2 bits of steps 4 u to 4 u + 3, the lowest first.

Codes are stored unsigned since the instructions that multiply bytes take one unsigned operand.
Source of the blocks: ggml-common.h and ggml-quants.c of ggml.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hasten.kernels.linear.packed import PANEL, panels
from hasten.kernels.memory import weight_memory

STRIP = 64
"""Outputs in a strip."""
SPAN = 256
"""Inputs in a span."""


class BlockKind(NamedTuple):
    """A type of blocks: ``values`` values in ``bytes`` bytes; ``zero`` is subtracted from an
    unsigned code."""

    values: int
    bytes: int
    zero: int


BLOCK_KINDS = {
    "Q8_0": BlockKind(32, 34, 128),
    "Q4_0": BlockKind(32, 18, 8),
    "Q4_K": BlockKind(256, 144, 0),
    "Q6_K": BlockKind(256, 210, 32),
}
"""Types of blocks that the kernels multiply by, by their names in ggml."""


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """A weight [n, k] of blocks of one type.

    ``data`` is uint8, the stream that the module describes; ``kind`` names the type
    (`BLOCK_KINDS`). With ``gated`` the first half of the outputs are gates and the others what they
    multiply, n = 2 F, and the panels of both alternate, starting with a gate's; each half is padded
    to whole panels.
    """

    data: Tensor
    n: int
    k: int
    kind: str
    gated: bool = False

    @property
    def name(self) -> str:
        """How the weight is kept, for tables and messages."""
        return self.kind

    @property
    def size(self) -> int:
        """Numbers in the weight, without padding."""
        return self.n * self.k

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def row_bytes(kind: str, k: int) -> int:
    """Bytes of a row of k values in the file. Raises ValueError if they are no whole blocks."""
    if kind not in BLOCK_KINDS:
        raise ValueError(f"kind is {kind}, not one of {', '.join(BLOCK_KINDS)}")
    values, nbytes, _ = BLOCK_KINDS[kind]
    if k < 1 or k % values:
        raise ValueError(f"{k} inputs are no whole number of {kind} blocks of {values}")
    return k // values * nbytes


def empty_blocks(kind: str, n: int, k: int, *, gated: bool = False) -> BlockWeight:
    """A weight whose rows are still to be put in."""
    if gated and n % 2:
        raise ValueError(f"{n} outputs are not gates and as many values")
    strips = -(-panels(n, gated) * PANEL // STRIP)
    data = weight_memory((strips * STRIP * row_bytes(kind, k),), torch.uint8)
    return BlockWeight(data, n, k, kind, gated)


def check_block_rows(rows: Tensor, w: BlockWeight) -> None:
    """Raise TypeError or ValueError unless these are rows of such a weight, as in a file."""
    if rows.dtype != torch.uint8:
        raise TypeError(f"rows of blocks are torch.uint8, not {rows.dtype}")
    expected = row_bytes(w.kind, w.k)
    if rows.dim() != 2 or rows.shape[1] != expected:
        raise ValueError(
            f"rows of {w.k} values in {w.kind} blocks have shape [*, {expected}], "
            f"not {list(rows.shape)}"
        )
