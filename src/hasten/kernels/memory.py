"""Memory for weights: pages of 2 MiB where the system has them."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def weight_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that are not touched yet, aligned to 64 bytes.

    A weight is read from front to back once a step. With pages of 4 KiB the processor's prefetcher
    stops at the end of each, which costs a quarter of the bandwidth; so larger weights ask for huge
    pages (Linux, where transparent huge pages are on "madvise" or "always"). A page becomes
    resident when it is first written.
    """
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + nbytes].view(dtype).view(shape)
