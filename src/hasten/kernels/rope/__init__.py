"""Rotary positions, fused with writing keys and values to their pages."""

from __future__ import annotations

from torch import Tensor

from hasten.kernels.dispatch import operation


def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    table_row: Tensor,
    table: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rotate_keys: bool = True,
    *,
    impl: str | None = None,
) -> None:
    """Rotate ``q`` in place and write the rotated ``k`` (or ``k`` itself) and ``v`` to their pages.

    The rotation is that of Llama in the Hugging Face layout: the first half of the rotated
    dimensions is paired with the second. With ``rot = 2 * cos.shape[1] < D`` the dimensions from
    ``rot`` on pass through.

    In int8 pages every key and every value of a KV head is quantized alone: with amax its largest
    magnitude, code = round(x * (127 / amax)), halves to even, and scale = amax / 127, all in
    float32. Below 2^-100 codes and scale are 0; with an infinity or a NaN the scale is NaN.

    Args:
        q: float32 [R, Hq, D], changed in place; rows may be strided (as in all of q, k, v).
        k: float32 [R, Hkv, D], only read.
        v: float32 [R, Hkv, Dv], only read. Dv = 0, here and in ``v_pages``, where the values are
            dimensions of the keys and nothing else is to be stored.
        cos, sin: float32 [max position, rot / 2].
        positions: int32 [R], rows of cos and sin.
        slots: int32 [R], where the row goes: page ``table[table_row, group, slot // 16]``, offset
            ``slot % 16``. No two rows of one sequence may share a slot.
        table_row: int32 [R].
        table: int32 [T, G, B], page ids for each of G head groups.
        k_pages: [N, Hkv / G, D, 16], float32, bfloat16 (rounded to nearest even) or int8 with
            further rows for the scales (see :func:`hasten.kernels.attention.paged_attention`).
        v_pages: [N, Hkv / G, 16, Dp], of the same type, Dp = Dv rounded up to a multiple of 16.
        rotate_keys: False stores keys before the rotation.

    Raises TypeError or ValueError for other types, shapes, positions beyond cos, slots beyond the
    table and missing pages, before anything is written.
    """
    args = q, k, v, cos, sin, positions, slots, table_row, table, k_pages, v_pages, rotate_keys
    operation(__name__, "append", impl, q)(*args)
