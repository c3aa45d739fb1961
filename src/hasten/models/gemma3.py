"""Gemma 3 with images (model_type "gemma3"): its text model alone, which is `gemma3_text`.

Images are not read: the tensors of the image tower stay on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from hasten.kernels.linear import Weight
from hasten.models import gemma3_text
from hasten.models.base import Weights
from hasten.models.facts import Facts
from hasten.weights.base import Matrix


def configure(facts: Facts, dtype: torch.dtype) -> gemma3_text.Config:
    text = facts.values.get("text_config")
    if not isinstance(text, dict):
        raise facts.wrong(f"'text_config' must be an object, found {text!r}")
    shared = ("eos_token_id", "bos_token_id", "tie_word_embeddings")
    outer = {key: facts.values[key] for key in shared if facts.states(key)}
    values = {**text, **outer, "model_type": "gemma3"}
    return gemma3_text.configure(Facts(values, facts.path, facts.longest), dtype)


class Model(gemma3_text.Model):
    def __init__(self, config: gemma3_text.Config, weights: Weights) -> None:
        super().__init__(config, TextWeights(weights))


class TextWeights:
    """The tensors of the text model under the names they have without the image tower."""

    def __init__(self, weights: Weights) -> None:
        self.dtype = weights.dtype
        self.format = weights.format
        self._weights = weights

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._weights.get(f"language_model.{name}", shape)

    def rows(self, name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
        return self._weights.rows(f"language_model.{name}", shape)

    def stored(self, wanted: Matrix) -> Weight | None:
        outputs = {f"language_model.{name}": rows for name, rows in wanted.outputs.items()}
        return self._weights.stored(replace(wanted, outputs=outputs))
