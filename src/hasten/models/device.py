"""Bringing a loaded model to a device: its weights in the order of the kernels there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hasten.kernels.linear import (
    BlockWeight,
    DeviceWeight,
    Int8Weight,
    PackedWeight,
    StackedWeight,
    Weight,
    unpack,
)
from hasten.kernels.linear.device import pair_nibbles
from hasten.kernels.linear.quantized_ref import unpack_codes
from hasten.models.base import Decoder
from hasten.models.layers import Rope


def parse_device(name: str) -> torch.device:
    """The device of that name: "cpu", "cuda" or "cuda:1".

    Raises ValueError, which says what is missing, for a device that cannot be used here.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is none of cpu, cuda, cuda:0, cuda:1 and so on")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        why = (
            "this build of torch has no CUDA: install one that has it"
            if torch.version.cuda is None
            else "torch finds no GPU or driver"
        )
        raise ValueError(f"device {name!r} cannot be used here: {why}; or leave out the device")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} does not exist: there are {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def place(model: Decoder, device: torch.device) -> Decoder:
    """Bring all weights of a model to a device, in place; one that is shared stays shared.

    Raises TypeError for a kind of weight that no Triton kernel reads.
    """
    assert model.weight_bytes and model.parameters  # computed once, from what was loaded
    _placed(model, device, {})
    model.device = device
    return model


def _placed(part: Any, device: torch.device, done: dict[int, Any]) -> Any:
    """The part with its tensors on the device; ``done`` keeps what was placed, by identity."""
    if id(part) in done:
        return done[id(part)][1]
    result = part
    if isinstance(part, Tensor):
        result = part.to(device)
    elif isinstance(part, Rope):
        part.to(device)
    elif isinstance(part, list | tuple):
        result = type(part)(_placed(inner, device, done) for inner in part)
    elif isinstance(part, Weight):
        result = to_device(part, device)
    elif type(part).__module__.startswith("hasten.models") and hasattr(part, "__dict__"):
        for name, inner in vars(part).items():
            if not name.startswith("config"):
                setattr(part, name, _placed(inner, device, done))
    elif type(part).__module__.startswith("hasten.kernels"):
        raise TypeError(f"no Triton kernel reads weights of the kind {type(part).__name__}")
    done[id(part)] = part, result  # the part too, so that its identity is not given to another
    return result


def to_device(w: Weight, device: torch.device | str) -> DeviceWeight:
    """A weight in the order in which Triton kernels read it. Gates come before what they multiply.

    Raises TypeError for weights that hold several experts.
    """
    if isinstance(w, DeviceWeight):
        return w
    if isinstance(w, PackedWeight):
        if w.data.dim() == 2:
            parts = [unpack(PackedWeight(data, w.n, w.k), impl="cpu") for data in w.data]
            return DeviceWeight(torch.stack(parts).to(device), w.n, w.k)
        return DeviceWeight(unpack(w, impl="cpu").to(device), w.n, w.k, gated=w.gated)
    if isinstance(w, BlockWeight | StackedWeight):  # no Triton kernel reads blocks: expanded
        values = unpack(w, impl="cpu").bfloat16().to(device)
        return DeviceWeight(values, w.n, w.k, gated=w.gated)
    if w.data.dim() != 1:
        raise TypeError("no Triton kernel reads the weights of several experts at once")
    rows = unpack_codes(w)
    if isinstance(w, Int8Weight):
        codes, scale = rows.codes.to(device), rows.scale.to(device)
        return DeviceWeight(codes, w.n, w.k, scale, gated=w.gated)
    nibbles = pair_nibbles(rows.codes, w.group).to(device)
    zero = None if rows.zero is None else rows.zero.to(device)
    return DeviceWeight(nibbles, w.n, w.k, rows.scale.to(device), zero, w.group, w.gated)
