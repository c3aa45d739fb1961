"""What a model computes over texts, written once and read by the trainers of all draft heads.

One pass of the target stores, for each token, its hidden state after chosen layers and the top of
its logits. Heads then train without the target: on one machine the pass costs as much as an epoch.

A store is a folder with ``manifest.json`` and shards (safetensors), each of whole documents:

    tokens       int32 [n]      ``ends`` int32 [documents]: where each document ends
    hidden.<l>   bfloat16 [n, H], the residual stream after l layers, before any final norm
    top_ids      int32 [n, k], ``top_logits`` float32 [n, k], likeliest first
    lse          float32 [n]; exp(top_logits - lse) are probabilities among all tokens

Row i of a document is what the model says after tokens 0..i. A run that was interrupted goes on
behind its last whole shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hasten.cache.layout import PAGE_SIZE, KVStorage
from hasten.engine.batch import Batch, Segment
from hasten.kernels.linear import unpack
from hasten.kernels.logits import row_top
from hasten.models.base import Decoder
from hasten.models.facts import write_json
from hasten.models.paged import PagedKV
from hasten.speculation.heads import fingerprint

VERSION = 1
ROWS = 256
"""Tokens of a pass."""


class Teacher:
    """Runs a model over one document at a time, on pages of its own."""

    def __init__(self, model: Decoder, longest: int) -> None:
        self.model = model
        blocks = -(-longest // PAGE_SIZE)
        layout = model.config.kv_layout()
        self.longest = longest
        self.tables = [
            np.arange(group.head_groups * blocks, dtype=np.int32).reshape(1, -1, blocks)
            for group in layout.groups
        ]
        self.storage = KVStorage(layout, [table.size for table in self.tables])

    def run(self, tokens: Sequence[int], layers: Sequence[int], top: int) -> dict[str, Tensor]:
        """The tensors of a document, as in a shard. ``layers`` are counts of layers, from 1."""
        if not 0 < len(tokens) <= self.longest:
            raise ValueError(f"a document has {len(tokens)} tokens, at most {self.longest} fit")
        parts: dict[str, list[Tensor]] = {}
        capture = [layer - 1 for layer in layers]
        for start in range(0, len(tokens), ROWS):
            chunk = tokens[start : start + ROWS]
            batch = Batch.build([Segment(0, start, chunk, wanted="all")], self.tables)
            out = self.model.forward(batch, PagedKV(self.storage, batch), capture=capture)
            logits = self.model.logits(out, batch.wanted)
            _, _, lse, ids = row_top(logits, top)
            found = {f"hidden.{at + 1}": out.captured[at].bfloat16() for at in capture}
            found |= {"top_ids": ids.int(), "top_logits": logits.gather(1, ids), "lse": lse}
            for name, value in found.items():
                parts.setdefault(name, []).append(value)
        tensors = {name: torch.cat(values) for name, values in parts.items()}
        return tensors | {"tokens": torch.tensor(tokens, dtype=torch.int32)}


def write_features(
    model: Decoder,
    documents: Iterable[Sequence[int]],
    folder: Path,
    layers: Sequence[int],
    *,
    top: int = 32,
    tokens: int,
    longest: int = 512,
    shard_tokens: int = 1 << 15,
) -> FeatureStore:
    """Run a model over documents until ``tokens`` tokens are stored, or go on doing so.

    Holds one shard in memory: ``shard_tokens`` x (layers x H x 2 + top x 8) bytes.

    Args:
        documents: token ids; the same ones in the same order if a run is to be continued. Those
            longer than ``longest`` are cut.
        layers: counts of layers whose output is stored; ``num_layers`` is the last hidden state.
        top: logits kept of each row.

    Raises:
        ValueError: the folder holds features of another model, of other settings or texts.
    """
    config = model.config
    if bad := [layer for layer in layers if not 1 <= layer <= config.num_layers]:
        raise ValueError(f"layer {bad[0]} is outside 1..{config.num_layers}")
    settings: dict[str, Any] = {
        "version": VERSION,
        "model": fingerprint(model),
        "layers": sorted(set(layers)),
        "top": min(top, config.vocab_size),
        "longest": longest,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.json"
    shards: list[dict[str, Any]] = []
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["settings"] != settings:
            raise ValueError(
                f"{folder} holds features of another model or with other settings "
                f"({known['settings']}, wanted {settings}); give another folder or delete it"
            )
        shards = known["shards"]
    texts = iter(documents)
    for shard in shards:
        digest = hashlib.sha256()
        for _ in range(shard["documents"]):
            digest.update(np.array(next(texts, ())[:longest], np.int32).tobytes())
        if digest.hexdigest() != shard["texts"]:
            raise ValueError(f"{folder} holds features of other texts; give another folder")
    teacher = Teacher(model, longest)
    done = sum(shard["tokens"] for shard in shards)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("features", total=tokens, completed=done)
        while done < tokens:
            found: list[dict[str, Tensor]] = []
            digest, count = hashlib.sha256(), 0
            wanted = min(shard_tokens, tokens - done)
            while count < wanted and (text := next(texts, None)) is not None:
                text = list(text)[:longest]
                digest.update(np.array(text, np.int32).tobytes())
                found.append(teacher.run(text, settings["layers"], settings["top"]))
                count += len(text)
                bar.update(task, completed=min(tokens, done + count))
            if not found:
                break
            name = f"shard-{len(shards):05d}.safetensors"
            tensors = {key: torch.cat([part[key] for part in found]) for key in found[0]}
            lengths = torch.tensor([len(part["tokens"]) for part in found])
            tensors["ends"] = lengths.cumsum(0).int()
            save_file(tensors, folder / f"{name}.new")
            (folder / f"{name}.new").chmod(0o644)  # safetensors writes for the owner only
            os.replace(folder / f"{name}.new", folder / name)
            shards.append(
                {
                    "file": name,
                    "documents": len(found),
                    "tokens": count,
                    "texts": digest.hexdigest(),
                }
            )
            write_json(folder / "manifest.json.new", {"settings": settings, "shards": shards})
            os.replace(folder / "manifest.json.new", path)
            done += count
    return FeatureStore(folder)


@dataclass(frozen=True)
class Rows:
    """A training batch of equally long spans.

    Attributes:
        tokens: int64 [B, L].
        hidden: layer -> float32 [B, L, H].
        top_ids: int64 [B, L, k]; ``probabilities`` float32 [B, L, k] are the target's of them.
    """

    tokens: Tensor
    hidden: dict[int, Tensor]
    top_ids: Tensor
    probabilities: Tensor


class FeatureStore:
    """Reads what `write_features` wrote. Two shards are in memory at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.settings: dict[str, Any] = manifest["settings"]
        self.shards: list[dict[str, Any]] = manifest["shards"]
        self._shard = lru_cache(maxsize=2)(self._load)

    @property
    def tokens(self) -> int:
        """Tokens stored."""
        return sum(shard["tokens"] for shard in self.shards)

    def _load(self, index: int) -> dict[str, Tensor]:
        return load_file(self.folder / self.shards[index]["file"])

    def documents(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of each document, in the order in which they were written."""
        for index in range(len(self.shards)):
            shard = self._shard(index)
            start = 0
            for end in shard["ends"].tolist():
                yield {name: v[start:end] for name, v in shard.items() if name != "ends"}
                start = end

    def batch(self, step: int, rows: int, length: int, seed: int = 0) -> Rows:
        """Random spans, a function of (seed, step). All are from one shard, so that consecutive
        steps read the disk rarely; documents shorter than ``length`` are left out.

        Steps stay with a shard for about one reading of it, and every shard has its turn before
        any has the next.
        """
        stay = max(1, self.tokens // (len(self.shards) * rows * length))
        epoch, turn = divmod(step // stay, len(self.shards))
        order = np.random.default_rng((seed, epoch)).permutation(len(self.shards))
        shard = self._shard(int(order[turn]))
        rng = np.random.default_rng((seed, step, 1))
        ends = shard["ends"].numpy().astype(np.int64)
        starts = np.concatenate([[0], ends[:-1]])
        room = ends - starts - length
        fits = np.flatnonzero(room >= 0)
        if not len(fits):
            raise ValueError(f"no document of {self.folder} has {length} tokens")
        chosen = rng.choice(fits, rows)
        first = starts[chosen] + rng.integers(room[chosen] + 1)
        at = torch.from_numpy(first[:, None] + np.arange(length))
        lse = shard["lse"][at]
        return Rows(
            shard["tokens"][at].long(),
            {layer: shard[f"hidden.{layer}"][at].float() for layer in self.settings["layers"]},
            shard["top_ids"][at].long(),
            (shard["top_logits"][at] - lse[..., None]).exp(),
        )


SLICE = 128
"""Positions whose logits are in memory at a time, small enough to stay in a cache."""


class SlicedSoftCrossEntropy(torch.autograd.Function):
    """Loss and gradient of a frozen output matrix, a slice of positions at a time.

    Over a vocabulary of thousands, logits and their gradient are most of what a step of a head
    moves through memory. The matrix does not learn, so the gradient of the states is all that is
    kept, and it is computed while the logits of the slice are there (as in Liger Kernel's fused
    linear cross-entropy, Hsu et al. 2024).
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, matrix: Tensor, ids: Tensor, wanted: Tensor, cap: float | None
    ) -> Tensor:
        gradient = torch.empty_like(states)
        total = torch.zeros((), dtype=torch.float64)
        parts = zip(*(x.split(SLICE) for x in (states, ids, wanted, gradient)), strict=True)
        for rows, top, share, out in parts:
            logits = F.linear(rows.to(matrix.dtype), matrix).float()
            if cap is not None:
                logits = cap * torch.tanh(logits / cap)
            slope = None if cap is None else 1 - (logits / cap).square()
            own = logits - logits.logsumexp(-1, keepdim=True)
            total -= (share * own.gather(1, top)).sum()
            # of the logits: softmax times what is wanted in all, less what is wanted of each
            pull = own.exp_().mul_(share.sum(-1, keepdim=True)).scatter_add_(1, top, -share)
            if slope is not None:
                pull *= slope
            out.copy_(pull.to(matrix.dtype) @ matrix)
        ctx.save_for_backward(gradient / len(states))
        return (total / len(states)).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None, None


