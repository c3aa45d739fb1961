"""Shared: tiny random models built in memory, and hypothesis profiles."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from hasten.kernels.linear import Weight
from hasten.models.base import Decoder
from hasten.models.facts import Facts
from hasten.stack import Stack
from hasten.weights.base import Matrix, WeightFormat
from hasten.weights.checkpoint import Checkpoint

settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("default")


EMBEDDING = "model.embed_tokens.weight"


class RandomWeights:
    """Generated tensors in place of a checkpoint: the same name and seed give the same values.

    A random model's text is noise that no drafter foresees. With ``habit`` > 0 each token has a
    favorite successor, which the output matrix adds to the logits as often as ``habit`` says and
    the context can overrule: text that repeats itself, mostly.
    """

    dtype = torch.float32

    def __init__(
        self, seed: int, scale: float, format: WeightFormat | None = None, habit: float = 0.0
    ) -> None:
        self.format = format or Checkpoint()
        self.seed = seed
        self.scale = scale
        self.habit = habit

    def get(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = self._normal(name, shape)
        if len(shape) == 1:
            return 1 + 0.1 * values if "norm" in name else 0.1 * values
        if self.habit and name == EMBEDDING:
            return 8 * self.scale * values  # else the layers drown it
        if self.habit and name == "lm_head.weight":
            favorites = favorite_successors(shape[0], self.seed)
            habits = torch.zeros(shape).index_add_(0, favorites, self._normal(EMBEDDING, shape))
            return self.scale * values + self.habit * habits
        return self.scale * values

    def _normal(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash_of(name) + self.seed)
        return torch.randn(shape, generator=generator)

    def rows(self, name: str, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
        return iter([self.get(name, shape)])

    def stored(self, wanted: Matrix) -> Weight | None:
        return None


def favorite_successors(vocab: int, seed: int = 0) -> torch.Tensor:
    """Of each token id, int64 [vocab]; never one of the special ids 0 and 1."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab, (vocab,), generator=random)


def hash_of(text: str) -> int:
    """A hash that does not change between runs."""
    return zlib.crc32(text.encode())


def tiny_facts(model_type: str = "llama", **changes: Any) -> Facts:
    return Facts(
        {
            "model_type": model_type,
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "eos_token_id": 1,
            "bos_token_id": 0,
            "hidden_act": "silu",
            **changes,
        },
        Path("tiny/config.json"),
    )


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Decoder]:
    """Builds a tiny random decoder: ``tiny("llama", seed=0, vocab_size=61, ...)``.

    ``weights`` is a choice of that slot, in which its matrices are held; for ``habit`` see
    `RandomWeights`.
    """
    import importlib

    made: dict[str, Decoder] = {}

    def make(
        model_type: str = "llama",
        seed: int = 0,
        scale: float = 0.25,
        weights: str = "checkpoint",
        habit: float = 0.0,
        **changes: Any,
    ) -> Decoder:
        key = repr((model_type, seed, scale, weights, habit, sorted(changes.items())))
        if key not in made:
            module = importlib.import_module(f"hasten.models.{model_type}")
            config = module.configure(tiny_facts(model_type, **changes), torch.float32)
            format = Stack.parse({"weights": weights})["weights"]
            model = module.Model(config, RandomWeights(seed, scale, format, habit))
            model.sampling_defaults = {"temperature": 0.0}
            made[key] = model
        return made[key]

    return make
