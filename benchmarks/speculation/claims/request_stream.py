"""Requests one after the other, and what their drafts were worth: shared by claims about tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hasten import LLM, SamplingParams
from hasten.bench.workloads import workload
from hasten.speculation.statistics import DraftStatistics
from hasten.speculation.trigrams import TrigramCounter, save
from hasten.training.corpus import split, standard_library

Outputs = list[list[int]]


def prompts_of(llm: LLM, name: str, count: int) -> list[list[int]]:
    """Prompts of a workload as token ids; a conversation gives its first question, as a chat."""
    return [
        llm.chat_prompt([{"role": "user", "content": item.turns[0]}])
        if item.turns
        else llm.tokenizer.encode(str(item.prompt))
        for item in workload(name, count)
    ]


def params_of(count: int, tokens: int, temperature: float) -> list[SamplingParams]:
    """Seeded sampling: greedy texts of a small model end in loops, which any table learns."""
    return [
        SamplingParams(max_tokens=tokens, temperature=temperature, seed=i, ignore_eos=True)
        for i in range(count)
    ]


def run(
    llm: LLM, prompts: Sequence[str | list[int]], params: Sequence[SamplingParams], at_once: int = 1
) -> tuple[Outputs, list[DraftStatistics]]:
    """The tokens of each request, and the statistics of each group of ``at_once`` requests."""
    outputs, found = [], []
    for first in range(0, len(prompts), at_once):
        which = slice(first, first + at_once)
        results = llm.generate(prompts[which], params[which])
        counts = DraftStatistics()
        for result in results:
            outputs.append(result.outputs[0].token_ids)
            counts.add(result.outputs[0].figures.speculation)
        found.append(counts)
    return outputs, found


def tau(counts: Sequence[DraftStatistics]) -> float:
    """Tokens a target pass over several groups."""
    total = DraftStatistics()
    for each in counts:
        total.add(each)
    return round(total.tau or 0.0, 4)


def standard_library_table(llm: LLM, path: Path, files: int) -> None:
    """A table of text that was training text of the bundled model, and no prompt of ``code``."""
    counter = TrigramCounter()
    for file in split(standard_library())[0][:: max(1, 1500 // files)]:
        counter.add(llm.tokenizer.encode(file.text, add_special_tokens=False))
    save(counter.table(), llm.tokenizer, path)
