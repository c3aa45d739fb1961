"""What every architecture is made of: its facts, its weights, its layers and one forward pass.

An architecture is one module named after the ``model_type`` of config.json. It offers

- ``configure(facts, dtype) -> ModelConfig``: reads and checks config.json;
- ``Model(config, weights)``: a `Decoder` that names each tensor it takes from the checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.cache.layout import KVLayout, uniform_layout
from hasten.engine.batch import Batch
from hasten.kernels.embedding import embed
from hasten.kernels.linear import ExpertWeights, Weight
from hasten.kernels.qkv import HeadNorms
from hasten.kernels.rms_norm import rms_norm
from hasten.kernels.rows import take_rows
from hasten.models.facts import Facts
from hasten.models.layers import Linear, Rope, RopeFacts, rope_facts, vector
from hasten.weights.base import Matrix, WeightFormat

# Larger sizes than any model has; a bound on what a hostile config.json can make us allocate.
MAX_LAYERS = 4096
MAX_HEADS = 65536
LAYER_KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The facts that architectures share; an architecture with more of them adds a subclass.

    Attributes:
        architecture: ``model_type`` of config.json, and the name of the module.
        max_positions: positions the checkpoint was made for.
        windows: for each layer how many positions a row sees, itself included; None = all.
        tied: the output head is the embedding.
        eos_ids: tokens that end a text (generation_config.json before config.json).
        dtype: of the stored matrices. Activations and norms are always float32.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    windows: tuple[int | None, ...]
    norm_eps: float
    rope: RopeFacts
    tied: bool
    eos_ids: tuple[int, ...]
    bos_id: int | None
    dtype: torch.dtype

    @property
    def provides(self) -> frozenset[str]:
        """What methods may need of a model (``hasten.methods.NEEDS``)."""
        full = any(window is None for window in self.windows)
        return frozenset({"full-attention-layers"} if full else ())

    def kv_layout(self, dtype: torch.dtype = torch.float32) -> KVLayout:
        """Layer groups for a page pool: layers with equal windows share page tables."""
        return uniform_layout(
            self.num_layers, self.num_kv_heads, self.head_dim, self.windows, dtype
        )


def common_facts(
    facts: Facts,
    dtype: torch.dtype,
    *,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-6,
    head_dim: int | None = None,
    tied: bool = False,
    partial_rotary: bool = False,
) -> dict[str, Any]:
    """The fields of `ModelConfig` that all architectures spell alike; windows are left open.

    The keywords are what the architecture assumes where config.json is silent; with
    ``partial_rotary`` it heeds ``partial_rotary_factor``.
    """
    heads = facts.count("num_attention_heads", most=MAX_HEADS)
    kv_heads = facts.count("num_key_value_heads", heads, most=MAX_HEADS)
    hidden = facts.count("hidden_size")
    if heads % kv_heads:
        raise facts.wrong(f"'num_key_value_heads' {kv_heads} does not divide {heads} heads")
    head_dim = facts.count("head_dim", head_dim or max(1, hidden // heads), most=MAX_HEADS)
    bos_ids = facts.token_ids("bos_token_id")
    return {
        "architecture": facts.values["model_type"],
        "vocab_size": facts.count("vocab_size"),
        "hidden_size": hidden,
        "ffn_size": facts.count("intermediate_size"),
        "num_layers": facts.count("num_hidden_layers", most=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_positions": facts.count("max_position_embeddings", 2048),
        "norm_eps": facts.number("rms_norm_eps", norm_eps),
        "rope": rope_facts(facts, head_dim, rope_theta, partial=partial_rotary),
        "tied": facts.flag("tie_word_embeddings", tied),
        "eos_ids": facts.token_ids("eos_token_id"),
        "bos_id": bos_ids[0] if bos_ids else None,
        "dtype": dtype,
    }


def layer_windows(facts: Facts, windowed: Callable[[int], bool]) -> tuple[int | None, ...]:
    """The window of each layer: from ``layer_types`` if stated, else where ``windowed(layer)``."""
    layers = facts.count("num_hidden_layers", most=MAX_LAYERS)
    kinds = facts.values.get("layer_types")
    if kinds is None:
        slides = [windowed(layer) for layer in range(layers)]
    else:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise facts.wrong(f"'layer_types' must list {layers} layers")
        if unknown := [kind for kind in kinds if kind not in LAYER_KINDS]:
            raise facts.wrong(f"'layer_types' holds {unknown[0]!r}, not one of {LAYER_KINDS}")
        slides = [kind == "sliding_attention" for kind in kinds]
    if not any(slides):
        return (None,) * layers
    window = facts.count("sliding_window")
    return tuple(window if slide else None for slide in slides)


class Weights(Protocol):
    """Where a model's tensors come from: a checkpoint, or generated ones.

    Attributes:
        dtype: in which matrices are read.
        format: in which they are held; architectures leave it to `Linear.load`.
    """

    dtype: torch.dtype
    format: WeightFormat

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that name as stored; its shape is checked before it is read."""

    def rows(self, name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
        """The same for a matrix, in parts of some rows [any, shape[1]] one after the other. The
        shape is checked by the call, not with the first part."""

    def stored(self, wanted: Matrix) -> Weight | None:
        """The matrix packed from the form in which it is stored, if kernels compute on that form
        and it is another one than numbers; else None, and ``rows`` has it."""


class KV(Protocol):
    """The keys and values that a forward pass reads and extends."""

    def project(
        self, layer: int, x: Tensor, linear: Linear, norms: HeadNorms | None, rope: Rope
    ) -> Tensor:
        """Store keys and values of x [R, H] and return its rotated queries [R, Hq, D].

        ``linear`` makes all heads of queries, then those of keys, then those of values;
        ``norms`` are of queries and keys, before the rotation.
        """

    def append(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
        """Store k and v, which are made otherwise, and rotate q in place.

        q is [R, Hq, D], k [R, Hkv, D], v [R, Hkv, Dv], or [R, Hkv, 0] where the layout finds
        values in the keys.
        """

    def attend(
        self, layer: int, q: Tensor, rope: Rope, *, scale: float, softcap: float | None = None
    ) -> Tensor:
        """What the rotated q [R, Hq, D] of these rows sees, once their k and v are stored, as
        [R, Hq * Dv]."""


@dataclass(slots=True)
class Hidden:
    """Result of a forward pass.

    Attributes:
        rows: float32 [R, H], the residual stream after the last layer that ran.
        captured: the same after each layer whose capture was asked for.
    """

    rows: Tensor
    captured: dict[int, Tensor] = field(default_factory=dict)


def _collect(part: Any, kind: Any, found: dict[int, Any]) -> None:
    """All objects of a kind that an object holds, directly or in its parts."""
    if isinstance(part, kind):
        found[id(part)] = part
    elif isinstance(part, ExpertWeights):
        _collect(part.weights, kind, found)
    elif isinstance(part, list | tuple):
        for inner in part:
            _collect(inner, kind, found)
    elif type(part).__module__.startswith("hasten.models") and hasattr(part, "__dict__"):
        for inner in vars(part).values():
            _collect(inner, kind, found)


class Decoder(ABC):
    """A decoder-only language model. Holds weights only, so one instance serves any runner."""

    config: ModelConfig
    device: torch.device = torch.device("cpu")
    """Where the weights are; `hasten.models.device.place` brings them elsewhere."""
    embedding: Weight
    """Of the tokens, [V, H]."""
    norm: Tensor
    """Weight of the last norm, float32 [H]."""
    sampling_defaults: dict[str, Any]
    """Defaults for sampling from generation_config.json; set by the loader."""

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the matrices that one pass reads: all but an embedding that is no head.

        For a mixture of experts this counts every expert, as a full batch reads them.
        """
        found: dict[int, Weight] = {}
        _collect(self, Weight, found)
        if not self.config.tied:
            del found[id(self.embedding)]
        return sum(w.nbytes for w in found.values())

    @cached_property
    def parameters(self) -> int:
        """Numbers in the matrices; norms and biases add less than a thousandth."""
        found: dict[int, Weight] = {}
        _collect(self, Weight, found)
        return sum(w.size for w in found.values())

    @cached_property
    def ropes(self) -> list[Rope]:
        """The rotations of its layers."""
        found: dict[int, Rope] = {}
        _collect(self, Rope, found)
        return list(found.values())

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [R] to the residual stream float32 [R, H]."""

    @abstractmethod
    def layer(self, index: int, hidden: Tensor, kv: KV) -> Tensor:
        """One layer: the residual stream [R, H] before it to the one after it."""

    def final_norm(self, hidden: Tensor) -> Tensor:
        """What the output matrix reads, and what an embedding of a text is: rows [n, H] of the
        residual stream to normed rows float32 [n, H].

        An RMS norm by ``self.norm`` here. An architecture that ends with another norm overrides
        it; ``head`` goes through it either way.
        """
        return rms_norm(hidden, self.norm, self.config.norm_eps)

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """``final_norm`` and output matrix: rows [n, H] to logits float32 [n, V]."""

    def forward(
        self,
        batch: Batch,
        kv: KV,
        *,
        layers: range | None = None,
        hidden: Tensor | None = None,
        capture: Collection[int] = (),
    ) -> Hidden:
        """Run ``layers`` (all by default) over the rows of ``batch``.

        ``hidden`` [R, H] replaces the embedded tokens: a mix of embeddings, or the stream where
        an earlier pass stopped. It is not changed.
        """
        rows = self.embed(torch.from_numpy(batch.tokens)) if hidden is None else hidden
        captured: dict[int, Tensor] = {}
        for index in range(self.config.num_layers) if layers is None else layers:
            rows = self.layer(index, rows, kv)
            if index in capture:
                captured[index] = rows
        return Hidden(rows, captured)

    def logits(self, hidden: Hidden, wanted: NDArray[Any]) -> Tensor:
        """Logits float32 [n, V] of the wanted rows, in their order."""
        if len(wanted) == len(hidden.rows):
            return self.head(hidden.rows)  # wanted is ascending and unique: all rows
        return self.head(take_rows(hidden.rows, torch.from_numpy(wanted)))

    def embeddings(self, hidden: Hidden, rows: NDArray[Any]) -> Tensor:
        """Normed last hidden states float32 [n, H] of some rows: embeddings, not normalised."""
        if not len(rows):
            return hidden.rows[:0]
        return self.final_norm(take_rows(hidden.rows, torch.from_numpy(rows)))


class StackedDecoder(Decoder):
    """Embedding, layers one after the other, a norm and the output matrix, by the names that
    Llama's checkpoints use. A subclass says what a layer is."""

    layer_class: type[Any]
    """Made with (config, weights, index, rope); maps (rows [R, H], kv) to the rows after it."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        rope = Rope(config.rope)
        tokens = {"model.embed_tokens": config.vocab_size}
        self.embedding = Linear.load(
            weights, tokens, config.hidden_size, role="head" if config.tied else "embedding"
        ).weight
        self.layers = [
            self.layer_class(config, weights, index, rope) for index in range(config.num_layers)
        ]
        self.norm = vector(weights, "model.norm.weight", config.hidden_size)
        self.output = (
            Linear(self.embedding)
            if config.tied
            else Linear.load(
                weights, {"lm_head": config.vocab_size}, config.hidden_size, role="head"
            )
        )

    def embed(self, tokens: Tensor) -> Tensor:
        return embed(tokens, self.embedding)

    def layer(self, index: int, hidden: Tensor, kv: KV) -> Tensor:
        rows: Tensor = self.layers[index](hidden, kv)
        return rows

    def head(self, hidden: Tensor) -> Tensor:
        return self.output(self.final_norm(hidden))
