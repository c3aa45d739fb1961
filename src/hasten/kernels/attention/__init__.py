"""Attention of ragged rows over paged keys and values."""

from __future__ import annotations

from torch import Tensor

from hasten.kernels.dispatch import operation


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    table_row: Tensor,
    positions: Tensor,
    base: Tensor,
    mask: Tensor,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    return_lse: bool = False,
    value_dim: int | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    *,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every row over the keys that it sees.

    Row ``r`` sees the slots below ``base[r]``, whose position is the slot, and the slots
    ``base[r] + j`` for the set bits ``j`` of ``mask[r]``. In ascending order those are a path of
    consecutive positions that ends at ``positions[r]`` and begins at or after the base. With a
    window, of these only keys at positions above ``positions[r] - window`` or below ``sinks``.
    Pages in which a row sees nothing are not touched and may be missing from its table.

    **The fixed chunk rule.** Chunk c holds the positions [64c, 64c + 64). Inside a chunk:
    score = scale * (fused multiply-adds of q[d] k[d] over d ascending), then
    ``softcap * tanh(score / softcap)``; m_c = max; p = exp(score - m_c), 0 where invisible;
    l_c = sum of p over the 64 lanes by a fixed tree; o_c = fused multiply-adds of p v over the
    visible positions ascending. Chunks are folded in ascending order into (m, l, o); the result is
    o / l. Everything is indexed by position, not by slot, so a key read as a tree node gives the
    bits of the same key read as a committed one, and any thread may compute any chunk.

    Of int8 pages k and v above are the codes; the sum of a score is multiplied by the key's scale
    before anything else, and p by the value's scale in o_c (not in l_c).

    With ``rope`` the pages hold keys (or their codes) before the rotation, and k above is the
    rotation of :func:`hasten.kernels.rope.append` by the angle of the key's position. Of float32
    pages the output then has the bits of keys stored after the rotation.

    Args:
        q: float32 [R, Hq, D]; rows may be strided. Query head i uses KV head i // (Hq / Hkv).
        k_pages: float32, bfloat16 or int8 [N, Hkv / G, D, 16]. With int8, 4 further rows hold the
            bytes of 16 float32: the scales of the page's keys; and 4 more those of its values
            where values have pages of their own.
        v_pages: [N, Hkv / G, 16, Dp], of the same type, Dp = Dv rounded up to a multiple of 16; or
            with Dp = 0, which says that a value is the last Dv dimensions of its key (after the
            rotation).
        table: int32 [T, G, B], page id of each block for each of G head groups. KV head h uses
            group h // (Hkv / G).
        table_row, positions, base: int32 [R].
        mask: uint64 [R, W], W may be 0.
        window: positions that a row sees, its own included; None = all.
        softcap: None = none.
        value_dim: Dv; None = D.
        rope: (cos, sin), float32 [blocks, rot / 2, 16]: those of position 16 b + i at [b, :, i], as
            keys lie in a page.

    Returns the output, float32 [R, Hq, Dv], and with ``return_lse`` also the natural log of the sum
    of exponentials, float32 [R, Hq]. A row that sees nothing gives 0 and -inf.
    Raises TypeError or ValueError for other types, shapes or missing pages.
    """
    out, lse = operation(__name__, "paged_attention", impl, q)(
        q,
        k_pages,
        v_pages,
        table,
        table_row,
        positions,
        base,
        mask,
        scale,
        window,
        sinks,
        softcap,
        return_lse,
        q.shape[2] if value_dim is None else value_dim,
        rope,
    )
    if lse is None:
        return out
    return out, lse
