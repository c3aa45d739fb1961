"""Widened models: a trained small Llama inside a large one that computes the same function.

Speed on a machine depends on a model's shape, acceptance and quality on what it has learned. A
widened model has the shape of a 0.5B or 1B model and the behaviour of the small one that it holds,
so both can be measured honestly where only small models can be trained.

Construction (Net2Net, Chen et al. 2016, adapted to RMSNorm, rope and grouped queries):

* Every hidden unit exists ``r`` times (a power of two), at shuffled places. RMSNorm is unchanged by
  that: the mean over copies is the mean. A matrix that reads the hidden state splits each weight
  among the copies, *differently for every output unit*, into positive shares with sum 1.
* Every head, key-value head with its query heads, exists ``r`` times, feed-forward units ``f``
  times; ``o_proj`` and ``down_proj`` split their weights among these copies in the same way. Since
  each row has shares of its own, no two rows or blocks of a matrix are multiples of each other.
* With a tied head the logits would be ``r`` times too large; the final norm is divided by ``r``.
* Shares are multiples of 2**-12 in float32, and powers of two in bfloat16. Hence the products with
  bfloat16 source weights are exact in both: no weight is rounded, and the widened model differs
  from its source by the order of sums only. (A float32 source rounds each share to float32, or all
  weights to bfloat16.)
* Extra layers stand between the real ones. They are complete copies of the real layer before them,
  attend and compute, but ``o_proj`` and ``down_proj`` carry the factor 2**-64. What they add to a
  residual value is far below half its last place, so that the sum *is* that value, bit for bit, in
  any order of summation. Opposite-sign pairs would cancel only up to rounding, and zero weights
  could be skipped.

Do not measure methods that skip layers on such a model: its extra layers are useless by
construction. The same holds for low-rank or pruning claims about its weights.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

SILENT = 2.0**-64
SHARE_BITS = 12
SHARE_ROWS = 4096
MAX_SHARD_BYTES = 2_000_000_000
COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


@dataclass(frozen=True)
class Preset:
    """A shape to widen to; ``intermediate_size`` is rounded to a multiple of the source's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int


PRESETS = {
    # drafts for the larger two, at about a twentieth and an eighth of 0.5b
    "25m": Preset(512, 1536, 6),
    "60m": Preset(512, 1536, 15),
    "0.1b": Preset(512, 3072, 20),
    "0.5b": Preset(1024, 4608, 28),
    "1b": Preset(2048, 6144, 20),
}


def compositions(
    parts: int, dtype: torch.dtype, generator: torch.Generator, rows: int = SHARE_ROWS
) -> Tensor:
    """``[rows, parts]`` random positive shares, each row with the exact sum 1.

    For float32 near-even multiples of 2**-12; for bfloat16 powers of two, made by halving.
    """
    if parts == 1:
        return torch.ones(rows, 1)
    if dtype == torch.bfloat16:
        shares = torch.zeros(rows, parts)
        shares[:, 0] = 1.0
        every = torch.arange(rows)
        for count in range(1, parts):
            # Halve one of the larger shares: keeps the copies within a small factor.
            noise = torch.rand(rows, count, generator=generator)
            chosen = (shares[:, :count] * (1 + noise)).argmax(1)
            half = shares[every, chosen] / 2
            shares[every, chosen] = half
            shares[:, count] = half
    else:
        total = 2**SHARE_BITS
        weights = 0.5 + torch.rand(rows, parts, generator=generator)
        whole = (weights / weights.sum(1, keepdim=True) * total).floor()
        whole[:, 0] += total - whole.sum(1)
        shares = whole / total
    order = torch.rand(rows, parts, generator=generator).argsort(1)
    return shares.gather(1, order)


class Copies:
    """Which source unit each wide unit copies, and which of its copies it is."""

    def __init__(self, source: Tensor, count: int) -> None:
        self.source = source
        self.count = count
        order = source.argsort(stable=True)
        self.copy = torch.empty_like(source)
        self.copy[order] = torch.arange(len(source)) % count

    @classmethod
    def shuffled(cls, size: int, count: int, generator: torch.Generator) -> Copies:
        places = torch.randperm(size * count, generator=generator)
        return cls(torch.arange(size).repeat(count)[places], count)


