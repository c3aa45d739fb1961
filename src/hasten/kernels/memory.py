"""Memory for weights: pages of 2 MiB where the system has them."""

from __future__ import annotations

import mmap
import threading
from math import prod

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
ARENA = 64 << 20
"""Address space that is asked for at a time; what is not used of it costs nothing."""

_lock = threading.Lock()
_arena: tuple[mmap.mmap, int, int] | None = None
"""The newest mapping, and where its free part begins and ends."""


def weight_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that are not touched yet, aligned to 64 bytes.

    A weight is read from front to back once a step. With pages of 4 KiB the processor's prefetcher
    stops at the end of each, which costs a quarter of the bandwidth; so weights lie one after the
    other in mappings that ask for huge pages (Linux, where transparent huge pages are on "madvise"
    or "always"). A page becomes resident when it is first written, so packing in parallel touches
    it in parallel; a mapping is given back when the last weight in it is gone.
    """
    global _arena
    nbytes = prod(shape) * dtype.itemsize
    if not hasattr(mmap, "MADV_HUGEPAGE") or not nbytes:
        return torch.zeros(shape, dtype=dtype)
    with _lock:
        if _arena is None or _arena[1] + nbytes > _arena[2]:
            _arena = _map(nbytes)
        memory, begin, end = _arena
        _arena = memory, begin + -(-nbytes // 64) * 64, end
    data = torch.frombuffer(memory, dtype=torch.uint8, offset=begin, count=nbytes)
    return data.view(dtype).view(shape)


def _map(nbytes: int) -> tuple[mmap.mmap, int, int]:
    size = max(ARENA, -(-nbytes // HUGE_PAGE) * HUGE_PAGE) + HUGE_PAGE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    return memory, begin, size - HUGE_PAGE + begin
