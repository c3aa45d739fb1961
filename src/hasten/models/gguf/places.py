"""Which GGUF file is meant: the one of a folder, or one quantization of a hub repository."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from hasten.models.facts import CheckpointError
from hasten.models.gguf.file import PART

BESIDE_A_MODEL = ("mmproj", "imatrix")
"""Starts of the names of files that are kept beside a model and are none."""


def file_of(folder: Path) -> Path | None:
    """The model file of a folder in which GGUF is the only format of weights; else None."""
    if any(folder.glob("*.safetensors")):
        return None
    models = _models(path.name for path in folder.glob("*.gguf"))
    if len(models) > 1:
        raise CheckpointError(
            f"{len(models)} GGUF models here: {', '.join(sorted(models))}",
            folder,
            "Give the path of one of them.",
        )
    return next((folder / parts[0] for parts in models.values()), None)


def parts_of(names: Iterable[str], wanted: str, where: str) -> list[str]:
    """The files of one model among those of a repository, the first part first.

    ``wanted`` is a file's name, or the quantization that ends it, such as Q4_K_M.
    """
    models = _models(names)
    suits = re.compile(rf"(.*[-._/])?{re.escape(wanted.removesuffix('.gguf'))}", re.IGNORECASE)
    found = [parts for model, parts in models.items() if suits.fullmatch(model)]
    if len(found) != 1:
        raise CheckpointError(
            f"{len(found)} GGUF models of the repository are named {wanted!r}, of "
            + (", ".join(sorted(models)) or "none at all"),
            where,
            "Name one of them after the colon.",
        )
    return found[0]


def _models(names: Iterable[str]) -> dict[str, list[str]]:
    """Files by model: those of a split one together."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.endswith(".gguf") and not PurePosixPath(name).name.startswith(BESIDE_A_MODEL):
            match = PART.fullmatch(name)
            models.setdefault(match["stem"] if match else name[: -len(".gguf")], []).append(name)
    return models
