"""What a trained model can do: bits per byte, exact match per task and length, loops, agreement.

Exact match needs no generation: greedy decoding gives the expected answer if and only if every
token of the answer, and the stop mark, is the argmax after the tokens before it. One pass over the
document decides.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from hasten.training.bpe import ASSISTANT, BOS, END, EOS, USER
from hasten.training.conversation import small_exchange
from hasten.training.data import encode_files, encode_sample
from hasten.training.model import Llama
from hasten.training.tasks import Sample, Task

LENGTHS = (128, 256, 512, 1024)


@torch.no_grad()
def greedy_next(model: Llama, tokens: Tensor) -> Tensor:
    """The argmax after every position: ``[B, L]`` to ``[B, L]``."""
    return model.logits(model(tokens)).argmax(-1)


@dataclass(frozen=True)
class CodeScore:
    """Held-out code: perplexity per token and bits per byte of text."""

    perplexity: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def score_code(
    model: Llama, tokenizer: Tokenizer, texts: Sequence[str], length: int = 1024
) -> CodeScore:
    """Loss over windows of ``length`` tokens without overlap; every token counts once."""
    stream, _ = encode_files(tokenizer, texts)
    total, count = 0.0, 0
    for start in range(0, len(stream) - 1, length):
        piece = torch.from_numpy(stream[start : start + length + 1])[None]
        hidden = model(piece[:, :-1])
        logits = model.logits(hidden).float().flatten(0, 1)
        total += torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum").item()
        count += piece.shape[1] - 1
    size = sum(len(text.encode()) for text in texts)
    return CodeScore(math.exp(total / count), total / math.log(2) / size, count)


def sample_of_length(
    task: Task, tokenizer: Tokenizer, rng: random.Random, tokens: int
) -> Sample | None:
    """A sample with one question whose document has 80 to 100 % of ``tokens``, if the task can."""
    wanted = tokens * 0.9
    for _ in range(12):
        sample = task.generate(rng, int(wanted), queries=1)
        size = len(tokenizer.encode(sample.text, add_special_tokens=False).ids) + 1
        if 0.8 * tokens <= size <= tokens:
            return sample
        wanted = min(4 * tokens, max(16, wanted * (0.9 * tokens / size) ** 0.7))
    return None


def answered(model: Llama, tokenizer: Tokenizer, sample: Sample) -> bool:
    """Whether greedy decoding after ``sample.prompt`` gives the expected answer and then stops."""
    ids, scored = encode_sample(tokenizer, sample)
    answer = np.flatnonzero(scored)
    if sample.stop != END:
        answer = answer[:-1]  # the <|eos|> after the document is nobody's question
    tokens = torch.from_numpy(ids)[None]
    best = greedy_next(model, tokens[:, :-1])[0].numpy()
    return bool((best[answer - 1] == ids[answer]).all())


def exact_match(
    model: Llama,
    tokenizer: Tokenizer,
    task: Task,
    tokens: int,
    count: int,
    seed: str = "validate",
) -> float | None:
    """Share of ``count`` fresh samples answered exactly; None where the task is never that long."""
    right = done = 0
    for index in range(count):
        rng = random.Random(f"{seed}/{task.name}/{tokens}/{index}")
        sample = sample_of_length(task, tokenizer, rng, tokens)
        if sample is None:
            continue
        done += 1
        right += answered(model, tokenizer, sample)
    return right / done if done >= count // 2 else None


def exact_match_any_length(
    model: Llama, tokenizer: Tokenizer, task: Task, count: int, seed: str = "validate"
) -> float:
    """Share answered exactly of single questions of the task's own length."""
    rngs = (random.Random(f"{seed}/{task.name}/short/{index}") for index in range(count))
    return sum(answered(model, tokenizer, task.generate(rng, 96, 1)) for rng in rngs) / count


def ends_in_loop(tokens: Sequence[int], longest: int = 48, least: int = 24) -> bool:
    """Whether the end repeats one n-gram at least three times over at least ``least`` tokens."""
    for period in range(1, longest + 1):
        span = max(3 * period, least)
        tail = tokens[-span:]
        if len(tail) == span and all(tail[i] == tail[i - period] for i in range(period, span)):
            return True
    return False


