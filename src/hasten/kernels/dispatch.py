"""Which implementation of an operation runs."""

from __future__ import annotations

import os

from torch import Tensor

IMPLEMENTATIONS = ("ref", "cpu")

forced: str | None = os.environ.get("HASTEN_KERNELS") or None
"""What ``HASTEN_KERNELS`` asked for when the process started, or None."""

if forced is not None and forced not in IMPLEMENTATIONS:
    raise ValueError(f"HASTEN_KERNELS={forced} is none of {', '.join(IMPLEMENTATIONS)}")


def choose(impl: str | None, tensor: Tensor) -> str:
    """The implementation for tensors like this one: "cpu" on the CPU, else "ref".

    ``impl``, then ``HASTEN_KERNELS``, force one. Raises ValueError for a name that does not exist
    and RuntimeError for a forced choice that cannot run on the tensor's device.
    """
    if impl is None:
        if forced is None:
            return "cpu" if tensor.is_cpu else "ref"
        impl = forced
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if impl == "cpu" and not tensor.is_cpu:
        raise RuntimeError(f"impl='cpu' was asked for, but the tensors are on {tensor.device}")
    return impl
