"""Quantizing a checkpoint and writing the result as one that `hasten.weights.saved` reads."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hasten.kernels.linear import Rows, Weight
from hasten.models.checkpoint import SafetensorsWeights
from hasten.models.facts import CheckpointError, read_json, write_json
from hasten.models.loading import HUB_FILES, build_model, locate, read_facts, stated_dtype
from hasten.weights.base import Matrix, WeightFormat
from hasten.weights.forms import Form, quantized_rows
from hasten.weights.saved import METHOD, VERSION

SHARD_BYTES = 512 << 20
"""A file of tensors ends when it has so many bytes; as much is held in memory."""


def compress(model: str | Path, out: Path, chosen: WeightFormat, progress: bool = False) -> int:
    """Write the checkpoint ``model`` with its matrices in the form ``chosen`` to a new folder.

    Returns the bytes of its tensors. Tokenizer and settings are copied; tensors that the model
    does not use are left out. Whatever goes wrong, nothing half-written remains. Raises a
    CheckpointError if the model cannot be loaded or is not a checkpoint in the Hugging Face
    layout, FileExistsError if ``out`` exists.
    """
    folder = locate(model)
    if not folder.is_dir():
        raise CheckpointError(
            "a GGUF file holds quantized weights already",
            folder,
            "Give the folder or hub id of a checkpoint in the Hugging Face layout.",
        )
    facts = read_facts(folder)
    if out.exists():
        raise FileExistsError(f"{out} exists; give the name of a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        writer = _Writer(fresh)
        source = Quantizing(folder, stated_dtype(facts), chosen, writer)
        build_model(facts, source, progress)
        for name in source.plain():
            writer.add(name, source.tensor(name).clone())
        writer.finish()
        for pattern in HUB_FILES:
            for file in folder.glob(pattern):
                if ".safetensors" not in file.name:
                    shutil.copyfile(file, fresh / file.name)
        as_method: Any = chosen  # a dataclass with a card
        config = read_json(folder / "config.json")
        config["quantization_config"] = {
            "quant_method": METHOD,
            "version": VERSION,
            "format": as_method.card.name,
            "parameters": dataclasses.asdict(as_method),
        }
        write_json(fresh / "config.json", config)
        fresh.chmod(0o755)
        fresh.rename(out)
        return writer.total
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


class _Writer:
    """Tensors to the files of a checkpoint, one file's worth at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shard: dict[str, Tensor] = {}
        self._bytes = 0
        self._files: list[list[str]] = []  # names of the tensors in each file
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self._shard[name] = tensor
        self._bytes += tensor.nbytes
        self.total += tensor.nbytes
        if self._bytes >= SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        path = self._folder / f"{len(self._files)}.safetensors"
        save_file(self._shard, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors writes for the owner only
        self._files.append(list(self._shard))
        self._shard, self._bytes = {}, 0

    def finish(self) -> None:
        """Write what is left, and the index if there are several files."""
        if self._shard:
            self._flush()
        count = len(self._files)
        if count == 1:
            (self._folder / "0.safetensors").rename(self._folder / "model.safetensors")
            return
        places: dict[str, str] = {}
        for number, names in enumerate(self._files):
            file = f"model-{number + 1:05}-of-{count:05}.safetensors"
            (self._folder / f"{number}.safetensors").rename(self._folder / file)
            places |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total}, "weight_map": places}
        write_json(self._folder / "model.safetensors.index.json", index)


class Quantizing(SafetensorsWeights):
    """A checkpoint that is quantized as a model is built from it; what is read goes to a writer.

    Building the model decides which tensors are matrices and what they do, so that the names are
    told in one place, the architecture.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype | None, chosen: WeightFormat, writer: _Writer
    ) -> None:
        super().__init__(folder, dtype)
        self._chosen = chosen
        self._writer = writer
        self._quantized: set[str] = set()

    def stored(self, wanted: Matrix) -> Weight | None:
        form = self._chosen.form(wanted.role)
        if form is None:
            return None
        each = [
            (name, Matrix({name: rows}, wanted.inputs)) for name, rows in wanted.outputs.items()
        ]
        parts = (rows for name, one in each for rows in self._written(form, name, one))
        return form.pack(parts, wanted)

    def plain(self) -> list[str]:
        """Names of the tensors that the model reads and that stay as they are."""
        return sorted(set(self._files) - self.unread - self._quantized)

    def _written(self, form: Form, name: str, wanted: Matrix) -> Iterator[Rows]:
        layout = form.layout(wanted.rows, wanted.inputs)
        whole = {part: torch.empty(shape, dtype=dtype) for part, (dtype, shape) in layout.items()}
        start = 0
        for rows in quantized_rows(form, self, wanted):
            end = start + len(rows.codes)
            for part, tensor in form.to_tensors(rows).items():
                whole[part][start:end] = tensor
            start = end
            yield rows
        self._quantized.add(f"{name}.weight")
        for part, tensor in whole.items():
            self._writer.add(f"{name}.weight.{part}", tensor)
