"""Reading a checkpoint in the Hugging Face layout: its JSON facts and its safetensors.

A checkpoint is untrusted input. Nothing in it is executed, every length is checked against the
size of the file before anything of that length is allocated, and whatever is wrong is told once,
as a `CheckpointError` that names the file and what to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MAX_JSON_BYTES = 256 << 20  # the largest tokenizer files have some tens of megabytes
REOPEN_BYTES = 512 << 20  # read so much through one memory map, then let its pages go

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: what is wrong, where, and what to do."""

    def __init__(self, what: str, where: str | Path, remedy: str) -> None:
        super().__init__(f"{what} [{where}]. {remedy}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    again = "Download the file again or correct it."
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"more than {MAX_JSON_BYTES >> 20} MiB of JSON", path, again)
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"cannot read the file ({error.strerror})", path, "Check the path and its permissions."
        ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"invalid JSON ({error})", path, again) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"a JSON object expected, found {type(value).__name__}", path, again)
    return value


class Facts:
    """Typed access to config.json: a wrong or missing value is named, never guessed around."""

    def __init__(self, values: dict[str, Any], path: str | Path) -> None:
        self.values = values
        self.path = path

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(what, self.path, "Correct the file, or use another checkpoint.")

    def _get(self, key: str, kinds: tuple[type, ...], wanted: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.wrong(f"{key!r} is missing")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.wrong(f"{key!r} must be {wanted}, found {value!r}")
        return value

    def count(
        self, key: str, default: int | None = None, least: int = 1, most: int = 2**31 - 1
    ) -> int:
        """An integer in [least, most]."""
        value: int = self._get(key, (int,), "an integer", default)
        if not least <= value <= most:
            raise self.wrong(f"{key!r} must lie in [{least}, {most}], found {value}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = float(self._get(key, (int, float), "a number", default))
        if not 0 < value < float("inf"):
            raise self.wrong(f"{key!r} must be a positive number, found {value}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._get(key, (bool,), "true or false", default))

    def states(self, key: str) -> bool:
        """Whether the key has a value other than null."""
        return self.values.get(key) is not None

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse a value that changes the function computed; a missing key is the first one."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            names = " or ".join(repr(one) for one in allowed)
            raise CheckpointError(
                f"{key!r} is {value!r}; this architecture runs {names} only",
                self.path,
                "Use a checkpoint without it.",
            )

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id, a list of them, or none."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise self.wrong(f"{key!r} must be a token id or a list of them, found {value!r}")
        return tuple(i for i in ids if i >= 0)


class SafetensorsWeights:
    """The tensors of one folder, read through memory maps, one at a time.

    ``get`` returns views of the mapped file. To bound the memory held for a file, its map is
    replaced after ``REOPEN_BYTES``: pages of tensors that the caller has dropped are released.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None) -> None:
        self.folder = folder
        self._files = _tensor_files(folder)
        self._open: dict[str, Any] = {}
        self._mapped: dict[str, int] = {}
        self.unread = set(self._files)
        self.dtype = dtype or self._stored_dtype()

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
        if kind not in _FLOATS:
            raise CheckpointError(
                f"tensor {name!r} has dtype {kind}; F32, BF16 and F16 can be loaded",
                path,
                "Use the original, unquantized checkpoint.",
            )
        tensor: Tensor = handle.get_tensor(name)
        self.unread.discard(name)
        self._account(name, tensor.nbytes)
        return tensor

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