class TeacherHead(nn.Module):
    """A model's final norm and output matrix in torch, frozen: heads are trained through it."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.eps = model.config.norm_eps
        self.cap: float | None = getattr(model, "logit_cap", None)
        output: Any = model.output  # type: ignore[attr-defined]  # every architecture has one
        self.register_buffer("norm", model.norm.clone())
        self.register_buffer("matrix", unpack(output.weight).float())

    def forward(self, stream: Tensor) -> Tensor:
        """The residual stream [..., H] to logits [..., V]."""
        logits = F.linear(self._normed(stream), self.get_buffer("matrix"))
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def soft_cross_entropy(
        self, stream: Tensor, rows: Rows, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Cross-entropy of a stream [B, L, H] against the target's probabilities of its likeliest
        tokens, averaged over positions; what they leave is not scored.

        ``dtype`` is that of the products with the output matrix.
        """
        loss: Tensor = SlicedSoftCrossEntropy.apply(
            self._normed(stream).flatten(0, 1),
            self.get_buffer("matrix").to(dtype),
            rows.top_ids.flatten(0, 1),
            rows.probabilities.flatten(0, 1),
            self.cap,
        )
        return loss

    def _normed(self, stream: Tensor) -> Tensor:
        wide = stream.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed * self.get_buffer("norm")
