"""From a path or hub id to a `Decoder`. No code from a checkpoint ever runs.

The architecture is a module of this package, chosen by ``model_type`` among those that exist
here; ``auto_map``, which would name Python files of the checkpoint, is never followed.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hasten.models
from hasten.decoding.params import SamplingParams
from hasten.kernels.linear import Weight
from hasten.models.base import Decoder, ModelConfig
from hasten.models.checkpoint import SafetensorsWeights
from hasten.models.facts import CheckpointError, Facts, read_json
from hasten.models.gguf.architectures import facts_of, recommended
from hasten.models.gguf.file import GGUF, is_gguf
from hasten.models.gguf.places import file_of, parts_of
from hasten.models.gguf.weights import GGUFWeights
from hasten.weights.base import Matrix, WeightFormat
from hasten.weights.checkpoint import Checkpoint
from hasten.weights.saved import SavedWeights, reconciled, saved_format

__all__ = ["CheckpointError", "architectures", "load_config", "load_model", "locate"]

log = logging.getLogger(__name__)

PARTS = {"base", "chat_template", "checkpoint", "facts", "gguf", "layers", "loading", "paged"}
PARTS |= {"device", "tokenizer"}
"""Modules of this package that are not architectures."""

REFERENCE = Path(__file__).parents[1] / "reference"
"""Folder of the models that come with the package: ``reference`` and ``reference-draft``."""

_BUNDLED = {"reference": REFERENCE / "target", "reference-draft": REFERENCE / "draft"}

HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<file>[\w.-]+))?(@(?P<revision>[\w./-]+))?")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]

# Leftovers that carry no weights of their own.
UNUSED = re.compile(r".*\.rotary_emb\.inv_freq|.*\.masked_bias|lm_head\.weight")


def architectures() -> list[str]:
    """Values of ``model_type`` that can be loaded: the modules of this package."""
    names = {module.name for module in pkgutil.iter_modules(hasten.models.__path__)}
    return sorted(names - PARTS)


def locate(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """The folder or GGUF file of a model: a path, what the hub has under an id, or a bundled one.

    ``org/name[@revision]`` is a checkpoint in the Hugging Face layout, ``org/name:Q4_K_M`` the
    GGUF file of that quantization. A folder whose weights are one GGUF file stands for that file.
    """
    path = _BUNDLED.get(str(path_or_hub_id), Path(path_or_hub_id)).expanduser()
    if path.is_dir():
        return file_of(path) or path
    if path.is_file() and is_gguf(path):
        return path
    match = HUB_ID.fullmatch(str(path_or_hub_id))
    if path.exists() or not match:
        raise CheckpointError(
            "not a folder" if path.exists() else "no such folder, and not a hub id",
            str(path_or_hub_id),
            "Give the folder that holds config.json, a .gguf file, or a hub id such as org/name, "
            "org/name@revision or org/name:Q4_K_M.",
        )
    try:
        if match["file"]:
            return _gguf_from_hub(match["id"], match["revision"], match["file"])
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                match["id"],
                revision=match["revision"],
                allow_patterns=HUB_FILES,
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except CheckpointError:
        raise
    except Exception as error:  # offline, gated, no such id or revision: told alike
        detail = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"no such folder, and nothing from the hub ({type(error).__name__}: {detail})",
            str(path_or_hub_id),
            "Check the id and the network. Without a network give the path of a folder, or set "
            "HF_HUB_OFFLINE=1 to use a copy that was downloaded earlier.",
        ) from error


def _gguf_from_hub(name: str, revision: str | None, wanted: str) -> Path:
    """The first part of one GGUF model of a repository; offline of its downloaded copy."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        folder = Path(snapshot_download(name, revision=revision))
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
    else:
        files = HfApi().list_repo_files(name, revision=revision)
    parts = parts_of(files, wanted, name)
    return Path(snapshot_download(name, revision=revision, allow_patterns=parts)) / parts[0]


def load_config(folder: Path, dtype: torch.dtype) -> ModelConfig:
    """Facts of the model in a folder or GGUF file, without its weights."""
    facts = read_facts(folder)
    return _architecture(facts).configure(facts, dtype)


def load_model(
    path_or_hub_id: str | Path,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    max_length: int | None = None,
    format: WeightFormat | None = None,
) -> Decoder:
    """Read a checkpoint in the Hugging Face layout or a GGUF file.

    ``format`` is the form in which matrices are held, by default that in which they are stored
    (float16 widens to float32); ``dtype``, float32 or bfloat16, is short for the format that holds
    them in this type. With ``progress`` a bar is drawn if standard error is a terminal.
    ``max_length`` is the longest sequence that will run, None = what the model was made for: a
    model with LongRoPE is another one within its original context.
    """
    if dtype is not None:
        if format is not None or dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"weights are held as float32 or bfloat16, not {dtype} and {format}")
        format = Checkpoint(str(dtype).removeprefix("torch."))
    format = format or Checkpoint()
    folder = locate(path_or_hub_id)
    source = _opened(folder)
    facts = read_facts(source)
    facts.longest = max_length
    weights: GGUFWeights | SafetensorsWeights
    if isinstance(source, GGUF):
        weights = GGUFWeights(source, facts, format.torch_dtype, format)
    elif (saved := saved_format(facts)) is not None:
        format = reconciled(saved, format, facts)
        weights = SavedWeights(folder, format.torch_dtype or stated_dtype(facts), format, saved)
    else:
        weights = SafetensorsWeights(folder, format.torch_dtype or stated_dtype(facts), format)
    model = build_model(facts, weights, progress)
    model.sampling_defaults = sampling_defaults(source)
    return model


