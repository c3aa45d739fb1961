"""Trains the adapter of ``draft=kangaroo``: the last layers' work, guessed from the first ones'.

The lesson is the target's own distribution at each position of a text (soft labels), read through
the target's own frozen head. Source: Kangaroo, section 3.2; AdamW with these betas, a linear
warm-up and gradients clipped by value are the paper's, the learning rate is that of a small model
(the paper's 3e-5 belongs to a width of 4096). The adapter starts as the last layer's attention,
which learns more from the same text than random projections do.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.kernels.linear import unpack
from hasten.models.base import Decoder
from hasten.models.layers import Attention
from hasten.speculation.heads import write_head
from hasten.training.features import (
    FeatureStore,
    TeacherHead,
    write_features,
)
from hasten.training.model import RMSNorm, rotate
from hasten.training.trainer import Reporter, pick_precision

KIND = "kangaroo"


@dataclass(frozen=True)
class AdapterRun:
    """Budgets and hyperparameters.

    Attributes:
        layer: layers of the target that run before the adapter; by default one in 16, as the
            paper's 2 of 32.
        tokens: of text that the target reads once.
        epochs: passes over them.
        batch_rows: spans of ``length`` tokens in a step.
        top: logits of the target that are kept of each position.
    """

    layer: int | None = None
    tokens: int = 400_000
    epochs: float = 4.0
    length: int = 256
    batch_rows: int = 16
    top: int = 32
    learning_rate: float = 6e-3
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 0.5
    seed: int = 0
    precision: str = "auto"

    def exit(self, layers: int) -> int:
        """The exit of a target with so many layers.

        Raises:
            ValueError: none are left to verify with.
        """
        exit = max(1, round(layers / 16)) if self.layer is None else self.layer
        if not 1 <= exit < layers:
            raise ValueError(f"layer {exit} must leave layers to verify with: 1..{layers - 1}")
        return exit

    def steps(self, tokens: int) -> int:
        """Steps that read so many stored tokens as often as ``epochs`` says."""
        return max(1, round(self.epochs * tokens / (self.batch_rows * self.length)))

    def rate(self, step: int, steps: int) -> float:
        """Linear warm-up, then linear decay to a tenth."""
        left = 1 - step / steps
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.learning_rate * warm * (0.1 + 0.9 * left)


class AdapterModule(nn.Module):
    """`hasten.speculation.drafters.kangaroo.Adapter` in torch.

    It starts as the attention of the model's last layer. Where that is of another kind (latent
    attention, no norm before it), it starts as a plain early exit: what the attention writes is
    zero, and norms are one.
    """

    def __init__(self, model: Decoder, rope_theta: float = 10000.0, seed: int = 0) -> None:
        super().__init__()
        config = model.config
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim + config.head_dim % 2  # rotation turns pairs
        self.rope_theta = rope_theta
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)
        self.input_norm = RMSNorm(hidden, config.norm_eps)
        self.output_norm = RMSNorm(hidden, config.norm_eps)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for part in (self.q_proj, self.k_proj, self.v_proj):
                part.weight.normal_(0.0, hidden**-0.5, generator=generator)
            self.o_proj.weight.zero_()
            self._copy_last(model)

    def _copy_last(self, model: Decoder) -> None:
        last = getattr(model, "layers", [None])[-1]
        attention, norm = getattr(last, "attention", None), getattr(last, "norm", None)
        if not isinstance(attention, Attention) or norm is None:
            return
        own = (self.q_proj, self.k_proj, self.v_proj)
        rows = unpack(attention.qkv.weight)
        if len(rows) != sum(p.out_features for p in own):
            return  # heads of an odd size, which are one wider here
        for part, given in zip(own, rows.split([p.out_features for p in own]), strict=True):
            part.weight.copy_(given)
        self.o_proj.weight.copy_(unpack(attention.out.weight))
        self.input_norm.weight.copy_(norm)

    def forward(self, stream: Tensor) -> Tensor:
        """States after the first layers [B, L, H] to the stream that the head reads [B, L, H]."""
        rows, length, _ = stream.shape
        x = self.input_norm(stream)
        shape = (rows, length, -1, self.head_dim)
        q, k, v = (
            p(x).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        half = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        angles = torch.arange(length, dtype=torch.float32)[:, None] * self.rope_theta**-half
        both = torch.cat([angles, angles], dim=-1)
        q, k = rotate(q, both.cos(), both.sin()), rotate(k, both.cos(), both.sin())
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(seen.transpose(1, 2).reshape(rows, length, -1))
        normed: Tensor = self.output_norm(stream + out)
        return normed

    def facts(self, layer: int) -> dict[str, Any]:
        """What is written beside the tensors."""
        return {
            "layer": layer,
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rope_theta": self.rope_theta,
        }


def write_adapter(path: Path, model: Decoder, module: AdapterModule, layer: int) -> None:
    """The file that ``draft=kangaroo(head=FILE)`` reads, matrices in the target's type."""
    tensors = {}
    for name, value in module.state_dict().items():
        if value.ndim == 1:
            tensors[name.removesuffix(".weight")] = value.float()
        else:
            tensors[name] = value.to(model.config.dtype)
    write_head(path, KIND, model, module.facts(layer), tensors)


def train_adapter(
    model: Decoder,
    documents: Iterable[Sequence[int]],
    out: Path,
    work: Path,
    run: AdapterRun | None = None,
) -> list[float]:
    """Train an adapter for a model and write it to ``out``. Returns the loss of each step.

    Args:
        documents: token ids, as for `hasten.training.features.write_features`.
        work: gets the features and the log; features are used again by the next run.
    """
    run = run or AdapterRun()
    layer = run.exit(model.config.num_layers)
    store = write_features(
        model,
        documents,
        work / f"features-{layer}",
        [layer],
        top=run.top,
        tokens=run.tokens,
        longest=2 * run.length,
    )
    module, losses = fit(model, store, run, work / "kangaroo.jsonl")
    write_adapter(out, model, module, layer)
    return losses


def fit(
    model: Decoder, store: FeatureStore, run: AdapterRun, log: Path
) -> tuple[AdapterModule, list[float]]:
    """The trained adapter and the loss of each step; a function of the store and the run."""
    layer = run.exit(model.config.num_layers)
    head, module = TeacherHead(model), AdapterModule(model, seed=run.seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=run.learning_rate, betas=run.betas)
    steps, losses = run.steps(store.tokens), []
    dtype = pick_precision(run.precision)
    log.unlink(missing_ok=True)
    reporter = Reporter("adapter", log)
    began, each = time.monotonic(), run.batch_rows * run.length
    try:
        for step in range(steps):
            rows = store.batch(step, run.batch_rows, run.length, run.seed)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                stream = module(rows.hidden[layer])
            loss = head.soft_cross_entropy(stream, rows, dtype)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_value_(module.parameters(), run.clip)
            rate = run.rate(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            losses.append(loss.item())
            tokens = (step + 1) * each
            entry = {
                "step": step + 1,
                "tokens": tokens,
                "loss": round(losses[-1], 5),
                "rate": rate,
                "length": run.length,
                "tokens_per_second": round(tokens / (time.monotonic() - began)),
            }
            reporter.step(entry, (step + 1) / steps)
    finally:
        reporter.close()
    return module, losses
