"""Trained parts of drafters in files: what they were trained for is written in them and checked.

A head is one safetensors file. Its metadata name the kind of head, the version of the layout, the
model it belongs to (a fingerprint) and the head's own facts; a head reads hidden states, so that
with any other model it would draft nonsense.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hasten.kernels.linear import Weight
from hasten.methods import MethodError
from hasten.models.base import Decoder
from hasten.weights.base import Matrix, WeightFormat
from hasten.weights.checkpoint import Checkpoint

VERSION = 1
"""Of the layout; raised with every change that an older reader would misread."""


def fingerprint(model: Decoder) -> str:
    """Identifies a model by its sizes and the weights of its last norm.

    Norms are held in float32 whatever the format of the matrices, so the quantized forms of a
    checkpoint, whose hidden states are nearly the same, have its fingerprint.
    """
    config = model.config
    sizes = (config.architecture, config.vocab_size, config.hidden_size, config.num_layers)
    digest = hashlib.sha256(repr(sizes).encode())
    digest.update(model.norm.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:32]


def write_head(
    path: Path, kind: str, model: Decoder, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a head for a model; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    described = {"kind": kind, "version": VERSION, "model": fingerprint(model), **facts}
    save_file(
        {name: value.detach().contiguous() for name, value in tensors.items()},
        fresh,
        metadata={"hasten": json.dumps(described)},
    )
    fresh.chmod(0o644)  # safetensors writes for the owner only
    os.replace(fresh, path)


def read_head(
    path: str, kind: str, model: Decoder, command: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a head of this kind for this model.

    Args:
        command: trains one; it is part of every refusal.

    Raises:
        MethodError: no file was named, or it is missing, something else, or another model's.
    """
    advice = f"train one: {command}"
    if not path:
        raise MethodError(f"draft={kind} needs a trained head (head=FILE); {advice}")
    file = Path(path).expanduser()
    if not file.is_file():
        raise MethodError(f"draft={kind}: there is no file {file}; {advice}")
    try:
        with safe_open(file, framework="pt") as opened:
            facts = json.loads((opened.metadata() or {}).get("hasten", "null"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise MethodError(
            f"draft={kind}: {file} cannot be read as a head ({error}); {advice}"
        ) from None
    if not isinstance(facts, dict) or facts.get("kind") != kind:
        found = facts.get("kind") if isinstance(facts, dict) else None
        what = f"a head for draft={found}" if found else "no head of hasten's"
        raise MethodError(f"draft={kind}: {file} is {what}; {advice}")
    if facts.get("version") != VERSION:
        raise MethodError(
            f"draft={kind}: {file} has version {facts.get('version')!r} of the layout, this hasten "
            f"reads version {VERSION}; {advice}"
        )
    if facts.get("model") != fingerprint(model):
        raise MethodError(f"draft={kind}: {file} was trained for another model; {advice}")
    return facts, tensors


class HeadWeights:
    """The tensors of a head as `hasten.models.base.Weights`, for the layers that it is made of."""

    def __init__(self, path: str, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        self.tensors = tensors
        self.dtype = next((t.dtype for t in tensors.values() if t.ndim == 2), torch.float32)
        self.format: WeightFormat = Checkpoint()

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape:
            found = "nothing" if tensor is None else str(tuple(tensor.shape))
            raise MethodError(f"{self.path}: expected '{name}' of shape {shape}, found {found}")
        return tensor

    def rows(self, name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
        return iter([self.get(name, shape)])

    def stored(self, wanted: Matrix) -> Weight | None:
        return None
