"""Methods that need files (a draft model, a trained head, a datastore), with tiny ones.

The shared tests run every registered method on a random model with 61 token ids. A method whose
parameters have no default that fits gets them here, and only here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from hasten.methods import Card
from hasten.models import llama
from tests.conftest import RandomWeights, tiny_facts
from tests.speculation.self_drafts import random_adapter

VOCAB = 61
Needed = dict[str, Callable[[Path], str]]


@cache
def tiny_draft(folder: Path) -> Path:
    """A random one-layer Llama with ``VOCAB`` ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        eos_token_id=1,
        bos_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder / "draft")
    return folder / "draft"


@cache
def tiny_adapter(folder: Path) -> Path:
    """For the random Llama of two layers, which is told by its sizes and its last norm."""
    model = llama.Model(llama.configure(tiny_facts(), torch.float32), RandomWeights(0, 0.25))
    random_adapter(model, folder / "adapter", layer=1)
    return folder / "adapter"


PARAMETERS: Needed = {
    "model": lambda folder: f"path={tiny_draft(folder)},k=3",
    "easyspec": lambda folder: f"path={tiny_draft(folder)},k=3",
    "pearl": lambda folder: f"path={tiny_draft(folder)},k=3",
    "dyspec": lambda folder: f"path={tiny_draft(folder)},n=7",
    "s2d": lambda folder: f"path={tiny_draft(folder)},k=3,exits=1,threshold=0.3",
    "kangaroo": lambda folder: f"head={tiny_adapter(folder)},eta=0.1,k=4",
    "del": lambda folder: "k=5",
    "rsd": lambda folder: f"path={tiny_draft(folder)},width=3,depth=3",
}
"""Method name -> parameters, given a folder for files."""


def example(card: Card, folder: Path) -> str:
    """The choice of a slot that runs the method on a tiny model."""
    inside = PARAMETERS.get(card.name)
    choice = card.name if inside is None else f"{card.name}({inside(folder)})"
    return f"{card.slots[0]}={choice}"
