"""Quantized checkpoints: safetensors in the Hugging Face layout, with integers for matrices.

A matrix ``<name>.weight`` that its format quantizes is stored as ``<name>.weight.codes``,
``.scale`` and, in the asymmetric 4-bit form, ``.zero``, row by row as `hasten.weights.forms` lays
them out; so the file does not depend on the order in which kernels read. Other tensors stay as
they were. config.json says how under ``quantization_config``: ``quant_method`` "hasten",
``version``, ``format`` (the method of the slot `weights`), its ``parameters``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.linear import Rows, Weight
from hasten.methods import MethodError, find
from hasten.models.checkpoint import SafetensorsWeights
from hasten.models.facts import CheckpointError, Facts
from hasten.stack import Stack
from hasten.weights.base import ROLES, Matrix, WeightFormat
from hasten.weights.checkpoint import Checkpoint
from hasten.weights.forms import Form, row_blocks

METHOD = "hasten"
VERSION = 1
"""Of the layout; raised with every change that an older reader would misread."""

_KINDS = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.float32: "F32",
}


def saved_format(facts: Facts) -> WeightFormat | None:
    """The format in which a checkpoint was saved; None if it holds numbers."""
    stated = facts.values.get("quantization_config")
    if not isinstance(stated, dict) or stated.get("quant_method") != METHOD:
        return None
    again = "Quantize the original checkpoint again: hasten compress rtn."
    version = stated.get("version")
    if version != VERSION:
        raise CheckpointError(
            f"the weights are quantized in version {version!r} of the layout; this hasten reads "
            f"version {VERSION}",
            facts.path,
            again,
        )
    name, parameters = stated.get("format"), stated.get("parameters")
    try:
        chosen: WeightFormat = find("weights", str(name)).cls(**_typed(parameters))
    except (MethodError, TypeError, ValueError) as error:
        raise CheckpointError(f"bad 'quantization_config': {error}", facts.path, again) from None
    return chosen


def _text(chosen: WeightFormat) -> str:
    return str(Stack.parse({"weights": chosen}))


def _typed(parameters: object) -> dict[str, Any]:
    if not isinstance(parameters, dict):
        raise TypeError(f"'parameters' must be an object, found {parameters!r}")
    return parameters


def reconciled(saved: WeightFormat, asked: WeightFormat, facts: Facts) -> WeightFormat:
    """The format to read a checkpoint in that was saved as ``saved``: as it is, or as numbers.

    Raises a CheckpointError if it was asked for in another quantized form.
    """
    if asked == saved:
        return Checkpoint()
    if asked.form("layer") is not None:
        raise CheckpointError(
            f"the checkpoint has {_text(saved)}, and {_text(asked)} was asked for",
            facts.path,
            "Leave the choice of weights out, or quantize the original checkpoint.",
        )
    return asked


class SavedWeights(SafetensorsWeights):
    """The tensors of a quantized checkpoint.

    ``saved`` is the format they were saved in; ``format``, which architectures see, may ask for
    the numbers that the codes stand for.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype | None, format: WeightFormat, saved: WeightFormat
    ) -> None:
        super().__init__(folder, dtype, format)
        self.saved = saved

    def stored(self, wanted: Matrix) -> Weight | None:
        form = self.saved.form(wanted.role)
        if form is None:
            return None
        for name, rows in wanted.outputs.items():
            self._check(form, f"{name}.weight", (rows, wanted.inputs))
        parts = (rows for name in wanted.outputs for rows in self._read(form, f"{name}.weight"))
        return form.pack(parts, wanted)

    def rows(self, name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
        codes = f"{name}.codes"
        if name in self._files or codes not in self._files:
            return super().rows(name, shape)
        forms = [form for role in ROLES if (form := self.saved.form(role)) is not None]
        kind = self.kind(codes)
        form = next((f for f in forms if _KINDS[f.layout(*shape)["codes"][0]] == kind), forms[0])
        self._check(form, name, shape)
        return (form.values(rows) for rows in self._read(form, name))

    def _check(self, form: Form, name: str, shape: tuple[int, int]) -> None:
        """All tensors of a matrix are there, in type and shape as the form lays them out."""
        for part, (dtype, expected) in form.layout(*shape).items():
            self.check(f"{name}.{part}", expected, [_KINDS[dtype]])

    def _read(self, form: Form, name: str) -> Iterator[Rows]:
        names = {part: f"{name}.{part}" for part in form.layout(0, 0)}
        large = names.pop("codes")
        small = {part: self.tensor(full) for part, full in names.items()}
        start = 0
        for part in self.parts(large):
            for codes in row_blocks(part):
                end = start + len(codes)
                scales = {name: tensor[start:end] for name, tensor in small.items()}
                yield form.from_tensors({"codes": codes, **scales})
                start = end
