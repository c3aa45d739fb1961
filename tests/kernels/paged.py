"""A small paged cache for tests, in which everything that was never written is NaN."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.kernels.rope.ref import quantize, scales_of

PAGE = 16


@dataclass(frozen=True)
class Form:
    """How pages hold keys and values."""

    dtype: torch.dtype = torch.float32
    pre_rope: bool = False

    def __str__(self) -> str:
        return f"{str(self.dtype)[6:]}{' pre-rope' * self.pre_rope}"


FORMS = [
    Form(dtype, pre_rope)
    for dtype in (torch.float32, torch.bfloat16, torch.int8)
    for pre_rope in (False, True)
]


def page_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Angles [positions, half] as keys lie in pages, [blocks, half, 16]."""
    return tuple(  # type: ignore[return-value]
        x.unflatten(0, (-1, PAGE)).transpose(1, 2).contiguous() for x in (cos, sin)
    )


def angles(positions: int, half: int) -> tuple[Tensor, Tensor]:
    """(cos, sin), [positions, half]."""
    angle = torch.arange(positions)[:, None] * 0.7 ** torch.arange(half)
    return angle.cos().float(), angle.sin().float()


class Cache:
    """Pages with shuffled ids, and tables whose blocks get a page when something is written.

    What was never written is NaN (of int8 pages: its scales are). With ``form.pre_rope`` the keys
    are those before the rotation, which ``rope`` describes; of values that are ``in_keys`` nothing
    is rotated.

    Values have ``value_dim`` dimensions (None: those of a key), or are the last so many dimensions
    of the keys if ``in_keys``.
    """

    def __init__(
        self,
        tables: int,
        blocks: int,
        kv_heads: int,
        dim: int,
        groups: int = 1,
        form: Form = Form(),
        value_dim: int | None = None,
        in_keys: bool = False,
    ) -> None:
        self.value_dim = dim if value_dim is None else value_dim
        heads, padded = kv_heads // groups, 0 if in_keys else -(-self.value_dim // PAGE) * PAGE
        pages = tables * blocks * groups + 3
        if form.dtype == torch.int8:
            rows = dim + (4 if in_keys else 8)
            self.k = torch.randint(-128, 128, (pages, heads, rows, PAGE), dtype=torch.int8)
            self.v = torch.randint(-128, 128, (pages, heads, PAGE, padded), dtype=torch.int8)
            for scales in scales_of(self.k, dim):
                scales.fill_(torch.nan)
        else:
            self.k = torch.full((pages, heads, dim, PAGE), torch.nan, dtype=form.dtype)
            self.v = torch.full((pages, heads, PAGE, padded), torch.nan, dtype=form.dtype)
        self.form, self.rope = form, None
        if form.pre_rope:
            turned = dim - self.value_dim if in_keys else dim - 2
            half = random.randint(turned // 4, turned // 2)
            self.rope = page_tables(*angles(blocks * PAGE, half))
        self.table = torch.full((tables, groups, blocks), -1, dtype=torch.int32)
        self.free = torch.randperm(pages).tolist()
        self.heads, self.dim = heads, dim

    def reserve(self, table: int, slot: int) -> None:
        """Give the block of the slot a page in every head group."""
        for group in range(self.table.shape[1]):
            if self.table[table, group, slot // PAGE] < 0:
                self.table[table, group, slot // PAGE] = self.free.pop()

    def at(self, table: int, slot: int, head: int) -> tuple[int, int]:
        group = head // self.heads
        return int(self.table[table, group, slot // PAGE]), head % self.heads

    def write(self, table: int, slot: int, k: Tensor, v: Tensor) -> None:
        """k is [KV heads, D], v [KV heads, Dv]."""
        self.reserve(table, slot)
        scales: list[tuple[Tensor, Tensor]] = []
        if self.form.dtype == torch.int8:
            (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
            scales = list(zip(scales_of(self.k, self.dim), (k_scale, v_scale), strict=False))
        for head in range(len(k)):
            to = self.at(table, slot, head)
            for stored, scale in scales:
                stored[to][slot % PAGE] = scale[head]
            self.k[to][: self.dim, slot % PAGE] = k[head].to(self.k.dtype)
            if self.v.shape[3]:
                self.v[to][slot % PAGE, : self.value_dim] = v[head].to(self.v.dtype)

    def with_value_pages(self) -> Cache:
        """The same cache, its values copied out of the keys to pages of their own."""
        tables, groups, blocks = self.table.shape
        twin = Cache(
            tables, blocks, self.heads * groups, self.dim, groups, self.form, self.value_dim
        )
        twin.table, twin.rope = self.table, self.rope
        twin.k[:, :, : self.k.shape[2]] = self.k
        if self.form.dtype == torch.int8:
            twin.k[:, :, -4:] = self.k[:, :, -4:]  # the scale of a key is that of its value
        values = self.k[:, :, self.dim - self.value_dim : self.dim]
        twin.v[..., : self.value_dim] = values.transpose(2, 3)
        return twin


@dataclass
class Rows:
    """Arguments of the rows of a batch, as lists while they are collected."""

    table_row: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    slot: list[int] = field(default_factory=list)
    base: list[int] = field(default_factory=list)
    bits: list[int] = field(default_factory=list)

    def add(self, table_row: int, position: int, slot: int, base: int, bits: int = 0) -> None:
        self.table_row.append(table_row)
        self.position.append(position)
        self.slot.append(slot)
        self.base.append(base)
        self.bits.append(bits)

    def __len__(self) -> int:
        return len(self.position)

    def tensors(self, index: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(table_row, positions, base, mask), of the rows ``index`` if given."""
        words = max((bits.bit_length() + 63) // 64 for bits in self.bits)
        mask = torch.zeros(len(self), words, dtype=torch.int64)
        for row, bits in enumerate(self.bits):
            for word in range(words):
                part = bits >> 64 * word & (2**64 - 1)
                mask[row, word] = part - 2**64 if part >= 2**63 else part
        parts = [
            torch.tensor(self.table_row, dtype=torch.int32),
            torch.tensor(self.position, dtype=torch.int32),
            torch.tensor(self.base, dtype=torch.int32),
            mask.view(torch.uint64),
        ]
        if index is not None:
            parts = [
                p.view(torch.int64)[index].view(torch.uint64) if p.dim() == 2 else p[index]
                for p in parts
            ]
        return parts[0], parts[1], parts[2], parts[3]


def random_tree(nodes: int) -> list[int]:
    """Parents of a random tree sorted by depth; node 0 is the root."""
    parent = [-1] + [random.randrange(max(0, i - 12), i) for i in range(1, nodes)]
    depth = [0]
    for node in range(1, nodes):
        depth.append(depth[parent[node]] + 1)
    order = sorted(range(nodes), key=lambda node: depth[node])
    place = {node: i for i, node in enumerate(order)}
    return [-1] + [place[parent[node]] for node in order[1:]]


def paths(parent: list[int]) -> list[list[int]]:
    """For each node the nodes from the root's child down to itself (none for the root)."""
    result: list[list[int]] = [[]]
    for node in range(1, len(parent)):
        result.append([*result[parent[node]], node])
    return result
