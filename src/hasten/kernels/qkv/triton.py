"""The projection by Triton's kernels, one after the other."""

from __future__ import annotations

from functools import partial

from hasten.kernels.qkv import ref

qkv = partial(ref.qkv, impl="triton")