@dataclass(frozen=True)
class Continuation:
    """A prompt and the model's greedy continuation, without padding after the stop token."""

    kind: str
    prompt: list[int]
    output: list[int]


def open_prompts(
    tokenizer: Tokenizer, texts: Sequence[str], count: int, length: int = 128
) -> list[tuple[str, list[int]]]:
    """``count`` beginnings of held-out code and as many chat turns."""
    rng = random.Random("validate/open")
    bos = int(tokenizer.token_to_id(BOS) or 0)
    prompts: list[tuple[str, list[int]]] = []
    for _ in range(count):
        ids: list[int] = tokenizer.encode(rng.choice(texts), add_special_tokens=False).ids
        start = rng.randrange(max(1, len(ids) - length))
        prompts.append(("code", [bos, *ids[start : start + length - 1]]))
    for _ in range(count):
        text = f"{BOS}{USER}{small_exchange(rng).user}{END}{ASSISTANT}"
        prompts.append(("chat", tokenizer.encode(text, add_special_tokens=False).ids))
    return prompts


def continuations(
    folder: Path, prompts: Sequence[tuple[str, list[int]]], new_tokens: int = 256, rows: int = 16
) -> list[Continuation]:
    """Greedy continuations by transformers, an implementation that is not ours."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stop = set(model.generation_config.eos_token_id)
    pad = model.generation_config.pad_token_id
    found = []
    ordered = sorted(prompts, key=lambda prompt: len(prompt[1]))
    for start in range(0, len(ordered), rows):
        group = ordered[start : start + rows]
        width = max(len(ids) for _, ids in group)
        tokens = torch.tensor([[pad] * (width - len(ids)) + ids for _, ids in group])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids in group])
        output = model.generate(
            tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False
        )
        for (kind, ids), row in zip(group, output[:, width:].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in stop), len(row))
            found.append(Continuation(kind, ids, row[:end]))
    return found


@dataclass(frozen=True)
class Agreement:
    """How often the draft's argmax is the target's next token, on the target's own greedy text.

    ``accepted`` is the mean number of draft tokens accepted in a row out of ``depth``.
    """

    share: float
    accepted: float
    depth: int
    tokens: int


def agreement(draft: Llama, texts: Sequence[Continuation], depth: int = 4) -> Agreement:
    """Exact for greedy speculation: an accepted prefix is the target's text, as fed here."""
    hits = tokens = runs = starts = 0
    for text in texts:
        if not text.output:
            continue
        ids = torch.tensor([text.prompt + text.output])
        best = greedy_next(draft, ids[:, :-1])[0, len(text.prompt) - 1 :]
        same = (best == ids[0, len(text.prompt) :]).tolist()
        hits += sum(same)
        tokens += len(same)
        for start in range(len(same)):
            window = same[start : start + depth]
            runs += window.index(False) if False in window else len(window)
            starts += 1
    return Agreement(hits / max(1, tokens), runs / max(1, starts), depth, tokens)


def agreement_on_text(
    draft: Llama, target: Llama, tokenizer: Tokenizer, texts: Sequence[str], windows: int = 48
) -> float:
    """Share of positions of real text where both models have the same argmax.

    Beside ``agreement``: a small target's greedy text repeats itself, which flatters the draft.
    """
    stream, _ = encode_files(tokenizer, texts)
    size = 512
    starts = np.linspace(0, len(stream) - size - 1, windows).astype(int)
    tokens = torch.from_numpy(np.stack([stream[start : start + size] for start in starts]))
    same = [
        (greedy_next(draft, part) == greedy_next(target, part)).float().mean().item()
        for part in torch.split(tokens, 8)
    ]
    return sum(same) / len(same)


def stops_by_itself(texts: Sequence[Continuation], tokenizer: Tokenizer) -> float:
    """Share of continuations that end with a stop token."""
    stop = {tokenizer.token_to_id(END), tokenizer.token_to_id(EOS)}
    return sum(bool(t.output) and t.output[-1] in stop for t in texts) / max(1, len(texts))
