"""Reading the tensors of a checkpoint in the Hugging Face layout: its safetensors.

Every length is checked against the size of the file before anything of that length is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hasten.kernels.linear import Weight
from hasten.models.facts import CheckpointError, read_json
from hasten.weights.base import Matrix, WeightFormat
from hasten.weights.checkpoint import Checkpoint

REOPEN_BYTES = 32 << 20  # read so much through one memory map, then let its pages go

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class SafetensorsWeights:
    """The tensors of one folder, read through memory maps, one at a time.

    ``get`` returns views of the mapped file. To bound the memory held for a file, its map is
    replaced after ``REOPEN_BYTES``: pages of tensors that the caller has dropped are released.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype | None, format: WeightFormat | None = None
    ) -> None:
        self.folder = folder
        self._files = _tensor_files(folder)
        self._open: dict[str, Any] = {}
        self._mapped: dict[str, int] = {}
        self.unread = set(self._files)
        self.dtype = dtype or self._stored_dtype()
        self.format = format or Checkpoint()

    def _stored_dtype(self) -> torch.dtype:
        """The type of the first matrix; float16 widens to float32, which holds it exactly."""
        for name in sorted(self._files):
            part = self._handle(name).get_slice(name)
            if len(part.get_shape()) == 2 and part.get_dtype() in _FLOATS:
                dtype = _FLOATS[part.get_dtype()]
                return torch.float32 if dtype is torch.float16 else dtype
        return torch.float32

    def _handle(self, name: str) -> Any:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = _open(self.folder / file)
        return self._open[file]

    def total_bytes(self) -> int:
        """Bytes of all files, for the progress bar."""
        return sum((self.folder / file).stat().st_size for file in set(self._files.values()))

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that name, in the type it is stored in."""
        self.check(name, shape, _FLOATS)
        return self.tensor(name)

    def check(self, name: str, shape: tuple[int, ...], kinds: Iterable[str]) -> None:
        """Raise a CheckpointError unless there is such a tensor, stored as one of ``kinds``."""
        if name not in self._files:
            raise CheckpointError(
                f"tensor {name!r} is missing",
                self.folder,
                "The checkpoint is incomplete or belongs to another architecture; download it "
                "again or correct model_type in config.json.",
            )
        path = self.folder / self._files[name]
        handle = self._handle(name)
        try:
            part = handle.get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"tensor {name!r} is not in the shard that the index names",
                path,
                "Download model.safetensors.index.json and this shard again.",
            ) from error
        found, kind = tuple(part.get_shape()), part.get_dtype()
        if found != shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(found)}, expected {list(shape)}",
                path,
                "config.json does not belong to these weights; download both again.",
            )
        if kind not in (known := list(kinds)):
            raise CheckpointError(
                f"tensor {name!r} has dtype {kind}; {' and '.join(known)} can be loaded",
                path,
                "Use the original, unquantized checkpoint.",
            )
        self.unread.discard(name)

    def tensor(self, name: str) -> Tensor:
        """A tensor of any type that `check` found."""
        found: Tensor = self._handle(name).get_tensor(name)
        self._account(name, found.nbytes)
        return found

    def kind(self, name: str) -> str:
        """The type in which a tensor is stored, by its name in the file."""
        return str(self._handle(name).get_slice(name).get_dtype())

    def rows(self, name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
        """Parts are views of the mapped file; one is to be dropped before the next is asked for."""
        self.check(name, shape, _FLOATS)
        return self.parts(name)

    def parts(self, name: str) -> Iterator[Tensor]:
        """Some rows of a tensor of any type at a time."""
        count = self._handle(name).get_slice(name).get_shape()[0]
        start = 0
        while start < count:
            whole: Tensor = self._handle(name).get_tensor(name)
            step = max(1, REOPEN_BYTES // max(1, whole[:1].nbytes))
            part = whole[start : start + step]
            del whole
            self._account(name, part.nbytes)
            start += len(part)
            yield part

    def stored(self, wanted: Matrix) -> Weight | None:
        return None

    def _account(self, name: str, nbytes: int) -> None:
        file = self._files[name]
        self._mapped[file] = self._mapped.get(file, 0) + nbytes
        if self._mapped[file] > REOPEN_BYTES:
            del self._open[file], self._mapped[file]


def _open(path: Path) -> Any:
    """A safetensors handle; the header's length is checked against the file before it is read."""
    again = "Download the file again."
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
        if len(head) < 8 or int.from_bytes(head, "little") > size - 8:
            raise CheckpointError("truncated, or not a safetensors file", path, again)
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"not a readable safetensors file ({error})", path, again) from error


def _tensor_files(folder: Path) -> dict[str, str]:
    """Which file holds each tensor."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError("no 'weight_map' in the index", index, "Download it again.")
        for file in set(_strings(weight_map.values(), index)):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"the index names {file!r}, which is not a .safetensors file of this folder",
                    index,
                    "Do not use this checkpoint.",
                )
            if not (folder / file).is_file():
                raise CheckpointError(
                    f"shard {file!r} is missing", folder, "Download the checkpoint again."
                )
        return weight_map
    if single.is_file():
        return dict.fromkeys(_open(single).keys(), single.name)
    pickles = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    )
    if pickles:
        raise CheckpointError(
            f"only pickled weights here ({', '.join(pickles[:3])}), which can run code when read",
            folder,
            "Convert them to safetensors in a place you trust, or use a revision that has them.",
        )
    raise CheckpointError(
        "no model.safetensors and no model.safetensors.index.json",
        folder,
        "Give the folder of a checkpoint in the Hugging Face layout with safetensors weights.",
    )


def _strings(values: Iterable[Any], path: Path) -> list[str]:
    found = list(values)
    if not all(isinstance(value, str) for value in found):
        raise CheckpointError("'weight_map' must map names to files", path, "Download it again.")
    return found
