"""Definition of the page moves in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.rope.ref import scales_of

PAGE = 16


def copy_pages(k: Tensor, v: Tensor, src: Tensor, dst: Tensor) -> None:
    for name, ids in (("src", src), ("dst", dst)):
        for i, page in enumerate(ids.tolist()):
            if not 0 <= page < k.shape[1]:
                raise ValueError(f"{name}[{i}] is {page}, but there are {k.shape[1]} pages")
    for a, b in zip(src.tolist(), dst.tolist(), strict=True):
        k[:, b] = k[:, a].clone()
        v[:, b] = v[:, a].clone()


def move_slots(
    k: Tensor, v: Tensor, table: Tensor, table_row: Tensor, src_slot: Tensor, dst_slot: Tensor
) -> None:
    moves = list(zip(table_row.tolist(), src_slot.tolist(), dst_slot.tolist(), strict=True))
    for row, *slots in moves:
        for slot in slots:
            if not 0 <= slot < table.shape[2] * PAGE:
                raise ValueError(f"slot {slot} is outside of the table")
            pages = table[row, :, slot // PAGE]
            if ((pages < 0) | (pages >= k.shape[1])).any():
                raise ValueError(f"slot {slot} lies in a block that holds no valid page")
    dim = k.shape[3]
    floats: tuple[Tensor, ...] = ()
    if k.dtype == torch.int8:
        dim -= 8 if v.shape[4] else 4
        floats = tuple(s.unflatten(0, k.shape[:2]) for s in scales_of(k.flatten(0, 1), dim))
    for row, src, dst in moves:
        for group in range(table.shape[1]):
            a = int(table[row, group, src // PAGE])
            b = int(table[row, group, dst // PAGE])
            k[:, b, :, :dim, dst % PAGE] = k[:, a, :, :dim, src % PAGE].clone()
            for scales in floats:
                scales[:, b, :, dst % PAGE] = scales[:, a, :, src % PAGE].clone()
            v[:, b, :, dst % PAGE] = v[:, a, :, src % PAGE].clone()
