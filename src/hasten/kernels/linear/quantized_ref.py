"""Definition of linear layers on 8-bit and 4-bit weights in plain torch.

Integer sums are exact (they are made in float64, which holds every integer below 2^53), and each
operation on floats is one operation of torch on float32, so the kernels give these bits; a fused
multiply-add is the one exception: see `fma`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hasten.kernels.activation.ref import gated
from hasten.kernels.linear.packed import ExpertWeights
from hasten.kernels.linear.quantized import (
    PANEL,
    STRIP,
    Int4Weight,
    Int8Weight,
    Quantized,
    Rows,
    panels_of,
    stream_bytes,
)
from hasten.kernels.linear.ref import rows_of_experts, rows_of_table

LEAST = 2.0**-100
"""Activations whose largest magnitude is below this count as zeros: 127 / amax stays finite."""


def quantize(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Activations float32 [R, K] as codes int8 [R, K] and scales float32 [R, K / block].

    For each block of inputs ``scale = amax / 127`` and ``code = round(x * (127 / amax))``, halves
    to even, with ``amax = max |x|``. A block of zeros has scale 0; one with an infinity or NaN has
    scale NaN and codes 0, so that it shows in every output.
    """
    parts = x.reshape(len(x), x.shape[1] // block, block)
    amax = parts.abs().amax(-1)
    finite, some = amax.isfinite(), amax >= LEAST
    most = torch.full_like(amax, 127.0)  # 127.0 / amax would be two operations, and round twice
    inverse = torch.where(finite & some, most / amax, 0.0)
    codes = (torch.where(finite[..., None], parts, 0.0) * inverse[..., None]).round()
    scale = torch.where(some, amax / most, 0.0)
    scale = torch.where(finite, scale, float("nan"))
    return codes.to(torch.int8).reshape(x.shape), scale


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c rounded once, but for one case in about 2^29: the sum is rounded to float64 first.

    The product of two float32 is exact in float64.
    """
    return (a.double() * b.double() + c.double()).float()


def linear(
    x: Tensor,
    w: Quantized,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    y = _linear_int8(x, w) if isinstance(w, Int8Weight) else _linear_int4(x, w)
    if bias is not None:
        y = y + bias
    if add is not None:
        y = y + add
    return y if out is None else out.copy_(y)


def linear_gated(
    x: Tensor, w: Quantized, kind: str, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    y = gated(linear(x, w, bias), kind)
    return y if out is None else out.copy_(y)


def linear_experts(x: Tensor, w: ExpertWeights, offsets: Tensor, kind: str | None = None) -> Tensor:
    parts = zip(rows_of_experts(x, offsets, len(w.weights)), w.weights, strict=True)
    return torch.cat(
        [linear(part, e) if kind is None else linear_gated(part, e, kind) for part, e in parts]
    )


def _linear_int8(x: Tensor, w: Int8Weight) -> Tensor:
    """``float(sum of codes) * (scale of the row * scale of the output)``."""
    rows = unpack_codes(w)
    codes, scale = quantize(x, w.k)
    sums = codes.double() @ rows.codes.double().T
    return sums.float() * (scale * rows.scale)


def _linear_int4(x: Tensor, w: Int4Weight) -> Tensor:
    """A fold over groups ascending, from 0: ``y = fma(float(sum), row scale * scale, y)``, where
    sum is that of products of activation codes and ``code - zero``."""
    rows = unpack_codes(w)
    codes, scale = quantize(x, w.group)
    y = x.new_zeros((len(x), w.n))
    for g in range(w.k // w.group):
        inputs = slice(g * w.group, (g + 1) * w.group)
        zero = 8 if rows.zero is None else rows.zero[:, g, None].double()
        sums = codes[:, inputs].double() @ (rows.codes[:, inputs].double() - zero).T
        y = fma(sums.float(), scale[:, g, None] * rows.scale[:, g].float(), y)
    return y


def embed(ids: Tensor, w: Quantized) -> Tensor:
    return rows_of_table(unpack(w), ids)


def unpack(w: Quantized) -> Tensor:
    rows = unpack_codes(w)
    if isinstance(w, Int8Weight):
        return rows.codes.float() * rows.scale[:, None]
    zero = 8.0 if rows.zero is None else rows.zero.float()[..., None]
    parts = rows.codes.float().view(w.n, w.k // w.group, w.group)
    return ((parts - zero) * rows.scale.float()[..., None]).view(w.n, w.k)


def unpack_codes(w: Quantized) -> Rows:
    every = torch.arange(w.n)
    if isinstance(w, Int8Weight):
        codes = torch.empty((w.n, 4 * -(-w.k // 16), 4), dtype=torch.uint8)
        scale = torch.empty(w.n)
        for chosen, strip, panel, lane, (stored, scales) in _int8_places(w, every):
            codes[chosen] = stored[strip, panel, lane]
            scale[chosen] = scales[strip, panel, lane]
        return Rows((codes.view(w.n, -1)[:, : w.k] ^ 128).view(torch.int8).contiguous(), scale)
    groups = w.k // w.group
    halves = torch.empty((w.n, groups, w.group // 8, 4), dtype=torch.uint8)
    scale = torch.empty((w.n, groups), dtype=torch.float16)
    zero = torch.empty((w.n, groups), dtype=torch.uint8) if w.asymmetric else None
    for chosen, strip, panel, lane, (stored, scales, zeros) in _int4_places(w, every):
        halves[chosen] = stored[strip, panel, lane]
        scale[chosen] = scales[strip, panel, lane]
        if zero is not None:
            zero[chosen] = zeros[strip, panel, lane]
    codes = torch.stack([halves & 15, halves >> 4], -2).view(w.n, w.k)
    return Rows(codes, scale, zero)


def put(rows: Rows, w: Quantized, first: int) -> None:
    """Write rows ``first`` and following of a weight into its stream."""
    where = torch.arange(first, first + len(rows.codes))
    if isinstance(w, Int8Weight):
        codes = torch.zeros((len(where), 16 * -(-w.k // 16)), dtype=torch.uint8)
        codes[:, : w.k] = rows.codes.view(torch.uint8)
        quads = (codes ^ 128).view(len(where), codes.shape[1] // 4, 4)
        for chosen, strip, panel, lane, (stored, scales) in _int8_places(w, where):
            stored[strip, panel, lane] = quads[chosen]
            scales[strip, panel, lane] = rows.scale[chosen]
        return
    pairs = rows.codes.reshape(len(where), w.k // w.group, w.group // 8, 2, 4)
    halves = pairs[..., 0, :] | pairs[..., 1, :] << 4
    for chosen, strip, panel, lane, (stored, scales, zeros) in _int4_places(w, where):
        stored[strip, panel, lane] = halves[chosen]
        scales[strip, panel, lane] = rows.scale[chosen]
        if rows.zero is not None:
            zeros[strip, panel, lane] = rows.zero[chosen]


# For rows of a weight: which of them are in strips of one width, where they are (strip, panel in
# it, lane in that), and views of what those strips hold, indexed so.
Places = Iterator[tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]]


def _places(w: Quantized, where: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    panels, half = panels_of(w.n, w.gated), w.n // 2
    panel, lane = where // PANEL, where % PANEL
    if w.gated:
        value = where >= half
        within = where - half * value
        panel, lane = within // PANEL * 2 + value, within % PANEL
    whole = panels // STRIP
    panel_bytes = stream_bytes(w) // panels
    end = whole * STRIP * panel_bytes
    for begin, stop, width in ((0, whole, STRIP), (whole, whole + 1, panels % STRIP)):
        chosen = ((panel // STRIP >= begin) & (panel // STRIP < stop)).nonzero()[:, 0]
        if len(chosen):
            data = w.data[:end] if begin == 0 and whole else w.data[end:]
            data = data.view(-1, width * panel_bytes)
            yield chosen, panel[chosen] // STRIP - begin, panel[chosen] % STRIP, lane[chosen], data


def _int8_places(w: Int8Weight, where: Tensor) -> Places:
    for chosen, strip, panel, lane, data in _places(w, where):
        quads = 4 * -(-w.k // 16)
        outputs = data.shape[1] // (4 * quads + 4)
        end = quads * outputs * 4
        codes = data[:, :end].view(len(data), quads, -1, PANEL, 4).permute(0, 2, 3, 1, 4)
        scales = data[:, end:].view(torch.float32).view(len(data), -1, PANEL)
        yield chosen, strip, panel, lane, (codes, scales)


def _int4_places(w: Int4Weight, where: Tensor) -> Places:
    groups, each = w.k // w.group, w.group // 2 + 2 + w.asymmetric
    for chosen, strip, panel, lane, data in _places(w, where):
        parts = data.view(len(data), groups, -1)
        outputs = parts.shape[2] // each
        end = outputs * w.group // 2
        codes = parts[..., :end].view(len(data), groups, w.group // 8, -1, PANEL, 4)
        scales = parts[..., end : end + 2 * outputs].view(torch.float16)
        zeros = parts[..., end + 2 * outputs :]
        yield (
            chosen,
            strip,
            panel,
            lane,
            (
                codes.permute(0, 3, 4, 1, 2, 5),
                scales.view(len(data), groups, -1, PANEL).permute(0, 2, 3, 1),
                zeros.view(len(data), groups, -1, PANEL).permute(0, 2, 3, 1)
                if w.asymmetric
                else zeros,
            ),
        )
