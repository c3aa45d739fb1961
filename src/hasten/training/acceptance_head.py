"""The acceptance head of SpecDec++: from a draft model's hidden states to P(accepted).

The target writes texts. Next to each of their tokens the draft model samples its own, whose label
is the probability min(1, p/q) with which rejection sampling accepts it. The head then reads the
draft's states over the sampled tokens, a share of them replaced by the target's, so that it knows
contexts that are partly wrong, as in a draft. The state that has *read* a token judges it.
(arXiv:2405.19715)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hasten.cache.layout import PAGE_SIZE, KVStorage
from hasten.cache.manager import CacheManager, Stream
from hasten.decoding.params import SamplingParams
from hasten.engine.batch import Batch, Segment
from hasten.engine.engine import Engine, EngineConfig
from hasten.models.base import Decoder
from hasten.models.loading import load_model, locate
from hasten.models.paged import PagedKV
from hasten.models.tokenizer import Tokenizer
from hasten.speculation.controllers.specdec_plus_plus import FORMAT, fingerprint
from hasten.stack import Stack
from hasten.training.corpus import split, standard_library


@dataclass(frozen=True)
class HeadRecipe:
    """How a head is trained; the paper's figures.

    Attributes:
        length: new tokens that the target writes after each prompt.
        mixing: share of the draft's tokens that are replaced by the target's and not judged.
        rejection: weight of the loss where a token is rejected.
        layers: residual layers of the head.
        warm_up: share of the steps in which the rate rises; it falls as a cosine afterwards.
        batch: texts of a step.
    """

    length: int = 128
    mixing: float = 0.15
    rejection: float = 6.0
    layers: int = 3
    epochs: int = 3
    rate: float = 1e-3
    warm_up: float = 0.03
    batch: int = 8
    seed: int = 0


class Head(nn.Module):
    """See ``AcceptanceHead``, which runs it."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers, hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(layers, hidden))
        self.out = nn.Parameter(torch.zeros(hidden))
        self.offset = nn.Parameter(torch.zeros(1))
        nn.init.normal_(self.weight, std=hidden**-0.5)
        nn.init.normal_(self.out, std=hidden**-0.5)

    def forward(self, states: Tensor) -> Tensor:
        """Logits [n] for states [n, H]."""
        for weight, bias in zip(self.weight, self.bias, strict=True):
            states = states + F.silu(states @ weight.T + bias)
        return states @ self.out + self.offset


@dataclass
class Judged:
    """States of the draft model and what became of the token that each has read.

    Attributes:
        states: float32 [n, H].
        accepted: float32 [n], probabilities.
        text: int64 [n], which text a row belongs to.
    """

    states: Tensor
    accepted: Tensor
    text: Tensor


def write_texts(
    target: Decoder, prompts: Sequence[Sequence[int]], recipe: HeadRecipe
) -> list[tuple[int, list[int]]]:
    """(length of the prompt, tokens) of texts that the target samples at temperature 1."""
    longest = max(len(prompt) for prompt in prompts) + recipe.length
    config = EngineConfig(max_sequences=16, max_length=longest + 1, prefix_reuse=False)
    engine = Engine(target, Stack.parse(), config)
    params = SamplingParams(
        max_tokens=recipe.length, temperature=1.0, top_k=0, top_p=1.0, seed=recipe.seed
    )
    requests = [engine.add(prompt, params) for prompt in prompts]
    while engine.has_work:
        engine.step()
    return [(len(r.prompt), r.sequences[0].tokens) for r in requests]


def judge(
    target: Decoder, draft: Decoder, texts: Sequence[tuple[int, list[int]]], recipe: HeadRecipe
) -> Judged:
    """The draft's states over mixed texts, with labels for the tokens that are the draft's."""
    rng = torch.Generator().manual_seed(recipe.seed)
    states, accepted, owner = [], [], []
    for number, (start, tokens) in enumerate(texts):
        if len(tokens) <= start + 1:
            continue
        p = torch.softmax(over(target, tokens)[0].double(), -1)
        q = torch.softmax(over(draft, tokens)[0].double(), -1)
        before = slice(start - 1, len(tokens) - 1)  # rows that predict the written tokens
        sampled = torch.multinomial(q[before], 1, generator=rng)[:, 0]
        chance = (p[before].gather(1, sampled[:, None]) / q[before].gather(1, sampled[:, None]))[
            :, 0
        ].clamp(max=1)
        own = torch.rand(len(sampled), generator=rng) >= recipe.mixing
        written = torch.tensor(tokens[start:])
        mixed = torch.where(own, sampled, written).tolist()
        found = over(draft, [*tokens[:start], *mixed])[1][start:]
        states.append(found[own])
        accepted.append(chance[own].float())
        owner.append(torch.full((int(own.sum()),), number))
    return Judged(torch.cat(states), torch.cat(accepted), torch.cat(owner))


