"""The plain key-value store of a forward pass: pages of one runner, seen through one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.cache.layout import KVStorage
from hasten.engine.batch import Batch
from hasten.kernels.attention import paged_attention
from hasten.kernels.rope import append
from hasten.models.layers import Rope


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

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: Rope,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        """See `hasten.models.base.KV.attend`."""
        k_pages, v_pages, index = self.storage.layer(layer)
        group, table = self.storage.layout.groups[index], self.tables[index]
        if rope not in self._angles:
            self._angles[rope] = rope.tables(self.length)
        cos, sin = self._angles[rope]
        rotated = self.storage.layout.key_space == "rotated"
        append(
            q,
            k,
            v,
            cos,
            sin,
            self.positions,
            self.slots,
            self.table_row,
            table,
            k_pages,
            v_pages,
            rotated,
        )
        out = paged_attention(
            q,
            k_pages,
            v_pages,
            table,
            self.table_row,
            self.positions,
            self.base,
            self.mask,
            scale,
            group.window,
            group.sinks,
            softcap,
            value_dim=self.storage.layout.value_dim,
            rope=None if rotated else rope.page_tables(self.length),
        )
        assert isinstance(out, Tensor)  # alone, as no log-sum-exp was asked for
        return out.flatten(1)
