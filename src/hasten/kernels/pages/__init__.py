"""Moves inside the page tensors of a layer group: copy-on-write and commit of a path."""

from __future__ import annotations

from torch import Tensor

from hasten.kernels.dispatch import operation


def copy_pages(k: Tensor, v: Tensor, src: Tensor, dst: Tensor, *, impl: str | None = None) -> None:
    """Copy whole pages over all layers, ``src[i]`` to ``dst[i]`` in the given order.

    ``k`` is [L, N, Hg, D, 16], ``v`` [L, N, Hg, 16, Dp] (Dp may be 0), float32, bfloat16 or int8
    (with rows for scales, see :func:`hasten.kernels.attention.paged_attention`); ``src`` and
    ``dst`` are int64 [n]. Raises ValueError for page ids outside of [0, N), before anything is
    written.
    """
    operation(__name__, "copy_pages", impl, k)(k, v, src, dst)


def move_slots(
    k: Tensor,
    v: Tensor,
    table: Tensor,
    table_row: Tensor,
    src_slot: Tensor,
    dst_slot: Tensor,
    *,
    impl: str | None = None,
) -> None:
    """Copy keys and values from slot to slot, over all layers and head groups.

    This commits an accepted path of a token tree: moves are made in the given order, so moves of
    one sequence whose destinations ascend and never pass their sources need no buffer.

    ``k`` and ``v`` as in :func:`copy_pages`; ``table`` int32 [T, G, B]; ``table_row``,
    ``src_slot`` and ``dst_slot`` int32 [m]. Raises ValueError for slots beyond the table or in
    blocks without a page, before anything is written.
    """
    run = operation(__name__, "move_slots", impl, k)
    run(k, v, table, table_row, src_slot, dst_slot)
