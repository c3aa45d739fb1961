"""Expert choice of mixture-of-experts layers."""

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
