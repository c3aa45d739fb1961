"""Definition of linear layers on blocks of GGUF files in plain torch.

Integer sums are exact (they are made in float64, which holds every integer below 2^53), and each
operation on floats is one operation of torch on float32, so the kernels give these bits; a fused
multiply-add is the one exception: see `quantized_ref.fma`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.kernels.activation.ref import gated
from hasten.kernels.linear.blocks import BLOCK_KINDS, SPAN, STRIP, BlockWeight, row_bytes
from hasten.kernels.linear.packed import PANEL, ExpertWeights
from hasten.kernels.linear.quantized_ref import fma, quantize
from hasten.kernels.linear.ref import rows_in_order, rows_of_experts, rows_of_table


@dataclass
class Fields:
    """What rows of blocks say: ``value = scale * code - minimum`` for each group of inputs.

    Attributes:
        codes: float32 [rows, K], whole numbers, the zero subtracted.
        scale: float32 [rows, K / 32], or [rows, K / 16] for Q6_K.
        minimum: float32 [rows, K / 32] for Q4_K, else None.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None


def linear(
    x: Tensor,
    w: BlockWeight,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """A fold over groups of inputs ascending, from 0.

    ``y = fma(float(sum), row scale * scale, y)``, where sum is that of products of activation
    codes and weight codes, and the row scale is that of the 32 inputs around the group; for Q4_K
    then ``y = fma(row scale * float(sum of activation codes), -minimum, y)``. Then the bias, then
    ``add``.
    """
    fields = read(rows_of(w), w.kind)
    codes, row_scale = quantize(x, 32)
    groups = fields.scale.shape[1]
    size = w.k // groups
    y = x.new_zeros((len(x), w.n))
    for g in range(groups):
        inputs = slice(g * size, (g + 1) * size)
        of_row = row_scale[:, g * size // 32, None]
        some = codes[:, inputs].double()
        sums = some @ fields.codes[:, inputs].double().T
        y = fma(sums.float(), of_row * fields.scale[:, g], y)
        if fields.minimum is not None:
            total = some.sum(1, keepdim=True).float()
            y = fma(of_row * total, -fields.minimum[:, g], y)
    if bias is not None:
        y = y + bias
    if add is not None:
        y = y + add
    return y if out is None else out.copy_(y)


def linear_gated(
    x: Tensor, w: BlockWeight, kind: str, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    y = gated(linear(x, w, bias), kind)
    return y if out is None else out.copy_(y)


def linear_experts(x: Tensor, w: ExpertWeights, offsets: Tensor, kind: str | None = None) -> Tensor:
    parts = zip(rows_of_experts(x, offsets, len(w.weights)), w.weights, strict=True)
    return torch.cat(
        [linear(part, e) if kind is None else linear_gated(part, e, kind) for part, e in parts]
    )


def unpack(w: BlockWeight) -> Tensor:
    fields = read(rows_of(w), w.kind)
    groups = fields.scale.shape[1]
    values = fields.scale[..., None] * fields.codes.view(w.n, groups, -1)
    if fields.minimum is not None:
        values = values - fields.minimum[..., None]
    return values.reshape(w.n, w.k)


def embed(ids: Tensor, w: BlockWeight) -> Tensor:
    return rows_of_table(unpack(w), ids)


def read(rows: Tensor, kind: str) -> Fields:
    """Rows of blocks as in a file, uint8 [N, bytes], as numbers."""
    values, nbytes, zero = BLOCK_KINDS[kind]
    blocks = rows.reshape(-1, nbytes)
    codes = (_codes(blocks, kind).float() - zero).view(len(rows), -1)
    if values == 32:
        return Fields(codes, _half(blocks, 0).view(len(rows), -1))
    if kind == "Q6_K":
        scale = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
        return Fields(codes, scale.view(len(rows), -1))
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], 1)
    minimum = torch.cat([middle & 63, (high >> 4) | ((middle >> 2) & 48)], 1)
    return Fields(
        codes,
        (_half(blocks, 0) * scale.float()).view(len(rows), -1),
        (_half(blocks, 2) * minimum.float()).view(len(rows), -1),
    )


def _half(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _codes(blocks: Tensor, kind: str) -> Tensor:
    """Unsigned codes [blocks, values] in the order of inputs."""
    count = len(blocks)
    if kind == "Q8_0":
        return blocks[:, 2:] ^ 128
    if kind == "Q6_K":
        low = _halves(blocks[:, :128], 64)
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 1, 4, 1)
        high = (blocks[:, 128:192].reshape(count, 2, 1, 32) >> shifts) & 3
        return low | high.reshape(count, 256) << 4
    return _halves(blocks[:, 2:], 16) if kind == "Q4_0" else _halves(blocks[:, 16:], 32)


def _halves(packed: Tensor, width: int) -> Tensor:
    """4-bit fields: of each ``width`` bytes first all low halves, then all high halves."""
    groups = packed.reshape(len(packed), -1, width)
    return torch.cat([groups & 15, groups >> 4], 2).view(len(packed), -1)


def _without_codes(blocks: Tensor, kind: str) -> Tensor:
    """A block's bytes that are not codes, in the order of the stream's header."""
    if kind == "Q6_K":
        return torch.cat([blocks[:, 208:210], blocks[:, 192:208]], 1)
    return blocks[:, : {"Q4_K": 16}.get(kind, 2)]


def put(rows: Tensor, w: BlockWeight, first: int) -> None:
    """Write rows ``first`` and following, as in a file, into the stream of a weight."""
    every = _padded_rows(w)
    every[_places(w)[first : first + len(rows)]] = rows
    values, nbytes, _ = BLOCK_KINDS[w.kind]
    for inputs, stream in _spans(w):
        span = every[:, inputs.start // values * nbytes : inputs.stop // values * nbytes]
        stream.copy_(_to_stream(span, w.kind))


def rows_of(w: BlockWeight) -> Tensor:
    """The rows of a weight as they are in a file, uint8 [N, bytes]."""
    return _padded_rows(w)[_places(w)]


def _places(w: BlockWeight) -> Tensor:
    """Where among the padded outputs each output stands, int64 [N]."""
    order = rows_in_order(w.n, w.gated)
    places = torch.zeros(w.n + 1, dtype=torch.int64)
    places[order] = torch.arange(len(order))
    return places[: w.n]


def _padded_rows(w: BlockWeight) -> Tensor:
    return torch.cat([_from_stream(stream, w.kind) for _, stream in _spans(w)], 1)


def _spans(w: BlockWeight) -> Iterator[tuple[slice, Tensor]]:
    """Inputs of each span, and what it is in the stream, uint8 [strips, bytes]."""
    row = row_bytes(w.kind, w.k)
    strips = w.data.view(-1, STRIP * row)
    for begin in range(0, w.k, SPAN):
        end = min(begin + SPAN, w.k)
        at = STRIP * row_bytes(w.kind, begin) if begin else 0
        yield slice(begin, end), strips[:, at : at + STRIP * row_bytes(w.kind, end - begin)]


def _to_stream(rows: Tensor, kind: str) -> Tensor:
    """Rows of a span, uint8 [strips * 64, bytes], in the order of the stream [strips, bytes]."""
    values, nbytes, _ = BLOCK_KINDS[kind]
    strips = len(rows) // STRIP
    blocks = rows.reshape(-1, nbytes)
    head = _without_codes(blocks, kind).reshape(strips, 4, PANEL, -1)
    wide = 2 if values == 32 else 4 if kind == "Q4_K" else 2  # bytes of float16 numbers
    if values == 32:
        halves, rest = head, head[..., :0]
    else:
        halves, rest = head[..., :wide], head[..., wide:]
    halves = halves.view(strips, 4, PANEL, -1, 2).transpose(2, 3).reshape(strips, 4, -1)
    rest = rest.transpose(2, 3).reshape(strips, 4, -1)
    head = torch.cat([halves, rest], 2).view(strips, -1)
    # [strips, panel, lane, sub, step, 4] to [strips, sub, panel, step, lane, 4]
    codes = _codes(blocks, kind).reshape(strips, 4, PANEL, -1, 8, 4).permute(0, 3, 1, 4, 2, 5)
    if kind != "Q8_0":
        lines = codes[..., 0::2, :, :] & 15 | (codes[..., 1::2, :, :] & 15) << 4
        if kind == "Q6_K":
            shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1, 1)
            fours = (codes >> 4).unflatten(3, (2, 4)) << shifts
            lines = torch.cat([lines, fours.sum(4, dtype=torch.uint8)], 3)
        codes = lines
    return torch.cat([head, codes.reshape(strips, -1)], 1)


def _from_stream(stream: Tensor, kind: str) -> Tensor:
    """The inverse of `_to_stream`."""
    values, nbytes, _ = BLOCK_KINDS[kind]
    strips = len(stream)
    blocks = stream.shape[1] // STRIP // nbytes  # of a row
    subs = blocks * values // 32
    size = {"Q8_0": 2, "Q4_0": 2, "Q4_K": 16, "Q6_K": 18}[kind] * STRIP * blocks
    head = stream[:, :size].reshape(strips, 4, -1)
    count = {"Q8_0": subs, "Q4_0": subs, "Q4_K": 2, "Q6_K": 1}[kind]  # of float16 numbers
    halves = head[..., : count * 2 * PANEL].reshape(strips, 4, count, PANEL, 2).transpose(2, 3)
    rest = head[..., count * 2 * PANEL :].reshape(strips, 4, -1, PANEL).transpose(2, 3)
    lines = stream[:, size:].reshape(strips, subs, 4, -1, PANEL, 4)
    if kind == "Q8_0":
        codes = lines
    else:
        codes = torch.stack([lines[:, :, :, :4] & 15, lines[:, :, :, :4] >> 4], 4).flatten(3, 4)
        if kind == "Q6_K":
            shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1, 1)
            codes = codes | ((lines[:, :, :, 4:, None] >> shifts & 3) << 4).flatten(3, 4)
    codes = codes.permute(0, 2, 4, 1, 3, 5).reshape(strips * STRIP * blocks, values)
    halves = halves.reshape(strips * STRIP * blocks, -1)
    rest = rest.reshape(strips * STRIP * blocks, -1)
    return _block(halves, rest, codes, kind).view(strips * STRIP, -1)


def _block(halves: Tensor, rest: Tensor, codes: Tensor, kind: str) -> Tensor:
    """Blocks as in a file, uint8 [n, bytes], of what the stream has apart."""
    if kind == "Q8_0":
        return torch.cat([halves, codes ^ 128], 1)
    if kind == "Q6_K":
        halved = (codes & 15).view(-1, 2, 2, 64)
        low = (halved[:, :, 0] | halved[:, :, 1] << 4).flatten(1)
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1)
        high = ((codes >> 4).view(-1, 2, 4, 32) << shifts).sum(2, dtype=torch.uint8).flatten(1)
        return torch.cat([low, high, rest, halves], 1)
    width = 16 if kind == "Q4_0" else 32
    pairs = codes.view(len(codes), -1, 2, width)
    return torch.cat([halves, rest, (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)], 1)
