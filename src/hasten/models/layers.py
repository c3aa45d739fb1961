"""Parts that architectures share. All activations are float32 [R, ...], one row a token.

Only the kernels compute across features, and each computes a row the same way whatever the other
rows are; the rest is element by element. That is what makes logits independent of the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.cache.layout import PAGE_SIZE
from hasten.kernels.linear import (
    Weight,
    linear,
    linear_experts,
    linear_gated,
    stack_experts,
)
from hasten.kernels.moe import combine, gather, group_rows, route
from hasten.kernels.qkv import HeadNorms
from hasten.models.facts import CheckpointError, Facts
from hasten.weights.base import Matrix, Role

if TYPE_CHECKING:
    from hasten.models.base import KV, ModelConfig, Weights


MAX_ROTATED = 1024  # dimensions of a head; bounds the tables, which no tensor accounts for


def vector(weights: Weights, name: str, size: int) -> Tensor:
    """A norm weight or bias, always float32."""
    return weights.get(name, (size,)).float().clone()


class Linear:
    """``y = x W^T + b``; the matrices of several projections of the same x are stacked.

    Source: the stacking of query, key, value (and of gate, up) reads x once and makes one kernel
    call of three; each output feature is still its own sum, so the bits do not change.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    @classmethod
    def load(
        cls,
        weights: Weights,
        outputs: dict[str, int],
        inputs: int,
        bias: bool = False,
        role: Role = "layer",
        gated: bool = False,
    ) -> Linear:
        """Stack the checkpoint's ``<name>.weight`` [rows, inputs], in the order of ``outputs``.

        With ``gated`` they are gate and up, for `linear_gated`.
        """
        packed = weights.format.matrix(weights, Matrix(outputs, inputs, role, gated))
        if not bias:
            return cls(packed)
        biases = [vector(weights, f"{name}.bias", rows) for name, rows in outputs.items()]
        return cls(packed, torch.cat(biases))

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """y [R, N], plus ``add`` [R, N]."""
        return linear(x, self.weight, self.bias, add=add)


class GatedMLP:
    """``down(act(gate(x)) * up(x))`` with gate and up as one matrix.

    Without ``up``, ``gate`` names a tensor that is stored stacked already: gate, then up (Phi 3).
    ``ffn_size`` is that of ``config`` unless given (experts are narrower).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        gate: str,
        up: str | None = None,
        down: str,
        ffn_size: int | None = None,
        activation: str = "silu",
        bias: bool = False,
    ) -> None:
        hidden, ffn = config.hidden_size, ffn_size or config.ffn_size
        outputs = {gate: 2 * ffn} if up is None else {gate: ffn, up: ffn}
        self.gate_up = Linear.load(weights, outputs, hidden, bias, gated=True)
        self.down = Linear.load(weights, {down: hidden}, ffn, bias)
        self.activation = activation

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """y [R, H], plus ``add`` [R, H]."""
        h = linear_gated(x, self.gate_up.weight, self.activation, self.gate_up.bias)
        return self.down(h, add)


class Experts:
    """``sum over chosen e of share(e) * mlp_e(x)``: a mixture of experts behind a linear router.

    Each row goes to its ``chosen`` most probable experts, ties to the lower id; with ``normalize``
    their probabilities are divided by their sum.
    """

    def __init__(
        self, router: Linear, experts: list[GatedMLP], chosen: int, normalize: bool
    ) -> None:
        self.router = router
        self.experts = Mixture(experts)
        self.chosen = chosen
        self.normalize = normalize

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """y [R, H], plus ``add`` [R, H]."""
        ids, shares = route(self.router(x), self.chosen, self.normalize)
        return self.experts(x, ids, shares, add)


class Mixture:
    """Feed-forward layers of one shape, of which each row goes through a few.

    No row is dropped for capacity, and the outputs are added in ascending order of expert id, so
    that a row's sum does not depend on the rows beside it.
    """

    def __init__(self, experts: list[GatedMLP]) -> None:
        if any(mlp.gate_up.bias is not None or mlp.down.bias is not None for mlp in experts):
            raise ValueError("experts with biases are not supported")
        self.count = len(experts)
        self.gate_up = stack_experts([mlp.gate_up.weight for mlp in experts])
        self.down = stack_experts([mlp.down.weight for mlp in experts])
        self.activation = experts[0].activation

    def __call__(self, x: Tensor, ids: Tensor, shares: Tensor, add: Tensor | None = None) -> Tensor:
        """``shares * expert(x)`` summed over the chosen experts, plus ``add`` [R, H].

        ``ids`` int32 and ``shares`` float32 are [R, k].
        """
        offsets, order, slots = group_rows(ids, self.count)
        h = linear_experts(gather(x, order), self.gate_up, offsets, self.activation)
        return combine(linear_experts(h, self.down, offsets), slots, shares, add)


class Attention:
    """Grouped-query attention of one layer, with optional biases and query/key norms.

    Without ``k`` and ``v``, ``q`` names a tensor that is stored stacked already: queries, keys,
    values (Phi 3). ``q_norm`` and ``k_norm`` are root-mean-square norms before the rotation: [D]
    over each head (Qwen 3), or as long as the projection, over all its heads together (OLMo 2).
    ``scale`` multiplies the scores, ``softcap`` bounds them (Gemma 2).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        layer: int,
        rope: Rope,
        *,
        q: str,
        k: str | None = None,
        v: str | None = None,
        out: str,
        qkv_bias: bool = False,
        out_bias: bool = False,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        self.layer = layer
        self.rope = rope
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        if k is None or v is None:
            outputs = {q: q_size + 2 * kv_size}
        else:
            outputs = {q: q_size, k: kv_size, v: kv_size}
        self.qkv = Linear.load(weights, outputs, config.hidden_size, qkv_bias)
        self.norms: HeadNorms | None = None
        if q_norm is not None and k_norm is not None:
            self.norms = q_norm, k_norm, config.norm_eps
        self.out = Linear.load(weights, {out: config.hidden_size}, q_size, out_bias)
        self.scale = config.head_dim**-0.5 if scale is None else scale
        self.softcap = softcap

    def __call__(self, x: Tensor, kv: KV) -> Tensor:
        q = kv.project(self.layer, x, self.qkv, self.norms, self.rope)
        return self.out(kv.attend(self.layer, q, self.rope, scale=self.scale, softcap=self.softcap))