class Splitter:
    """Widens matrices: rows are copied, columns are split among the copies of what they read."""

    def __init__(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        self.dtype = dtype
        self.generator = generator
        self.tables: dict[int, Tensor] = {}

    def split(self, weight: Tensor, rows: Tensor, columns: Copies) -> Tensor:
        """``weight [out, in]`` to ``[len(rows), len(columns)]`` with fresh shares everywhere."""
        table = self.tables.get(columns.count)
        if table is None:
            table = compositions(columns.count, self.dtype, self.generator)
            self.tables[columns.count] = table
        wide = weight[rows]
        which = torch.randint(len(table), wide.shape, generator=self.generator)
        shares = table[which[:, columns.source], columns.copy]
        return wide[:, columns.source].mul_(shares).to(self.dtype)


def head_rows(heads: Tensor, head_dim: int) -> Tensor:
    """Row indices of whole heads, in the given order."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def real_places(real: int, wide: int) -> list[int]:
    """Where the source's layers stand: spread evenly, the first one first."""
    return [index * wide // real for index in range(real)]


def read_source(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and float32 weights of a Llama checkpoint, refused where it is not a plain Llama."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "llama":
        raise ValueError(f"widen knows Llama checkpoints, not {config.get('model_type')!r}")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError("widen does not handle biases")
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= {name: value.float() for name, value in load_file(path).items()}
    if not tensors:
        raise FileNotFoundError(f"no safetensors in {folder}")
    return config, tensors


def multiple(wide: int, source: int, what: str, power_of_two: bool) -> int:
    """How many times ``source`` fits into ``wide``; refused where it must be exact and is not."""
    times = max(1, round(wide / source))
    if power_of_two and (times * source != wide or math.log2(times) % 1):
        raise ValueError(f"{what} {wide} is not a power-of-two multiple of the source's {source}")
    return times


def wide_layers(
    config: dict[str, Any], tensors: dict[str, Tensor], preset: Preset, splitter: Splitter
) -> Iterator[dict[str, Tensor]]:
    """The tensors of the widened model in parts: embedding first, then layers, then the end."""
    size: int = config["hidden_size"]
    head_dim: int = config.get("head_dim") or size // config["num_attention_heads"]
    kv_heads: int = config["num_key_value_heads"]
    group: int = config["num_attention_heads"] // kv_heads
    times = multiple(preset.hidden_size, size, "hidden size", power_of_two=True)
    inner = multiple(preset.intermediate_size, config["intermediate_size"], "ffn size", False)
    generator = splitter.generator
    hidden = Copies.shuffled(size, times, generator)
    everywhere = hidden.source

    def vector(name: str) -> Tensor:
        return tensors[name][everywhere].to(splitter.dtype)

    embedding = tensors["model.embed_tokens.weight"]
    yield {"model.embed_tokens.weight": embedding[:, everywhere].to(splitter.dtype)}

    places = real_places(config["num_hidden_layers"], preset.num_hidden_layers)
    source_layer = -1
    for layer in range(preset.num_hidden_layers):
        real = layer in places
        source_layer += real
        old, new = f"model.layers.{source_layer}.", f"model.layers.{layer}."
        # A key-value head moves with its query heads, so that h // group stays the mapping.
        kv = Copies.shuffled(kv_heads, times, generator).source
        queries = (kv[:, None] * group + torch.arange(group)).flatten()
        query_rows, kv_rows = head_rows(queries, head_dim), head_rows(kv, head_dim)
        outputs = Copies(query_rows, times)
        units = Copies.shuffled(config["intermediate_size"], inner, generator)
        factor = 1.0 if real else SILENT
        part = {}
        for name, rows in (
            ("self_attn.q_proj", query_rows),
            ("self_attn.k_proj", kv_rows),
            ("self_attn.v_proj", kv_rows),
            ("mlp.gate_proj", units.source),
            ("mlp.up_proj", units.source),
        ):
            part[f"{name}.weight"] = splitter.split(tensors[f"{old}{name}.weight"], rows, hidden)
        for name, columns in (("self_attn.o_proj", outputs), ("mlp.down_proj", units)):
            weight = tensors[f"{old}{name}.weight"] * factor
            part[f"{name}.weight"] = splitter.split(weight, everywhere, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            part[f"{name}.weight"] = vector(f"{old}{name}.weight")
        yield {new + name: value for name, value in part.items()}

    if config.get("tie_word_embeddings"):
        yield {"model.norm.weight": (vector("model.norm.weight") / times)}
    else:
        head = tensors["lm_head.weight"]
        rows = torch.arange(len(head))
        yield {
            "model.norm.weight": vector("model.norm.weight"),
            "lm_head.weight": splitter.split(head, rows, hidden),
        }


def widened_config(
    config: dict[str, Any], preset: Preset, dtype: torch.dtype, origin: dict[str, Any]
) -> dict[str, Any]:
    """The source's ``config.json`` in the new shape, with a note of where it comes from."""
    times = preset.hidden_size // config["hidden_size"]
    inner = multiple(preset.intermediate_size, config["intermediate_size"], "ffn size", False)
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return {
        **config,
        "hidden_size": preset.hidden_size,
        "intermediate_size": inner * config["intermediate_size"],
        "num_hidden_layers": preset.num_hidden_layers,
        "num_attention_heads": times * config["num_attention_heads"],
        "num_key_value_heads": times * config["num_key_value_heads"],
        "head_dim": config.get("head_dim")
        or config["hidden_size"] // config["num_attention_heads"],
        "dtype": name,
        "torch_dtype": name,
        "hasten_widened_from": origin,
    }


def widen(
    source: Path,
    out: Path,
    preset: str | Preset = "0.5b",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Write the widened form of the checkpoint in ``source`` to the folder ``out``, sharded."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError("widen writes float32 or bfloat16")
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    if out.exists():
        raise FileExistsError(f"{out} exists already")
    config, tensors = read_source(source)
    if preset.num_hidden_layers < config["num_hidden_layers"]:
        raise ValueError("the widened model needs at least as many layers as its source")
    splitter = Splitter(dtype, torch.Generator().manual_seed(seed))
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)

    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        part = fresh / f"{len(shards)}.part"
        save_file(pending, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors writes for the owner only
        shards.append(list(pending))
        pending.clear()

    parts: Any = wide_layers(config, tensors, preset, splitter)
    if progress:
        parts = track(parts, "widening", total=preset.num_hidden_layers + 2)
    for part in parts:
        pending.update({name: value.contiguous() for name, value in part.items()})
        total += sum(value.nbytes for value in part.values())
        if sum(value.nbytes for value in pending.values()) >= max_shard_bytes:
            flush()
    if pending:
        flush()

    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        final = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (fresh / f"{index}.part").rename(fresh / final)
        weight_map |= dict.fromkeys(names, final)
    index_text = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (fresh / "model.safetensors.index.json").write_text(json.dumps(index_text, indent=2) + "\n")
    origin = {
        "name": source.resolve().name,
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "real_layers": real_places(config["num_hidden_layers"], preset.num_hidden_layers),
        "seed": seed,
    }
    described = widened_config(config, preset, dtype, origin)
    (fresh / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    for name in COPIED_FILES:
        if (source / name).exists():
            shutil.copy2(source / name, fresh / name)
    fresh.rename(out)
    return out


def main(arguments: list[str] | None = None) -> None:
    """Command line: ``python -m hasten.training.widen SOURCE OUT``."""
    parser = argparse.ArgumentParser(description="Embed a small Llama in a large shape.")
    parser.add_argument("source", type=Path, help="folder of a trained Llama checkpoint")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--preset", choices=list(PRESETS), default="0.5b")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    widen(options.source, options.out, options.preset, dtype=dtype, seed=options.seed)


if __name__ == "__main__":
    main()
