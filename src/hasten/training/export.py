"""Models in the Hugging Face layout: written whole or not at all, read back for validation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from hasten.models.facts import write_json
from hasten.training.bpe import BOS, END, EOS, PAD, save_tokenizer
from hasten.training.model import Llama, LlamaShape

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def llama_config(
    shape: LlamaShape,
    dtype: torch.dtype,
    *,
    bos: int | None,
    eos: Sequence[int],
    pad: int | None = None,
) -> dict[str, Any]:
    """``config.json`` of a Llama with tied embeddings; ``eos`` are the tokens that end a text."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape.to_dict(),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": list(eos),
        "pad_token_id": pad,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "dtype": DTYPE_NAMES[dtype],
        "torch_dtype": DTYPE_NAMES[dtype],
        "use_cache": True,
    }


def write_model(model: Llama, config: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
    """Write the weights, ``config.json`` and ``generation_config.json``."""
    tensors = {
        name: value.detach().to(dtype).contiguous() for name, value in model.state_dict().items()
    }
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes for the owner only
    write_json(folder / "config.json", config)
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "do_sample": False,
    }
    write_json(folder / "generation_config.json", generation)


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``folder`` at the end."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    replace_folder(fresh, folder)


def export_model(
    model: Llama, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write weights, configs and tokenizer to ``folder``, replacing what was there at the end."""
    config = llama_config(
        model.shape,
        dtype,
        bos=tokenizer.token_to_id(BOS),
        eos=[i for name in (EOS, END) if (i := tokenizer.token_to_id(name)) is not None],
        pad=tokenizer.token_to_id(PAD),
    )
    with fresh_folder(folder) as fresh:
        write_model(model, config, fresh, dtype)
        save_tokenizer(tokenizer, fresh, model.shape.max_position_embeddings)


def replace_folder(fresh: Path, folder: Path) -> None:
    """Put ``fresh`` in the place of ``folder``; readers see the old or the new one, never a mix."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_shape(folder: Path) -> LlamaShape:
    """The shape from a ``config.json``."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return LlamaShape(**{name: config[name] for name in LlamaShape.__dataclass_fields__})


def load_exported(folder: Path) -> tuple[Llama, Tokenizer]:
    """An exported model as the training module, in float32, with its tokenizer."""
    model = Llama(read_shape(folder))
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in tensors.items()})
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))