@dataclass(frozen=True)
class RopeFacts:
    """Rotary embedding as config.json states it.

    Attributes:
        frequencies: angle per position of each pair of dimensions, float32 values [D / 2].
        magnitude: multiplies cosines and sines (YaRN's attention temperature).
    """

    frequencies: tuple[float, ...]
    magnitude: float = 1.0


class Rope:
    """Cosines and sines by position; the tables grow to the longest position asked for.

    The angle is the float32 product of position and frequency, as in the training code of the
    checkpoints; its cosine is taken in float64 and rounded, so that the table does not depend on
    the vector width or thread count it was made with.
    """

    def __init__(self, facts: RopeFacts) -> None:
        self._frequencies = torch.tensor(facts.frequencies, dtype=torch.float32)
        self._magnitude = facts.magnitude
        self._device = torch.device("cpu")
        self._tables = self._compute(0, 2048)
        self._page_tables: tuple[Tensor, Tensor] | None = None

    def _compute(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, end, dtype=torch.float32)
        angles = (positions[:, None] * self._frequencies).double()
        cos, sin = angles.cos() * self._magnitude, angles.sin() * self._magnitude
        device = self._device
        return cos.float().to(device), sin.float().to(device)

    def to(self, device: torch.device) -> None:
        """Keep the tables on a device; they are still computed on the CPU, with the same bits."""
        self._device = device
        cos, sin = self._tables
        self._tables = cos.to(device), sin.to(device)

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), float32 [at least length, D / 2]. Rows never change as the tables grow."""
        cos, sin = tables = self._tables
        if length <= cos.shape[0]:
            return tables
        more = self._compute(cos.shape[0], 1 << (length - 1).bit_length())
        self._tables = tables = torch.cat([cos, more[0]]), torch.cat([sin, more[1]])
        return tables

    def page_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """The same as keys lie in pages: [blocks, D / 2, 16] of at least ``length`` positions."""
        if self._page_tables is None or length > self._page_tables[0].shape[0] * PAGE_SIZE:
            cos, sin = (
                table.unflatten(0, (-1, PAGE_SIZE)).transpose(1, 2).contiguous()
                for table in self.tables(length)
            )
            self._page_tables = cos, sin
        return self._page_tables


def rope_facts(
    facts: Facts, head_dim: int, default_theta: float = 10000.0, *, partial: bool = False
) -> RopeFacts:
    """Frequencies from ``rope_parameters`` (transformers 5) or ``rope_theta``/``rope_scaling``.

    With ``partial`` the architecture heeds ``partial_rotary_factor``: only that share of a head's
    dimensions, the first ones, turns.
    """
    stated = facts.values.get("rope_parameters") or facts.values.get("rope_scaling") or {}
    if not isinstance(stated, dict):
        raise facts.wrong(f"rotary parameters must be an object, found {stated!r}")
    rope = Facts(stated, facts.path)
    kind = stated.get("rope_type") or stated.get("type") or "default"
    theta = rope.number("rope_theta", facts.number("rope_theta", default_theta))
    if partial:
        key = "partial_rotary_factor"
        share = rope.number(key, facts.number(key, 1.0))
        if share > 1:
            raise facts.wrong(f"{key!r} must not exceed 1, found {share}")
        head_dim = int(head_dim * share)
    else:
        for part in (rope, facts):
            part.expect("partial_rotary_factor", 1.0)
    if not 2 <= head_dim <= MAX_ROTATED or head_dim % 2 or theta <= 1:
        raise facts.wrong(
            f"rotary embedding needs an even head_dim up to {MAX_ROTATED} and theta > 1, "
            f"not {head_dim}, {theta}"
        )
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / theta**exponents
    if kind == "default":
        return _facts(plain)
    if kind == "dynamic":
        raise CheckpointError(
            "rope type 'dynamic' changes the angles of earlier positions with the current length, "
            "so a stored key would depend on when it was computed",
            facts.path,
            "Set rope_parameters to 'linear' or 'yarn' with the same factor, or to 'default' and "
            "stay within the original context.",
        )
    if kind == "linear":
        return _facts(plain / rope.number("factor"))
    if kind == "llama3":
        return _llama3(plain, rope, facts)
    if kind == "yarn":
        return _yarn(plain, rope, facts, head_dim, theta)
    if kind in ("longrope", "su"):
        return _longrope(theta**exponents, rope, facts)
    raise CheckpointError(
        f"rope type {kind!r} is not supported; default, linear, llama3, longrope and yarn are",
        facts.path,
        "Use another checkpoint.",
    )


def _facts(frequencies: Tensor, magnitude: float = 1.0) -> RopeFacts:
    return RopeFacts(tuple(frequencies.tolist()), magnitude)


def _original_context(rope: Facts, facts: Facts) -> int:
    """Positions before the extension; where not stated, those after it."""
    stated = facts.count("max_position_embeddings", 2048)
    return rope.count("original_max_position_embeddings", stated)


def _llama3(plain: Tensor, rope: Facts, facts: Facts) -> RopeFacts:
    """Llama 3.1: long waves are slowed by ``factor``, short ones kept, those between blended."""
    factor = rope.number("factor")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    context = _original_context(rope, facts)
    if high <= low:
        raise rope.wrong(f"'high_freq_factor' {high} must exceed 'low_freq_factor' {low}")
    wavelength = 2 * math.pi / plain
    share = (context / wavelength - low) / (high - low)  # 0 at the long end, 1 at the short end
    blended = (1 - share) * plain / factor + share * plain
    slowed = torch.where(wavelength > context / low, plain / factor, blended)
    return _facts(torch.where(wavelength < context / high, plain, slowed))


def _yarn(plain: Tensor, rope: Facts, facts: Facts, head_dim: int, theta: float) -> RopeFacts:
    """YaRN (arXiv 2309.00071): interpolate slow dimensions, keep fast ones, ramp between."""
    context = _original_context(rope, facts)
    factor = rope.number("factor", facts.count("max_position_embeddings", 2048) / context)

    def dimension(rotations: float) -> float:
        """The (fractional) dimension that turns so many times within the original context."""
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(rope.number("beta_fast", 32))
    high = dimension(rope.number("beta_slow", 1))
    if rope.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    ramp = ((torch.arange(len(plain), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = plain / factor * ramp + plain * (1 - ramp)

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        magnitude = temperature(rope.number("mscale")) / temperature(rope.number("mscale_all_dim"))
    else:
        magnitude = temperature(1.0)
    return _facts(frequencies, rope.number("attention_factor", magnitude))


def _longrope(periods: Tensor, rope: Facts, facts: Facts) -> RopeFacts:
    """LongRoPE (arXiv 2402.13753): a factor for each pair of dimensions, for long texts others.

    Published code changes to the long factors when a text outgrows the original context, which
    would turn all its earlier keys anew. Here the choice is made once, by the longest sequence
    that is to run (``Facts.longest``, else ``max_position_embeddings``): texts beyond the original
    context are computed as published, shorter ones as well if nothing longer is allowed.
    """
    stated = facts.values.get("original_max_position_embeddings")  # Phi 3 has it outside
    context = (rope if stated is None else facts).count("original_max_position_embeddings", least=2)
    positions = facts.count("max_position_embeddings", 2048)
    long = (facts.longest or positions) > context
    factors = _factors(rope, "long_factor" if long else "short_factor", len(periods))
    growth = rope.number("factor", positions / context)
    stretch = 1.0 if growth <= 1 else math.sqrt(1 + math.log(growth) / math.log(context))
    return _facts(1.0 / (factors * periods), rope.number("attention_factor", stretch))


def _factors(rope: Facts, key: str, count: int) -> Tensor:
    values = rope.values.get(key)
    numbers = values if isinstance(values, list) else []
    positive = [v for v in numbers if isinstance(v, int | float) and 1e-9 < v < 1e9]
    if len(positive) != count or len(numbers) != count:
        raise rope.wrong(
            f"{key!r} must list {count} positive numbers, one for each pair of dimensions"
        )
    return torch.tensor(positive, dtype=torch.float32)
