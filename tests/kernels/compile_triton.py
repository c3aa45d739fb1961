"""Compiles what Triton kernels are launched with, for a GPU that need not be there.

Run as a program with a compute capability such as 90. A driver that only names the target stands in
for the GPU, and each launch stops after its compilation; tensors lie on the CPU and are never read.
Prints a line of JSON for each launch: what was done, kernel, hash of the compiled kernel.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hasten.kernels.linear.device import DeviceWeight


class NamedTarget:
    """A driver for compilation only."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch


label = ""
launch = JITFunction.run


def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    kernel = launch(self, *args, grid=grid, warmup=True, **options)
    assert "cubin" in kernel.asm
    print(json.dumps([label, self.fn.__name__, kernel.hash]))
    return kernel


def weight(kind: str, n: int, k: int) -> DeviceWeight:
    if kind == "int8":
        return DeviceWeight(torch.zeros(n, k, dtype=torch.int8), n, k, torch.zeros(n))
    if kind.startswith("int4"):
        group = int(kind.split("-")[1])
        scale = torch.zeros(n, k // group, dtype=torch.float16)
        zero = torch.zeros(n, k // group, dtype=torch.uint8) if kind.endswith("zeros") else None
        pairs = -(-(k // group) // 2)
        data = torch.zeros(n, pairs, group, dtype=torch.uint8)
        return DeviceWeight(data, n, k, scale, zero, group)
    return DeviceWeight(torch.zeros(n, k, dtype=getattr(torch, kind)), n, k)


def linear_layers(rows: int) -> None:
    from hasten.kernels.linear.triton import embed, linear

    for kind in ("float32", "bfloat16", "int8", "int4-32", "int4-128-zeros"):
        w = weight(kind, 96, 512)
        linear(torch.zeros(rows, 512), w, torch.zeros(96), add=torch.zeros(rows, 96))
        embed(torch.zeros(rows, dtype=torch.int64), w)


def attention(rows: int, blocks: int, words: int) -> None:
    from hasten.kernels.attention.triton import paged_attention
    from hasten.kernels.rope.triton import append

    heads, dim = 8, 128
    of_rows = [torch.zeros(rows, dtype=torch.int32) for _ in range(4)]
    for dtype in (torch.float32, torch.bfloat16):
        pages = torch.zeros(rows + 1, heads, dim * 16, dtype=dtype)
        k, v = pages.view(-1, heads, dim, 16), pages.view(-1, heads, 16, dim)
        table = torch.zeros(rows, 1, blocks, dtype=torch.int32)
        qkv = torch.zeros(rows, 4 * heads + 2 * heads, dim)
        q, keys, values = qkv.split([4 * heads, heads, heads], 1)
        angles = torch.zeros(2048, dim // 2)
        append(q, keys, values, angles, angles, *of_rows[:3], table, k, v)
        mask = torch.zeros(rows, words, dtype=torch.uint64)
        paged_attention(
            q, k, v, table, *of_rows[:3], mask, 0.1, 1024, 4, 50.0, True, dim
        )  # fmt: skip


def the_rest(rows: int) -> None:
    from hasten.kernels.activation.triton import gated, softcap
    from hasten.kernels.logits.triton import row_max_lse
    from hasten.kernels.moe.triton import route
    from hasten.kernels.rms_norm.triton import add_rms_norm, rms_norm

    x = torch.zeros(rows, 4096)
    add_rms_norm(x, x, torch.ones(4096), 1e-5)
    rms_norm(x.view(rows, 32, 128), torch.ones(128), 1e-5)
    gated(x, "silu")
    gated(x, "gelu_tanh")
    softcap(x, 30.0)
    row_max_lse(x)
    route(torch.zeros(rows, 64), 6, True, 8, 3)


def moves() -> None:
    from hasten.kernels.pages.triton import copy_pages, move_slots

    k, v = torch.zeros(2, 4, 2, 128, 16), torch.zeros(2, 4, 2, 16, 128)
    ids = torch.zeros(3, dtype=torch.int64)
    copy_pages(k, v, ids, ids)
    slots = torch.zeros(3, dtype=torch.int32)
    move_slots(k, v, torch.zeros(1, 1, 4, dtype=torch.int32), slots, slots, slots)


if __name__ == "__main__":
    driver.set_active(NamedTarget(int(sys.argv[1])))
    JITFunction.run = compile_only
    for rows in (1, 16, 23):  # 1 and multiples of 16 are what Triton likes to specialize on
        label = f"{rows} rows"
        linear_layers(rows)
        the_rest(rows)
        attention(rows, 32 * rows, words=0)
    label = "a tree"
    attention(3, 64, words=2)
    moves()