def over(model: Decoder, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logits [L, V] and normed last hidden states [L, H] of a text, in one pass."""
    layout = model.config.kv_layout()
    cache = CacheManager(layout, -(-len(tokens) // PAGE_SIZE) + 1, 1, len(tokens) + 1)
    storage = KVStorage(layout, [pool.num_pages for pool in cache.pools], model.device)
    stream = Stream(list(tokens))
    cache.attach(stream)
    cache.reserve(stream, len(tokens))
    batch = Batch.build([Segment(stream.table_row, 0, tokens, wanted="all")], cache.tables)
    batch.embedded = batch.wanted
    found = model.forward(batch, PagedKV(storage, batch))
    return model.logits(found, batch.wanted).clone(), model.embeddings(found, batch.embedded)


def train_head(
    data: Judged, recipe: HeadRecipe, progress: Callable[[int, float], None] = lambda *_: None
) -> Head:
    """Fit a head; ``progress`` hears each epoch's mean loss."""
    torch.manual_seed(recipe.seed)
    head = Head(data.states.shape[1], recipe.layers)
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.rate)
    texts = torch.unique(data.text).tolist()
    groups = [texts[i : i + recipe.batch] for i in range(0, len(texts), recipe.batch)]
    total = recipe.epochs * len(groups)
    warm = max(1, round(recipe.warm_up * total))
    rng = np.random.default_rng(recipe.seed)
    step = 0
    for epoch in range(recipe.epochs):
        losses = []
        for group in rng.permutation(len(groups)).tolist():
            rows = torch.isin(data.text, torch.tensor(groups[group]))
            label = data.accepted[rows]
            weight = label + recipe.rejection * (1 - label)
            logits = head(data.states[rows])
            # a soft label is both outcomes; the rejected share of each weighs more
            loss = (
                -(
                    label * F.logsigmoid(logits)
                    + recipe.rejection * (1 - label) * F.logsigmoid(-logits)
                ).sum()
                / weight.sum()
            )
            share = min((step + 1) / warm, 1.0)
            share *= 0.5 * (1 + np.cos(np.pi * step / total))
            for part in optimizer.param_groups:
                part["lr"] = recipe.rate * share
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            step += 1
        progress(epoch + 1, float(np.mean(losses)))
    return head.eval()


def save_head(head: Head, draft: str, path: Path) -> None:
    """Write a head for the draft model with this fingerprint, whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    tensors = {name: value.detach().contiguous() for name, value in head.state_dict().items()}
    save_file(tensors, fresh, metadata={"format": FORMAT, "draft": draft})
    fresh.chmod(0o644)  # safetensors writes for the owner only
    fresh.replace(path)


def make_head(
    target: str,
    draft: str,
    out: Path,
    recipe: HeadRecipe,
    prompts: Sequence[str] | None = None,
    count: int = 512,
    report: Callable[[str], None] = lambda _: None,
) -> None:
    """Write texts, judge them, train and save a head.

    Raises:
        ValueError: no prompts, or the models have different vocabularies.
    """
    folder = locate(target)
    tokenizer = Tokenizer.load(folder)
    writer = load_model(folder, progress=False)
    drafter = load_model(locate(draft), progress=False)
    sizes = [model.config.vocab_size for model in (writer, drafter)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{target} and {draft} have different vocabularies: {sizes}")
    longest = min(writer.config.max_positions, drafter.config.max_positions) - recipe.length - 1
    texts = functions(count) if prompts is None else prompts[:count]
    ids = [tokenizer.encode(text)[-longest:] for text in texts]
    if not ids:
        raise ValueError("there are no prompts; give a file with one a line")
    report(f"the target writes {len(ids)} texts of {recipe.length} tokens")
    data = judge(writer, drafter, write_texts(writer, ids, recipe), recipe)
    report(f"{len(data.accepted)} judged tokens, {float(data.accepted.mean()):.0%} accepted")
    head = train_head(data, recipe, lambda epoch, loss: report(f"epoch {epoch}: loss {loss:.4f}"))
    save_head(head, fingerprint(draft), out)
    report(
        f"head in {out}; use it with control=specdec++(head={out}),draft=model(path={draft},k=20)"
    )


def functions(count: int) -> list[str]:
    """Beginnings of functions in the part of the standard library that models train on."""
    found = []
    for file in split(standard_library())[0]:
        lines = file.text.splitlines(keepends=True)
        starts = [at for at, line in enumerate(lines) if line.lstrip().startswith("def ")]
        if starts:
            at = starts[len(starts) // 2]
            found.append("".join(lines[max(0, at - 20) : at + 1])[-1000:])
        if len(found) == count:
            break
    return found
