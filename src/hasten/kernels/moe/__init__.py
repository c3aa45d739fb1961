"""Mixtures of experts: the choice, rows to their experts and back."""

from __future__ import annotations

from torch import Tensor

from hasten.kernels.dispatch import operation


def route(
    router_logits: Tensor,
    k: int,
    normalize: bool,
    groups: int = 1,
    top_groups: int = 1,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` most probable experts of each row and their weights.

    ``router_logits`` is float32 [R, E]. Returns (ids int32 [R, k], weights float32 [R, k]), by
    probability descending, ties to the lower id. The weights are softmax probabilities over all
    experts, with ``normalize`` divided by the sum of the chosen ones. Only experts of the
    ``top_groups`` best of ``groups`` equal runs of experts can be chosen; a group is as good as its
    best expert, ties to the lower group. Raises ValueError unless 1 <= k <= the experts that can be
    chosen.
    """
    run = operation(__name__, "route", impl, router_logits)
    ids, weights = run(router_logits, k, normalize, groups, top_groups)
    return ids, weights


def group_rows(
    ids: Tensor, experts: int, *, impl: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the choices ``ids`` int32 [R, k] by expert, then by row.

    Returns (offsets int64 [E + 1], order int32 [R k], slots int32 [R, k]): places ``offsets[e]`` to
    ``offsets[e + 1]`` are expert e's, ``order`` has the row of each place, ``slots`` the place of
    each choice. Raises IndexError for an id outside of [0, E).
    """
    offsets, order, slots = operation(__name__, "group_rows", impl, ids)(ids, experts)
    return offsets, order, slots


def gather(x: Tensor, index: Tensor, *, impl: str | None = None) -> Tensor:
    """Rows ``index`` int32 [n] of ``x`` float32 [R, H]; IndexError for one that is not there."""
    rows: Tensor = operation(__name__, "gather", impl, x)(x, index)
    return rows


def combine(
    y: Tensor,
    slots: Tensor,
    shares: Tensor,
    add: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Sum up ``shares[r, c] * y[slots[r, c]]`` over the choices c of each row, then add ``add``.

    ``y`` is float32 [R k, H], ``slots`` int32 [R, k] with no place twice in a row, ``shares``
    float32 [R, k], ``add`` float32 [R, H]; the result is [R, H]. Products are rounded and added
    from 0 by ascending slot, which with slots from `group_rows` is by ascending expert.
    Raises IndexError for a slot that is not there.
    """
    total: Tensor = operation(__name__, "combine", impl, y)(y, slots, shares, add)
    return total
