"""Memory for weights: pages of 2 MiB where the system has them."""

from __future__ import annotations

import mmap
import threading
from math import prod

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
ARENA = 64 << 20
"""Bytes of address space that weights are cut from, one after the other: a page that is shared by
two weights is not lost twice."""
SMALL = 1 << 16
"""Weights below this many bytes lie in ordinary memory."""

_lock = threading.Lock()
_arena = torch.empty(0, dtype=torch.uint8)  # what is left of the last arena


def weight_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that are not touched yet, aligned to 64 bytes.

    A weight is read from front to back once a step. With pages of 4 KiB the processor's prefetcher
    stops at the end of each, which costs a quarter of the bandwidth; so weights ask for huge pages
    (Linux, where transparent huge pages are on "madvise" or "always"). A page becomes resident
    when it is first written, and memory goes back when all weights of an arena are gone.
    """
    global _arena
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < SMALL or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    with _lock:
        if nbytes > len(_arena):
            fresh = _mapped(max(nbytes, ARENA))
            if nbytes > ARENA // 2:  # one of its own: what the last arena has left is still good
                return fresh[:nbytes].view(dtype).view(shape)
            _arena = fresh
        data, _arena = _arena[:nbytes], _arena[-(-nbytes // 64) * 64 :]
    return data.view(dtype).view(shape)


def _mapped(nbytes: int) -> Tensor:
    """Fresh memory, aligned to a huge page."""
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + nbytes]
