"""Shared by the kernel tests: fresh seeds, poisoned outputs, all machines."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

from hasten import _native


@pytest.fixture(autouse=True)
def seed() -> int:
    """A fresh seed for every test, shown when it fails; HASTEN_TEST_SEED repeats one."""
    value = int(os.environ.get("HASTEN_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"HASTEN_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN (or a wild number), so an output that is not written shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        made = empty(*args, **kwargs)  # type: ignore[call-overload]
        wild = -1234567 if made.dtype.itemsize > 2 else 91
        return made.fill_(float("nan") if made.is_floating_point() else wild)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def machine() -> Iterator[None]:
    """Whatever a test sets, the next one starts from the defaults."""
    isa, threads = _native.get_isa(), _native.get_num_threads()
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the references do many tiny operations
    yield
    torch.set_num_threads(torch_threads)
    _native.set_isa(isa)
    _native.set_num_threads(threads)
