"""Speed of the CPU kernels beside what the machine can do: python benchmarks/kernels.py

Medians over repeated runs with the range of the middle half; weights rotate through copies that
together exceed the caches where the shape is meant to come from memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from hasten import _native
from hasten.kernels.activation import gated
from hasten.kernels.attention import paged_attention
from hasten.kernels.linear import linear, linear_experts, linear_gated, pack, stack_experts
from hasten.kernels.moe import gather, group_rows

PAGE = 16


def measure(run: Callable[[int], object], seconds: float) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile) of the seconds that ``run(i)`` takes."""
    run(0)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 9:
        start = time.perf_counter()
        run(len(times))
        times.append(time.perf_counter() - start)
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, low, high


# of 0.5B parameters (gate and up, down, a quarter of the head), of the bundled model, of 7B
SHAPES = ((9728, 896), (896, 4864), (37984, 896), (768, 256), (16384, 4096))
ROWS = (1, 2, 4, 8, 16, 64, 512)


def bench_linear(seconds: float, peak: float, cache_bytes: int) -> list[dict[str, object]]:
    results = []
    for n, k in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.randn(n, k).to(dtype)
            copies = [pack(weight) for _ in range(max(1, cache_bytes // weight.nbytes))]
            for rows in ROWS:
                x, out = torch.randn(rows, k), torch.empty(rows, n)
                for source, weights in (("memory", copies), ("cache", copies[:1])):
                    if source == "cache" and weight.nbytes > 2**24:
                        continue

                    def run(i: int, weights=weights, x=x, out=out) -> None:
                        linear(x, weights[i % len(weights)], None, out)

                    times = measure(run, seconds)
                    results.append(line("linear", (n, k), weight, rows, source, times, peak))
    return results


def bench_gated(seconds: float, peak: float, cache_bytes: int) -> list[dict[str, object]]:
    """Gate, up and activation in one call and in two."""
    results = []
    n, k = SHAPES[0]
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(n, k).to(dtype)
        count = max(1, cache_bytes // weight.nbytes)
        fused = [pack(weight, gated=True) for _ in range(count)]
        plain = [pack(weight) for _ in range(count)]
        for rows in (1, 8, 512):
            x = torch.randn(rows, k)

            def one(i: int, weights=fused, x=x) -> None:
                linear_gated(x, weights[i % len(weights)], "silu")

            def two(i: int, weights=plain, x=x) -> None:
                gated(linear(x, weights[i % len(weights)]), "silu")

            for name, run in (("linear_gated", one), ("linear, gated", two)):
                times = measure(run, seconds)
                results.append(line(name, (n, k), weight, rows, "memory", times, peak))
    return results


def bench_experts(seconds: float, peak: float) -> list[dict[str, object]]:
    """64 experts of which each row goes to 8, as in OLMoE and Qwen3-MoE: bytes of those read."""
    results = []
    n, k, experts, chosen = 2048, 1024, 64, 8
    for dtype in (torch.float32, torch.bfloat16):
        weights = [pack(torch.randn(n, k).to(dtype), gated=True) for _ in range(experts)]
        stacked = stack_experts(weights)
        for rows in (1, 8, 256):
            x = torch.randn(rows, k)
            picks = [
                torch.stack([torch.randperm(experts)[:chosen] for _ in range(rows)]).int()
                for _ in range(8)
            ]
            read = torch.empty(len(picks[0].unique()) * n, k, dtype=dtype)

            def run(i: int, x=x, picks=picks, stacked=stacked) -> None:
                offsets, order, _ = group_rows(picks[i % len(picks)], experts)
                linear_experts(gather(x, order), stacked, offsets, "silu")

            times = measure(run, seconds)
            made = line("linear_experts", (n, k), read, rows, "memory", times, peak)
            made["GFLOP/s"] = 2 * rows * chosen * n * k / times[0] / 1e9
            results.append(made)
    return results


def line(
    op: str,
    shape: tuple[int, int],
    weight: torch.Tensor,
    rows: int,
    source: str,
    times: tuple[float, float, float],
    peak: float,
) -> dict[str, object]:
    middle, low, high = times
    return {
        "op": op,
        "shape": f"{shape[1]}x{shape[0]}",
        "type": str(weight.dtype).removeprefix("torch."),
        "rows": rows,
        "weights from": source,
        "us": middle * 1e6,
        "spread": f"{low * 1e6:.0f}-{high * 1e6:.0f}",
        "GB/s": weight.nbytes / middle / 1e9,
        "of bandwidth": weight.nbytes / middle / peak,
        "GFLOP/s": 2 * rows * shape[0] * shape[1] / middle / 1e9,
    }


def bench_attention(seconds: float, peak: float) -> list[dict[str, object]]:
    results = []
    for q_heads, kv_heads, dim in ((14, 2, 64), (8, 4, 64), (32, 8, 128)):
        for dtype in (torch.float32, torch.bfloat16):
            for context, rows, sequences in (
                (128, 1, 1),
                (2048, 1, 1),
                (2048, 8, 8),
                (2048, 64, 1),
            ):
                blocks = context // PAGE
                pages = blocks * sequences
                k = torch.randn(pages, kv_heads, dim, PAGE).to(dtype)
                v = torch.randn(pages, kv_heads, PAGE, dim).to(dtype)
                table = torch.randperm(pages).view(sequences, 1, blocks).int()
                per = rows // sequences
                table_row = torch.arange(sequences).repeat_interleave(per).int()
                positions = torch.arange(context - per, context).repeat(sequences).int()
                mask = torch.zeros(rows, 0, dtype=torch.uint64)
                q = torch.randn(rows, q_heads, dim)

                def run(_: int, args=(q, k, v, table, table_row, positions, positions + 1, mask)):
                    paged_attention(*args, 0.125)

                middle, low, high = measure(run, seconds)
                nbytes = k.nbytes + v.nbytes
                results.append(
                    {
                        "op": "attention",
                        "shape": f"{q_heads}/{kv_heads}x{dim}, {context}",
                        "type": str(dtype).removeprefix("torch."),
                        "rows": f"{rows} of {sequences}",
                        "weights from": "",
                        "us": middle * 1e6,
                        "spread": f"{low * 1e6:.0f}-{high * 1e6:.0f}",
                        "GB/s": nbytes / middle / 1e9,
                        "of bandwidth": nbytes / middle / peak,
                        "GFLOP/s": 4 * rows * context * q_heads * dim / middle / 1e9,
                    }
                )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each line")
    parser.add_argument("--threads", type=int, default=_native.get_num_threads())
    parser.add_argument("--cache-mib", type=int, default=1024, help="bytes that no cache holds")
    parser.add_argument("--only", choices=("linear", "gated", "experts", "attention"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    _native.set_num_threads(args.threads)
    peak = _native.read_bandwidth(args.cache_mib << 20, 5)
    results: list[dict[str, object]] = []
    cache_bytes = args.cache_mib << 20
    if args.only in (None, "linear"):
        results += bench_linear(args.seconds, peak, cache_bytes)
    if args.only in (None, "gated"):
        results += bench_gated(args.seconds, peak, cache_bytes)
    if args.only in (None, "experts"):
        results += bench_experts(args.seconds, peak)
    if args.only in (None, "attention"):
        results += bench_attention(args.seconds, peak)
    if args.json:
        print(json.dumps({"read bandwidth": peak, "results": results}))
        return
    print(
        f"{_native.get_isa()}, {args.threads} threads, memory read at {peak / 1e9:.1f} GB/s "
        f"({args.cache_mib} MiB, best window of 64 MiB)"
    )
    names = list(results[0])
    print(" | ".join(f"{name:>14}" for name in names))
    for result in results:
        cells = (f"{x:.3g}" if isinstance(x, float) else str(x) for x in result.values())
        print(" | ".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
