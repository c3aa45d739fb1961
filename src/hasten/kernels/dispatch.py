"""Which implementation of an operation runs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

IMPLEMENTATIONS = ("ref", "cpu", "triton")

forced: str | None = os.environ.get("HASTEN_KERNELS") or None
"""What ``HASTEN_KERNELS`` asked for when the process started, or None."""

if forced is not None and forced not in IMPLEMENTATIONS:
    raise ValueError(f"HASTEN_KERNELS={forced} is none of {', '.join(IMPLEMENTATIONS)}")

_BY_DEVICE = {"cpu": "cpu", "cuda": "triton"}


def choose(impl: str | None, tensor: Tensor) -> str:
    """The implementation for tensors like this one: "cpu" on the CPU, "triton" on CUDA, else "ref".

    ``impl``, then ``HASTEN_KERNELS``, force one. Raises ValueError for a name that does not exist
    and RuntimeError for a forced choice that cannot run on the tensor's device.
    """
    if impl is None:
        if forced is None:
            return _BY_DEVICE.get(tensor.device.type, "ref")
        impl = forced
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if impl == "cpu" and not tensor.is_cpu:
        raise RuntimeError(f"impl='cpu' was asked for, but the tensors are on {tensor.device}")
    if impl == "triton" and not (tensor.is_cuda or (tensor.is_cpu and interpreted())):
        raise RuntimeError(
            f"impl='triton' was asked for, but the tensors are on {tensor.device}; Triton runs on "
            "CUDA devices, and on the CPU in its interpreter only (set TRITON_INTERPRET=1)"
        )
    return impl


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, which works on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_modules: dict[tuple[str, str], ModuleType] = {}


def module(package: str, impl: str) -> ModuleType:
    """The module ``<package>.<impl>``, imported at its first use: triton is optional.

    Raises RuntimeError if there is none: nothing else runs in its place.
    """
    found = _modules.get((package, impl))
    if found is None:
        try:
            found = importlib.import_module(f"{package}.{impl}")
        except ModuleNotFoundError as error:
            if error.name == "triton":
                raise RuntimeError(
                    "operations on CUDA tensors need the package 'triton': "
                    "pip install 'hasten[gpu]'"
                ) from error
            if error.name == f"{package}.{impl}":
                name = package.rpartition(".")[2]
                raise RuntimeError(f"{name} has no '{impl}' implementation") from None
            raise
        _modules[package, impl] = found
    return found


def operation(package: str, name: str, impl: str | None, tensor: Tensor) -> Callable[..., Any]:
    """The function ``name`` of the implementation of ``package`` for tensors like this one.

    Raises as `choose` and `module` do, and RuntimeError if the implementation lacks the function.
    """
    chosen = choose(impl, tensor)
    found = getattr(module(package, chosen), name, None)
    if found is None:
        what = f"{package.rpartition('.')[2]}.{name}"
        raise RuntimeError(f"{what} has no '{chosen}' implementation")
    run: Callable[..., Any] = found
    return run
