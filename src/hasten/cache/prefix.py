"""Keys of the prefix index: a sha256 chain over blocks of tokens."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from hasten.cache.layout import PAGE_SIZE


def root_key(stack: str, model: str, tenant: str) -> bytes:
    """Where a chain starts. Everything that changes stored values or who may see them is in it.

    The tenant is part of the key, so that no request can learn from its own latency what another
    tenant has sent (CVE-2025-46570 is the same leak elsewhere).
    """
    return hashlib.sha256("\0".join((stack, model, tenant)).encode()).digest()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a full block, given the key of the block before it (or the root)."""
    assert len(tokens) == PAGE_SIZE
    return hashlib.sha256(parent + array("i", tokens).tobytes()).digest()
