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
from hasten.kernels.attention import paged_attention
from hasten.kernels.linear import linear, pack

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


def bench_linear(seconds: float, peak: float, cache_bytes: int) -> list[dict[str, object]]:
    rows_list = []
    for n, k in ((4864, 896), (768, 256), (16384, 4096)):
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.randn(n, k).to(dtype)
            nbytes = weight.nbytes
            copies = [pack(weight) for _ in range(max(1, cache_bytes // nbytes))]
            for rows in (1, 8, 64, 512):
                x, out = torch.randn(rows, k), torch.empty(rows, n)
                for source, weights in (("memory", copies), ("cache", copies[:1])):
                    if source == "cache" and nbytes > 2**24:
                        continue

                    def run(i: int, weights=weights, x=x, out=out) -> None:
                        linear(x, weights[i % len(weights)], None, out)

                    middle, low, high = measure(run, seconds)
                    rows_list.append(
                        {
                            "op": "linear",
                            "shape": f"{k}x{n}",
                            "type": str(dtype).removeprefix("torch."),
                            "rows": rows,
                            "weights from": source,
                            "us": middle * 1e6,
                            "spread": f"{low * 1e6:.0f}-{high * 1e6:.0f}",
                            "GB/s": nbytes / middle / 1e9,
                            "of bandwidth": nbytes / middle / peak,
                            "GFLOP/s": 2 * rows * n * k / middle / 1e9,
                        }
                    )
    return rows_list


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
    parser.add_argument("--only", choices=("linear", "attention"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    _native.set_num_threads(args.threads)
    peak = _native.read_bandwidth(args.cache_mib << 20, 5)
    results: list[dict[str, object]] = []
    if args.only != "attention":
        results += bench_linear(args.seconds, peak, args.cache_mib << 20)
    if args.only != "linear":
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
