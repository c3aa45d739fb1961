"""The plain key-value store of a forward pass: pages of one runner, seen through one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.cache.layout import KVStorage
from hasten.engine.batch import Batch
from hasten.kernels.attention import paged_attention
from hasten.kernels.qkv import HeadNorms, qkv
from hasten.kernels.rope import append
from hasten.models.layers import Linear, Rope


class PagedKV:
    """Appends each row's key and value to its page, then attends over the row's pages.

    Window and sinks come from the layer group in the storage's layout, so that a method which
    changes them does so without touching a model.
    """

    def __init__(self, storage: KVStorage, batch: Batch) -> None:
        self.storage = storage
        self.length = int(batch.positions.max()) + 1 if batch.num_rows else 0
        self.positions = torch.from_numpy(batch.positions)
        self.slots = torch.from_numpy(batch.slots)
        self.table_row = torch.from_numpy(batch.table_row)
        self.base = torch.from_numpy(batch.base)
        self.mask = torch.from_numpy(batch.mask)
        self.tables = [torch.from_numpy(table) for table in batch.tables]
        self._angles: dict[Rope, tuple[Tensor, Tensor]] = {}

    @property
    def angles(self) -> int:
        """Positions for which the pass has angles."""
        return min((len(cos) for cos, _ in self._angles.values()), default=self.length)

    def project(
        self, layer: int, x: Tensor, linear: Linear, norms: HeadNorms | None, rope: Rope
    ) -> Tensor:
        """See `hasten.models.base.KV.project`."""
        head_dim = self.storage.layout.key_dim
        return qkv(x, linear.weight, linear.bias, head_dim, norms, *self._places(layer, rope))

    def append(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
        """See `hasten.models.base.KV.append`."""
        append(q, k, v, *self._places(layer, rope))

    def _places(
        self, layer: int, rope: Rope
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool]:
        """Angles and pages: where `append` writes, and whether it rotates keys."""
        k_pages, v_pages, index = self.storage.layer(layer)
        if rope not in self._angles:
            self._angles[rope] = rope.tables(self.length)
        rows = self.positions, self.slots, self.table_row, self.tables[index]
        rotated = self.storage.layout.key_space == "rotated"
        return *self._angles[rope], *rows, k_pages, v_pages, rotated

    def attend(
        self, layer: int, q: Tensor, rope: Rope, *, scale: float, softcap: float | None = None
    ) -> Tensor:
        """See `hasten.models.base.KV.attend`."""
        k_pages, v_pages, index = self.storage.layer(layer)
        layout = self.storage.layout
        group = layout.groups[index]
        out = paged_attention(
            q,
            k_pages,
            v_pages,
            self.tables[index],
            self.table_row,
            self.positions,
            self.base,
            self.mask,
            scale,
            group.window,
            group.sinks,
            softcap,
            value_dim=layout.value_dim,
            rope=None if layout.key_space == "rotated" else rope.page_tables(self.length),
        )
        assert isinstance(out, Tensor)  # alone, as no log-sum-exp was asked for
        return out.flatten(1)