def build_model(
    facts: Facts, weights: GGUFWeights | SafetensorsWeights, progress: bool = False
) -> Decoder:
    """The model that ``facts`` describe, read from ``weights``; without sampling defaults."""
    module = _architecture(facts)
    config = module.configure(facts, weights.dtype)
    with _progress(weights, progress) as watched:
        model: Decoder = module.Model(config, watched)
    if unread := sorted(name for name in weights.unread if not UNUSED.fullmatch(name)):
        log.warning(
            "%s: %d tensors are not part of architecture %s and were ignored, among them %s",
            facts.path,
            len(unread),
            config.architecture,
            ", ".join(unread[:3]),
        )
    return model


def _opened(source: Path | GGUF) -> Path | GGUF:
    """A GGUF file with its header read, which takes a while; a folder as it is."""
    return GGUF(source) if isinstance(source, Path) and is_gguf(source) else source


def read_facts(source: Path | GGUF) -> Facts:
    """config.json, with the end tokens of generation_config.json where it states them; the same
    from the metadata of a GGUF file."""
    folder = _opened(source)
    if isinstance(folder, GGUF):
        return facts_of(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            "no config.json", folder, "Give the folder of a checkpoint in the Hugging Face layout."
        )
    values = read_json(path)
    if (eos := _generation_config(folder).get("eos_token_id")) is not None:
        values["eos_token_id"] = eos
    return Facts(values, path)


def sampling_defaults(source: Path | GGUF) -> dict[str, Any]:
    """Sampling settings that the checkpoint recommends: in generation_config.json, or in the
    metadata of a GGUF file."""
    folder = _opened(source)
    if isinstance(folder, GGUF):
        stated = Facts(recommended(folder), folder.path)
    else:
        stated = Facts(_generation_config(folder), folder / "generation_config.json")
    defaults: dict[str, Any] = {}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        value = stated.values.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise stated.wrong(f"{name!r} must be a number, found {value!r}")
        defaults[name] = 0 if (name, value) == ("top_k", -1) else value  # both mean: all
    try:
        SamplingParams(**defaults)
    except ValueError as error:
        raise stated.wrong(str(error)) from None
    if not stated.flag("do_sample", True):
        defaults["temperature"] = 0.0
    return defaults


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def _architecture(facts: Facts) -> Any:
    """The module for ``model_type``; the name is looked up among ours before any import."""
    name, custom = facts.values.get("model_type"), "auto_map" in facts.values
    known = architectures()
    if name not in known:
        needs = "needs Python code of its own, which hasten never runs" if custom else ""
        raise CheckpointError(
            f"unknown architecture {name!r} {needs}".rstrip(),
            facts.path,
            f"Supported values of model_type: {', '.join(known)}.",
        )
    if facts.states("quantization_config") and saved_format(facts) is None:
        raise CheckpointError(
            "the weights are quantized, which is not supported as yet",
            facts.path,
            "Use the original, unquantized checkpoint.",
        )
    if custom:
        log.warning("%s: 'auto_map' ignored; code from a checkpoint is never run", facts.path)
    return importlib.import_module(f"hasten.models.{name}")


def stated_dtype(facts: Facts) -> torch.dtype | None:
    """``dtype`` (transformers 5) or ``torch_dtype``; None leaves it to the stored tensors."""
    name = facts.values.get("dtype") or facts.values.get("torch_dtype")
    stated = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float32}
    return stated.get(name) if isinstance(name, str) else None


class _Counted:
    """Weights that advance a progress bar."""

    def __init__(self, weights: GGUFWeights | SafetensorsWeights, advance: Any) -> None:
        self.dtype = weights.dtype
        self.format = weights.format
        self._weights = weights
        self._advance = advance

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._weights.get(name, shape)
        self._advance(tensor.nbytes)
        return tensor

    def rows(self, name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
        parts = self._weights.rows(name, shape)

        def counted() -> Iterator[Tensor]:
            for part in parts:
                self._advance(part.nbytes)
                yield part

        return counted()

    def stored(self, wanted: Matrix) -> Weight | None:
        weight = self._weights.stored(wanted)
        if weight is not None:
            self._advance(weight.nbytes)
        return weight


@contextmanager
def _progress(weights: GGUFWeights | SafetensorsWeights, wanted: bool) -> Iterator[Any]:
    if not wanted or not sys.stderr.isatty():
        yield weights
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=weights.total_bytes())
        yield _Counted(weights, lambda nbytes: bar.advance(task, nbytes))
