"""From blocks to numbers: the tensor types of GGUF as float32.

A row is stored as blocks of 32 or 256 values that share scales. Each function below takes blocks
uint8 [n, bytes] and returns values float32 [n, values], in the order of operations of ggml, so
that the results are the same bit for bit (source of the layouts: ggml-common.h, ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hasten.models.gguf.file import Kind

CHUNK_VALUES = 1 << 18
"""Values expanded at a time: bounds what is held beside the result."""


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte ``at`` of each block, as float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, width: int) -> Tensor:
    """Bytes [n, k * width] to 4-bit values [n, k, 2 * width]: of each ``width`` bytes first all
    low halves, then all high halves."""
    groups = packed.view(len(packed), -1, width)
    return torch.cat([groups & 15, groups >> 4], 2)


def _bits(packed: Tensor, width: int, size: int) -> Tensor:
    """Bytes [n, k * width] to fields of ``size`` bits [n, k, 8 / size, width], the lowest first."""
    shifts = torch.arange(0, 8, size, dtype=torch.uint8).view(1, 1, -1, 1)
    return (packed.view(len(packed), -1, 1, width) >> shifts) & ((1 << size) - 1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """32 bits from byte ``at``, one for each of 32 values, moved to bit 4: uint8 [n, 32]."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (((blocks[:, at : at + 4, None] >> shifts) & 1) << 4).reshape(len(blocks), 32)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:], 16).flatten(1).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:], 16).flatten(1).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, 6:], 16).flatten(1) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (values.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, 8:], 16).flatten(1) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * values.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: two float16, then eight scales and eight minima of 6 bits in 12 bytes."""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], 1)
    minima = torch.cat([middle & 63, (high >> 4) | ((middle >> 2) & 48)], 1)
    return (
        (_half(blocks, 0) * scales.float())[:, :, None],
        (_half(blocks, 2) * minima.float())[:, :, None],
    )


def _q4_k(blocks: Tensor) -> Tensor:
    scale, minimum = _scales_and_minima(blocks)
    values = _nibbles(blocks[:, 16:], 32).view(-1, 8, 32)
    return (scale * values.float() - minimum).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scale, minimum = _scales_and_minima(blocks)
    fifth = _bits(blocks[:, 16:48], 32, 1).view(-1, 8, 32)
    values = _nibbles(blocks[:, 48:], 32).view(-1, 8, 32) | (fifth << 4)
    return (scale * values.float() - minimum).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128], 64).view(-1, 8, 32)
    high = _bits(blocks[:, 128:192], 32, 2).view(-1, 8, 32)
    scale = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    values = (low | (high << 4)).float() - 32
    return (scale[:, :, None] * values.view(-1, 16, 16)).flatten(1)


EXPAND: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""Types of four bits and more. A type of two or three bits would grow more than fourfold here."""

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
READABLE = (*PLAIN, *EXPAND)


def expand(kind: Kind, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of blocks uint8 [..., bytes] to values [..., values] of ``dtype``.

    Plain types come back as a view in the type that they are stored in. Of the others no more
    than `CHUNK_VALUES` are held as float32 at a time.
    """
    if kind.name in PLAIN:
        return rows.view(PLAIN[kind.name])
    shape = (*rows.shape[:-1], rows.shape[-1] // kind.bytes * kind.values)
    blocks = rows.reshape(-1, kind.bytes)
    out = torch.empty(len(blocks), kind.values, dtype=dtype)
    step = CHUNK_VALUES // kind.values
    for start in range(0, len(blocks), step):
        out[start : start + step] = EXPAND[kind.name](blocks[start : start + step])
    return out.view(shape)
