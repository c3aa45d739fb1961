"""LayerSkip: a model whose early layers can already be read by its output head.

Two changes to training (Elhoushi et al., 2024): layers are left out at random, the later the more
often, so that no layer relies on those behind it; and the loss is also taken after early layers,
through the same head. ``draft=del`` then finds exits that it can draft at. The recipe goes on from
a trained model, as the paper's continual pretraining does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from hasten.training.export import export_model, load_exported
from hasten.training.model import Llama
from hasten.training.reference import TARGET_RUN, Texts, batches
from hasten.training.trainer import BatchSource, Loss, TrainConfig, train

RUN = replace(
    TARGET_RUN,
    tokens=12_000_000,
    phases=((1.0, 512),),
    learning_rate=5e-4,
    decay_share=0.5,
    compile=False,
)


@dataclass(frozen=True)
class LayerSkip:
    """How strongly the two changes act.

    Attributes:
        dropout: chance that a sequence skips the last layer; earlier layers have less, growing
            exponentially with depth from 0.
        exit_scale: weight of the early exits relative to the last layer.
        spacing: in a batch, exits this far apart are scored, at a random offset (the paper's
            rotating curriculum), and the last layer always.
    """

    dropout: float = 0.1
    exit_scale: float = 0.2
    spacing: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: a chance to skip a layer is in [0, 1)")
        if self.exit_scale < 0 or self.spacing < 1:
            raise ValueError("exit_scale must not be negative, spacing at least 1")

    def skip_chance(self, layer: int, layers: int) -> float:
        """``dropout (2^(l / (L - 1)) - 1)``: 0 for the first layer, ``dropout`` for the last."""
        depth = layer / (layers - 1) if layers > 1 else 0.0
        return self.dropout * (math.exp(depth * math.log(2)) - 1)

    def weights(self, layers: int, scored: list[int]) -> dict[int, float]:
        """Share of the loss of each scored layer; deeper exits weigh more, the shares sum to 1."""
        raw = {
            layer: self.exit_scale * layer * (layer + 1) / 2
            if layer < layers - 1
            else layers - 1 + self.exit_scale * (layers - 2) * (layers - 1) / 2
            for layer in {*scored, layers - 1}
        }
        if layers == 1:
            return {0: 1.0}
        total = sum(raw.values())
        return {layer: value / total for layer, value in sorted(raw.items())}


def early_exit_loss(model: Llama, settings: LayerSkip) -> Loss:
    """Next-token loss after several layers, with layers skipped at random.

    What is skipped and scored is drawn from the batch itself, so that a resumed run repeats.
    """
    layers = len(model.model.layers)

    def loss(tokens: Tensor, rows: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(tokens.sum()) * 31 + int(tokens[0, -1]))
        offset = int(torch.randint(settings.spacing, (), generator=generator))
        scored = settings.weights(layers, list(range(offset, layers, settings.spacing)))
        drawn = torch.rand(layers, len(tokens), 1, 1, generator=generator)
        backbone, length = model.model, tokens.shape[1]
        cos, sin = backbone.get_buffer("cos")[:length], backbone.get_buffer("sin")[:length]
        stream = backbone.embed_tokens(tokens)
        total = torch.zeros(())
        for index, layer in enumerate(backbone.layers):
            keep = drawn[index] >= settings.skip_chance(index, layers)
            stream = torch.where(keep, layer(stream, cos, sin), stream)
            if index in scored:
                hidden = backbone.norm(stream).flatten(0, 1)[rows]
                each = F.cross_entropy(model.logits(hidden).float(), targets, reduction="none")
                total = total + scored[index] * (each * mask).sum() / mask.sum()
        return total

    return loss


def train_layerskip(
    model: Path,
    out: Path,
    work: Path,
    config: TrainConfig = RUN,
    settings: LayerSkip | None = None,
    source: Callable[[Tokenizer], BatchSource] | None = None,
) -> bool:
    """Go on training a model of the reference family with early exits; write it to ``out``.

    Args:
        model: an exported model; ``work`` keeps the checkpoint of an interrupted run.
        source: batches for a tokenizer; by default those of the reference models.

    Returns:
        Whether the budget was spent; nothing is exported before.
    """
    student, tokenizer = load_exported(model)
    data = source(tokenizer) if source else batches(tokenizer, Texts.load(), seed=3)
    loss = early_exit_loss(student, settings or LayerSkip())
    state = train(student, data, config, work, title="layerskip", loss=loss)
    if state.progress(config) < 1.0:
        return False
    export_model(student.eval(), tokenizer, out)
    return True


@torch.no_grad()
def exit_agreement(model: Llama, tokens: Tensor) -> list[float]:
    """For each layer, the share of positions [B, L] at which the head reads the same likeliest
    token after it as after the last one."""
    backbone, length = model.model, tokens.shape[1]
    cos, sin = backbone.get_buffer("cos")[:length], backbone.get_buffer("sin")[:length]
    stream, chosen = backbone.embed_tokens(tokens), []
    for layer in backbone.layers:
        stream = layer(stream, cos, sin)
        chosen.append(model.logits(backbone.norm(stream)).argmax(-1))
    return [float((ids == chosen[-1]).float().mean()) for ids in chosen]
