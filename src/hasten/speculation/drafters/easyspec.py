"""A draft model whose middle layers attend at the same time, from the same input."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.engine.batch import Batch
from hasten.methods import MethodError, method
from hasten.models.base import KV, Decoder, Hidden, StackedDecoder
from hasten.speculation.base import DraftContext
from hasten.speculation.draft_model import DraftModel, load_draft
from hasten.speculation.draft_trees import ChainDrafting


@method(
    "easyspec",
    slot="draft",
    paper="EasySpec: Layer-Parallel Speculative Decoding for Efficient Multi-GPU Utilization "
    "(2025)",
    exact="bitwise",
    training="a draft model of the target's vocabulary (hasten train draft)",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens", "runs-draft-model", "tells-root-law"),
)
@dataclass(frozen=True)
class EasySpec:
    """Drafts with layers in groups: all attentions of a group read the group's input.

    Neighbouring layers see nearly the same stream, so ``group`` consecutive layers between the
    first and the last may attend at once, one device each; their feed-forward blocks then run one
    after the other. What this leaves in the draft's cache is not what the draft would have
    computed, so after each round the accepted tokens are computed again, exactly, together with
    the target's own token: one pass of a few rows (``calibrate=false`` shows what it is for).

    On one processor the layers of a group share nothing but their input, and nothing is gained:
    the method is here for its acceptance and for several devices. ``group=1`` is the plain draft.
    """

    path: str = "reference-draft"
    k: int = 4
    group: int = 4
    calibrate: bool = True

    def __post_init__(self) -> None:
        if self.k < 1 or self.group < 1:
            raise ValueError(f"k={self.k} and group={self.group} must be at least 1")

    def start(self, context: DraftContext) -> ChainDrafting:
        model = load_draft(self.path, context)
        runtime = DraftModel(
            model, context, self.k, grown_by=Grouped(model, self.group), keep=not self.calibrate
        )
        return ChainDrafting(runtime, context.drawn, self.k, context.should_stop)


class Grouped(StackedDecoder):
    """A decoder over the weights of another, its middle layers in groups."""

    def __init__(self, exact: Decoder, group: int) -> None:
        """
        Raises:
            MethodError: the architecture's layers do not come apart into attention and
                feed-forward.
        """
        self.__dict__.update(exact.__dict__)
        layers = getattr(exact, "layers", [])
        if not all(hasattr(layer, "attend") and hasattr(layer, "feed") for layer in layers):
            raise MethodError(
                f"easyspec runs attention and feed-forward of a layer apart, which the draft's "
                f"architecture {exact.config.architecture} does not offer; take a Llama-style one"
            )
        middle = range(1, len(layers) - 1)
        self.groups = [middle[i : i + group] for i in range(0, len(middle), group)]

    def forward(
        self,
        batch: Batch,
        kv: KV,
        *,
        layers: range | None = None,
        hidden: Tensor | None = None,
        capture: Collection[int] = (),
    ) -> Hidden:
        """All layers; ``capture`` and a part of them are not for drafts."""
        assert layers is None and not capture
        rows = self.embed(torch.from_numpy(batch.tokens)) if hidden is None else hidden
        rows = self.layer(0, rows, kv)
        for group in self.groups:
            attended = [self.layers[index].attend(rows, kv) for index in group]
            for index, out in zip(group, attended, strict=True):
                rows = self.layers[index].feed(out, rows)
        if len(self.layers) > 1:
            rows = self.layer(len(self.layers) - 1, rows, kv)
        return Hidden(rows)
