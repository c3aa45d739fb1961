"""Methods that need files (a draft model, a trained head, a datastore), with tiny ones.

The shared tests run every registered method on a random model with 61 token ids. A method whose
parameters have no default that fits gets them here, and only here.
"""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from hasten.methods import Card
from hasten.models.base import Decoder
from hasten.speculation.controllers.specdec_plus_plus import fingerprint
from hasten.speculation.datastore import write
from hasten.training.acceptance_head import Head, save_head
from tests.conftest import RandomWeights, favorite_successors, tiny_facts
from tests.speculation.self_drafts import random_adapter

VOCAB = 61
HABIT = 0.6
"""Of the models that the shared tests run methods on: enough for each drafter to be right at times
and wrong at times."""
Needed = dict[str, Callable[[Path], str]]


def tiny_target(tiny: Callable[..., Decoder]) -> Decoder:
    """What `tiny_draft` drafts for."""
    return tiny("llama", **SIZES, habit=HABIT)


@cache
def tiny_draft(folder: Path, vocab: int = VOCAB, layers: int = 2) -> Path:
    """A Llama with ``vocab`` ids that often agrees with `tiny_target`: the same random weights with
    some noise."""
    out = folder / f"draft-{vocab}-{layers}"
    out.mkdir(exist_ok=True)
    sizes = {"vocab_size": vocab, "num_hidden_layers": layers}
    (out / "config.json").write_text(json.dumps({**FACTS, **sizes}))
    save_file(dict(_weights(vocab, layers)), out / "model.safetensors")
    return out


SIZES = {"intermediate_size": 64}
FACTS = tiny_facts("llama", **SIZES, max_position_embeddings=512).values


def _weights(vocab: int, layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    habit = HABIT if vocab == VOCAB else 0.0  # `tiny_target` has the usual ids
    random, noise = RandomWeights(0, 0.25, habit=habit), RandomWeights(1, 0.02)
    hidden, inner = FACTS["hidden_size"], FACTS["intermediate_size"]
    heads, kv_heads = FACTS["num_attention_heads"], FACTS["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (heads * FACTS["head_dim"], hidden),
            f"{at}.self_attn.k_proj.weight": (kv_heads * FACTS["head_dim"], hidden),
            f"{at}.self_attn.v_proj.weight": (kv_heads * FACTS["head_dim"], hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, heads * FACTS["head_dim"]),
            f"{at}.mlp.gate_proj.weight": (inner, hidden),
            f"{at}.mlp.up_proj.weight": (inner, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, inner),
        }
    for name, shape in shapes.items():
        tensor = random.get(name, shape)
        yield name, tensor if len(shape) == 1 else tensor + noise.get(name, shape)


@cache
def tiny_datastore(folder: Path) -> Path:
    """Texts by the habits of `tiny_target`, which take another turn now and then."""
    rng, favorites = random.Random(0), favorite_successors(VOCAB).tolist()
    text = [2]
    for _ in range(4000):
        text.append(rng.randrange(2, VOCAB) if rng.random() < 0.3 else favorites[text[-1]])
    ids = torch.tensor([*text, -1], dtype=torch.int32)
    write(folder / "tiny.store", ids, "")
    return folder / "tiny.store"


def tiny_head(folder: Path) -> Path:
    """An acceptance head for `tiny_draft`, untrained."""
    out = folder / "head.safetensors"
    save_head(Head(FACTS["hidden_size"], 2), fingerprint(str(tiny_draft(folder))), out)
    return out


@cache
def tiny_adapter(folder: Path, architecture: str) -> Path:
    """For the random model of two layers, which is told by its sizes and its last norm."""
    module = importlib.import_module(f"hasten.models.{architecture}")
    config = module.configure(tiny_facts(architecture, sliding_window=20), torch.float32)
    path = folder / f"adapter-{architecture}"
    random_adapter(module.Model(config, RandomWeights(0, 0.25, habit=HABIT)), path, layer=1)
    return path


PARAMETERS: Needed = {
    "draft=model": lambda folder: f"path={tiny_draft(folder)},k=3",
    "draft=easyspec": lambda folder: f"path={tiny_draft(folder, layers=4)},k=3,group=2",
    "draft=pearl": lambda folder: f"path={tiny_draft(folder)},k=3",
    "draft=dyspec": lambda folder: f"path={tiny_draft(folder)},n=7",
    "draft=s2d": lambda folder: f"path={tiny_draft(folder)},k=3,exits=1/2,threshold=0.3",
    "draft=retrieval": lambda folder: f"file={tiny_datastore(folder)},shortest=1",
    "draft=rasd": lambda folder: (
        f"base=model(path={tiny_draft(folder)},k=3),top=30,"
        f"of=retrieval(file={tiny_datastore(folder)},shortest=1)|copyspec(gamma=1)"
    ),
    "control=specdec++": lambda folder: f"head={tiny_head(folder)}",
    "draft=del": lambda folder: "k=5",
    "draft=scripted": lambda folder: "k=2,width=8",
    "draft=rsd": lambda folder: f"path={tiny_draft(folder)},width=3,depth=3",
    "draft=nested": lambda folder: (
        f"of=fuse(of=prompt-lookup(max_ngram=1)|token-recycling),path={tiny_draft(folder)},"
        "k=5,width=3"
    ),
}
"""Slot and method -> parameters, given a folder for files."""

BESIDE: Needed = {
    "control=specdec++": lambda folder: f"draft=model(path={tiny_draft(folder)},k=3),",
}
"""Slot and method -> what else its stack needs."""


def example(card: Card, folder: Path, architecture: str = "llama") -> str:
    """The choice of a slot that runs the method on a tiny model."""
    choice = f"{card.slots[0]}={card.name}"
    if choice == "draft=kangaroo":
        return f"{choice}(head={tiny_adapter(folder, architecture)},eta=0.1,k=4)"
    beside = BESIDE.get(choice, lambda _: "")(folder)
    if choice in PARAMETERS:
        choice += f"({PARAMETERS[choice](folder)})"
    return beside + choice
