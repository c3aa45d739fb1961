"""Who is measured: a stack of hasten, or another engine on the same weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from hasten.api.frontend import Frontend
from hasten.api.run_items import ItemRunner
from hasten.bench.peers.engines import PEERS, Setup
from hasten.bench.peers.process import EngineProcess, PeerError
from hasten.bench.workloads import Item
from hasten.decoding.params import SamplingParams
from hasten.speculation.statistics import DraftStatistics
from hasten.stack import Stack


@dataclass(slots=True)
class Run:
    """One pass over a workload.

    Attributes:
        seconds: from the first prompt's submission to the last token.
        tokens: output token ids, by item.
        ttft: seconds to the first token, by item.
        tpot: seconds per token after the first, by item that took at least two steps.
        spent: seconds from the first token to the last, of all turns, by item.
        speculation: what drafts were worth, over all items.
        outside: share of the step time that was not the model's forward, where known.
    """

    seconds: float
    tokens: dict[str, list[int]]
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)
    speculation: DraftStatistics = field(default_factory=DraftStatistics)
    outside: float | None = None

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens.values())) / self.seconds

    @property
    def decode_per_second(self) -> float:
        """Tokens per second of one sequence after its first token (median over items)."""
        return 1 / median(self.tpot) if self.tpot else float("nan")


class Contestant(Protocol):
    """Something that can run a workload again and again."""

    name: str

    def run(self, items: Sequence[Item], params: SamplingParams) -> Run: ...


class HastenContestant:
    """One stack. Its prefix cache is emptied before every run."""

    def __init__(self, name: str, front: Frontend) -> None:
        self.name = name
        self.front = front

    def run(self, items: Sequence[Item], params: SamplingParams) -> Run:
        self.front.engine.cache.forget_prefixes()
        stats = self.front.engine.stats
        step, forward = stats.step_seconds, stats.forward_seconds
        began = time.perf_counter()
        run = Run(0.0, {})
        for event in ItemRunner(self.front, params).run(items):
            if not event.done:
                continue
            if event.progress.error is not None:
                raise ValueError(f"{event.progress.item.id}: {event.progress.error}")
            run.tokens[event.progress.item.id] = [
                t for result in event.progress.results for t in result.outputs[0].token_ids
            ]
            spent = 0.0
            for result in event.progress.results:
                figures = result.outputs[0].figures
                _note_times(run, figures)
                run.speculation.add(figures.speculation)
                spent += figures.token_times[-1] - figures.token_times[0]
            run.spent[event.progress.item.id] = spent
        run.seconds = time.perf_counter() - began
        spent = stats.step_seconds - step
        run.outside = 1 - (stats.forward_seconds - forward) / spent if spent else None
        return run


def _note_times(run: Run, figures: Any) -> None:
    times = figures.token_times
    run.ttft.append(times[0] - figures.arrived)
    if times[-1] > times[0]:  # else one step gave all tokens, and says nothing about the next
        run.tpot.append((times[-1] - times[0]) / (len(times) - 1))


class PeerContestant:
    """Another engine, in a process of its own that stays alive between runs.

    It takes the prompts in groups of ``batch`` that run to their end together, greedily and past
    the end-of-sequence token; others do the same with ``ignore_eos``. Times are taken in the
    engine's process; a prompt of a later group waits for the earlier ones.
    """

    def __init__(self, name: str, process: EngineProcess, tokenizer: Any, batch: int) -> None:
        self.name = name
        self._process = process
        self._tokenizer = tokenizer
        self._batch = batch

    def run(self, items: Sequence[Item], params: SamplingParams) -> Run:
        outputs = {item.params.get("max_tokens", params.max_tokens) for item in items}
        if len(outputs) != 1:
            raise ValueError("peers need the same max_tokens for every prompt of a run")
        (new,) = outputs
        run = Run(0.0, {})
        for start in range(0, len(items), self._batch):
            group = items[start : start + self._batch]
            prompts = [prompt_ids(item, self._tokenizer) for item in group]
            answer = self._process.ask(do="generate", prompts=prompts, new=new)
            times = answer["times"]
            run.tokens |= {item.id: ids for item, ids in zip(group, answer["tokens"], strict=True)}
            run.ttft += [run.seconds + times[0]] * len(group)
            if new > 1:
                run.tpot += [(times[-1] - times[0]) / (new - 1)] * len(group)
            run.seconds += times[-1]
        return run

    def close(self) -> None:
        self._process.close()


def prompt_ids(item: Item, tokenizer: Any) -> list[int]:
    """Token ids of a single prompt. Raises ``ValueError`` for a conversation."""
    if item.prompt is None:
        raise ValueError("peers run single prompts, not conversations")
    return list(tokenizer.encode(item.prompt) if isinstance(item.prompt, str) else item.prompt)


@contextmanager
def peer_contestants(
    front: Frontend,
    items: Sequence[Item],
    max_tokens: int,
    batch: int,
    setup: Setup,
    convert: bool = False,
) -> Iterator[tuple[list[PeerContestant], list[str]]]:
    """All engines that can run a model with the weights that its stack asks for.

    Yields:
        The contestants, and for each engine that cannot take part a line that says why.
    """
    from hasten import _native

    length = max(len(prompt_ids(item, front.tokenizer)) for item in items) + max_tokens
    weights = weights_name(front.stack, front.engine.model.config.dtype)
    contestants: list[PeerContestant] = []
    absent: list[str] = []
    try:
        for peer in PEERS:
            try:
                process, name = setup.start(
                    peer,
                    front.folder,
                    weights,
                    threads=_native.get_num_threads(),  # the same threads for everybody
                    length=length,
                    sequences=batch,
                    convert=convert,
                )
            except PeerError as error:
                absent.append(str(error))
            else:
                contestants.append(PeerContestant(name, process, front.tokenizer, batch))
        yield contestants, absent
    finally:
        for contestant in contestants:
            contestant.close()


def weights_name(stack: Stack, dtype: Any) -> str:
    """The weights of a stack in the words of ``Peer.forms``; ``dtype`` is the checkpoint's own."""
    weights = stack["weights"]
    if weights.card.name == "checkpoint":
        return str(weights.torch_dtype or dtype).removeprefix("torch.")
    small_head = weights.card.name == "int4" and weights.head == "int4"
    return "int4-head4" if small_head else str(weights.card.name)
