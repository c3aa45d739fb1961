"""Decoding of an 8B shape on a GPU: python benchmarks/gpu_decode.py [--weights int4]

Random weights in the shape of Llama 3.1 8B, decode steps at batch 1, 8 and 64 behind a context,
with and without CUDA graphs, interleaved with transformers (bfloat16, scaled-dot-product attention,
a static cache) in the same rounds. The roofline is the bytes that a step must read (all matrices
once, the embedding's rows, the keys and values of the context) over the read bandwidth that a plain
reduction reaches in the same run. Prints one JSON object: device, versions, date, medians, spread.

Not run yet: written where there was no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from hasten.cache.layout import PAGE_SIZE, KVStorage
from hasten.engine.batch import Batch, Segment
from hasten.engine.cuda_graph import DeviceRunner
from hasten.kernels.linear import DeviceWeight
from hasten.kernels.linear.device import pair_nibbles
from hasten.models import llama
from hasten.models.base import Decoder, Weights
from hasten.models.device import place
from hasten.models.facts import Facts
from hasten.weights.checkpoint import Checkpoint

SHAPE = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
WARM_UP = 4


class Nothing:
    """Weights of no cost: `fill` puts random ones on the device in their place."""

    dtype = torch.bfloat16
    format = Checkpoint()

    def get(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.ones(shape)

    def rows(self, name: str, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
        return iter([torch.zeros(shape, dtype=self.dtype)])


def build(kind: str, device: torch.device) -> Decoder:
    """One layer is loaded through the CPU; the others are copies of it, filled on the device."""
    import copy

    facts = Facts({**SHAPE, "num_hidden_layers": 1}, Path("8b/config.json"))
    config = llama.configure(facts, torch.bfloat16)
    weights: Weights = Nothing()
    model = place(llama.Model(config, weights), device)
    facts = Facts(SHAPE, Path("8b/config.json"))
    model.config = llama.configure(facts, torch.bfloat16)
    first = model.layers[0]
    model.layers = [first]
    for index in range(1, SHAPE["num_hidden_layers"]):
        layer = copy.deepcopy(first)
        layer.attention.layer = index
        layer.attention.rope = first.attention.rope
        model.layers.append(layer)
    for layer in model.layers:
        for linear in (
            layer.attention.qkv,
            layer.attention.out,
            layer.mlp.gate_up,
            layer.mlp.down,
        ):
            linear.weight = fill(linear.weight, kind)
    model.embedding = fill(model.embedding, "bfloat16")
    model.output.weight = fill(model.output.weight, kind)
    return model


def fill(w: DeviceWeight, kind: str) -> DeviceWeight:
    device, (n, k) = w.data.device, (w.n, w.k)
    if kind == "bfloat16":
        data = torch.empty((n, k), dtype=torch.bfloat16, device=device).normal_(0, 0.02)
        return DeviceWeight(data, n, k, gated=w.gated)
    if kind == "int8":
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        return DeviceWeight(codes, n, k, torch.full((n,), 3e-4, device=device), gated=w.gated)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    scale = torch.full((n, k // 128), 4e-3, dtype=torch.float16, device=device)
    return DeviceWeight(pair_nibbles(codes, 128), n, k, scale, None, 128, w.gated)


def ours(model: Decoder, rows: int, context: int, graphs: bool) -> Callable[[], None]:
    """A decode step of ``rows`` sequences, each behind ``context`` positions."""
    import numpy as np

    blocks = -(-(context + 256) // PAGE_SIZE)
    layout = model.config.kv_layout(torch.bfloat16)
    storage = KVStorage(layout, [rows * blocks], model.device)
    tables = [np.arange(rows * blocks, dtype=np.int32).reshape(rows, 1, blocks)]
    runner = DeviceRunner(model, storage, context + 256, graphs=graphs)

    def step() -> None:
        runner.run(Batch.build([Segment(i, context, [i + 5]) for i in range(rows)], tables))

    return step


def theirs(rows: int, context: int, device: torch.device) -> Callable[[], None]:
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    config = LlamaConfig(**{k: v for k, v in SHAPE.items() if k != "model_type"})
    with device:
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    cache = StaticCache(config=config, max_cache_len=context + 256)
    ids = torch.full((rows, 1), 5, device=device)
    at = torch.full((rows, 1), context, device=device)

    @torch.inference_mode()
    def step() -> None:
        out = model(
            ids, past_key_values=cache, position_ids=at, cache_position=at[0], use_cache=True
        )
        out.logits[:, -1].float().argmax(-1).cpu()

    return step


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of a sum over 4 GiB, the best of some."""
    x = torch.ones(1 << 30, device=device)
    times = []
    for _ in range(8):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        x.sum().item()
        times.append(time.perf_counter() - start)
    return x.nbytes / min(times)


def step_bytes(model: Decoder, rows: int, context: int) -> int:
    weights = [model.output.weight]
    for layer in model.layers:
        weights += [layer.attention.qkv.weight, layer.attention.out.weight]
        weights += [layer.mlp.gate_up.weight, layer.mlp.down.weight]
    config = model.config
    kv = rows * context * 2 * config.num_kv_heads * config.head_dim * 2 * len(model.layers)
    return sum(w.nbytes for w in weights) + rows * config.hidden_size * 2 + kv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", choices=["bfloat16", "int8", "int4"], default="bfloat16")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu_decode.py needs a CUDA device, and torch finds none")
    device = torch.device("cuda", 0)
    model = build(args.weights, device)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "weights": args.weights,
        "context": args.context,
        "read_bandwidth_gb_s": round(read_bandwidth(device) / 1e9),
        "cases": [],
    }
    for rows in (1, 8, 64):
        contestants = {
            "hasten, graphs": ours(model, rows, args.context, True),
            "hasten, kernel by kernel": ours(model, rows, args.context, False),
        }
        if not args.no_peer:
            contestants["transformers"] = theirs(rows, args.context, device)
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for step in contestants.values():
            for _ in range(WARM_UP):
                step()
        for _ in range(args.rounds):
            for name, step in contestants.items():
                start = time.perf_counter()
                for _ in range(args.steps):
                    step()
                times[name].append((time.perf_counter() - start) / args.steps)
        best = step_bytes(model, rows, args.context) / report["read_bandwidth_gb_s"] / 1e9
        for name, seconds in times.items():
            middle = statistics.median(seconds)
            case = {
                "rows": rows,
                "name": name,
                "tokens_per_second": round(rows / middle, 1),
                "range": [round(rows / max(seconds), 1), round(rows / min(seconds), 1)],
            }
            if name != "transformers":
                case["share_of_roofline"] = round(best / middle, 3)
            report["cases"].append(case)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
