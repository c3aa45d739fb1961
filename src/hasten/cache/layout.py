"""How keys and values lie in memory: layer groups, pages and the tensors that hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

PAGE_SIZE = 16
"""Positions in a page. Also the vector width of the attention kernels: keys of one page are
stored dimension-major, so one vector holds one dimension of all its keys."""

CHUNK = 64
"""Logical positions in an attention chunk. Chunk boundaries and their order fix the bits of the
sum (see ``hasten.kernels.attention``); every page lies inside one chunk."""


LINE = 64
"""Bytes in a cache line; pages begin on one."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose keys live and die together, so that they share page ids and page tables.

    Attributes:
        layers: indices of the layers.
        window: positions that a row can see, itself included; None = all.
        sinks: leading positions that stay visible beside the window.
        head_groups: page tables per layer; each serves ``num_kv_heads / head_groups`` heads.
    """

    layers: tuple[int, ...]
    window: int | None = None
    sinks: int = 0
    head_groups: int = 1


@dataclass(frozen=True)
class KVLayout:
    """Shape of one runner's cache: which layers share tables, and what a page holds.

    Attributes:
        num_kv_heads: keys of a position and layer.
        key_dim: size of a key.
        value_dim: size of a value.
        groups: the layers.
        dtype: float32, bfloat16, or int8: codes with one float32 scale for each key and each value,
            which lie behind the dimensions of a page of keys.
        values_in_keys: a value is the last ``value_dim`` dimensions of its key and is not stored
            again (latent attention).
        key_space: "rotated", or "pre-rope": keys are stored before the rotation and rotated
            whenever they are read.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    groups: tuple[LayerGroup, ...]
    dtype: torch.dtype = torch.float32
    values_in_keys: bool = False
    key_space: Literal["rotated", "pre-rope"] = "rotated"

    def __post_init__(self) -> None:
        if self.values_in_keys and self.value_dim > self.key_dim:
            raise ValueError(
                f"keys of {self.key_dim} dimensions cannot hold values of {self.value_dim}"
            )
        if self.dtype not in (torch.float32, torch.bfloat16, torch.int8):
            raise ValueError(f"keys and values are float32, bfloat16 or int8, not {self.dtype}")
        if self.key_space not in ("rotated", "pre-rope"):
            raise ValueError(f"key_space is '{self.key_space}', expected rotated or pre-rope")
        for group in self.groups:
            if self.num_kv_heads % group.head_groups:
                raise ValueError(
                    f"{self.num_kv_heads} KV heads cannot be split into "
                    f"{group.head_groups} equal head groups"
                )

    @property
    def stored_value_dim(self) -> int:
        """Size of a stored value row: rounded up so that kernels need no tail, or 0."""
        return 0 if self.values_in_keys else -(-self.value_dim // PAGE_SIZE) * PAGE_SIZE

    @property
    def key_rows(self) -> int:
        """Rows of ``PAGE_SIZE`` elements in a page of keys: its dimensions, then of int8 pages the
        bytes of one float32 scale for each key, and of one for each value that is stored."""
        if self.dtype != torch.int8:
            return self.key_dim
        return self.key_dim + torch.float32.itemsize * (1 if self.values_in_keys else 2)

    def page_bytes(self, group: int) -> int:
        """Bytes that one page id of a layer group stands for: all its layers, keys and values."""
        g = self.groups[group]
        heads = self.num_kv_heads // g.head_groups
        elements = heads * PAGE_SIZE * (self.key_rows + self.stored_value_dim)
        return len(g.layers) * elements * self.dtype.itemsize

    def block_bytes(self) -> int:
        """Bytes that one block of ``PAGE_SIZE`` positions takes over all layers and heads."""
        return sum(self.page_bytes(i) * g.head_groups for i, g in enumerate(self.groups))


def uniform_layout(
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    windows: Sequence[int | None],
    dtype: torch.dtype = torch.float32,
) -> KVLayout:
    """Group the layers of a model by their sliding window (None = full attention).

    Keys and values are of one size, ``head_dim``.
    """
    if len(windows) != num_layers:
        raise ValueError(f"{num_layers} layers need as many windows, got {len(windows)}")
    by_window: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        by_window.setdefault(window, []).append(layer)
    groups = tuple(LayerGroup(tuple(layers), window) for window, layers in by_window.items())
    return KVLayout(num_kv_heads, head_dim, head_dim, groups, dtype)


def _untouched_zeros(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Zeros that on the CPU take no memory until they are written: a large pool then starts at
    once and costs what is used of it. (``torch.zeros`` writes every byte.)"""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = math.prod(shape) * dtype.itemsize
    memory = np.zeros(count + LINE, np.uint8)
    start = -memory.ctypes.data % LINE  # vector loads then never straddle two cache lines
    return torch.from_numpy(memory[start : start + count]).view(dtype).reshape(shape)


class KVStorage:
    """The page tensors of one runner.

    For each layer group ``k[g]`` is [layers, pages, heads, key_rows, PAGE_SIZE] (dimension-major)
    and ``v[g]`` is [layers, pages, heads, PAGE_SIZE, stored_value_dim] (row-major, the padding
    zero; without elements where values lie in the keys). ``layer(i)`` gives the views and the
    group of one layer.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_pages: Sequence[int],
        device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
    ) -> None:
        self.layout = layout
        self.num_pages = list(num_pages)
        self.k: list[torch.Tensor] = []
        self.v: list[torch.Tensor] = []
        self._of_layer: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
        for index, (group, pages) in enumerate(zip(layout.groups, num_pages, strict=True)):
            heads = layout.num_kv_heads // group.head_groups
            lead = (len(group.layers), pages, heads)
            k = _untouched_zeros((*lead, layout.key_rows, PAGE_SIZE), layout.dtype, device)
            v = _untouched_zeros((*lead, PAGE_SIZE, layout.stored_value_dim), layout.dtype, device)
            self.k.append(k)
            self.v.append(v)
            for i, layer in enumerate(group.layers):
                self._of_layer[layer] = (k[i], v[i], index)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(key pages, value pages, index of the layer's group) of one layer."""
        return self._of_layer[index]
