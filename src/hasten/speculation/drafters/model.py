"""A small model drafts a chain, token by token."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.methods import method
from hasten.speculation.base import DraftContext
from hasten.speculation.draft_model import DraftModel, load_draft
from hasten.speculation.draft_trees import ChainDrafting


@method(
    "model",
    slot="draft",
    paper="Fast Inference from Transformers via Speculative Decoding (Leviathan et al., 2023)",
    exact="bitwise",
    training="a draft model of the target's vocabulary (hasten train draft)",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens", "runs-draft-model", "tells-root-law"),
)
@dataclass(frozen=True)
class ModelDraft:
    """A draft model writes ``k`` tokens ahead, with a cache of its own.

    Pays where a model of a tenth of the target's size or less often agrees with it; nothing has to
    repeat itself in the text. ``path`` is a checkpoint folder, GGUF file or hub id, by default the
    draft that comes with the reference model. With a verifier that weighs draft laws (chain,
    recursive, k-seq) the tokens of sampled requests are drawn, otherwise each is the draft's
    likeliest.
    """

    path: str = "reference-draft"
    k: int = 4

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k}: draft at least one token")

    def start(self, context: DraftContext) -> ChainDrafting:
        runtime = DraftModel(load_draft(self.path, context), context, self.k)
        return ChainDrafting(runtime, context.drawn, self.k, context.should_stop)
