"""Who is measured: a stack of hasten, or another engine on the same weights."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from hasten.api.frontend import Frontend
from hasten.api.run_items import ItemRunner
from hasten.bench.peers.engines import PEERS, Peer, Setup, Speculation
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
        whole: seconds of an item with its prompts, where one item runs at a time.
        decoded: tokens in that time, the first of each turn left out, by item.
        speculation: what drafts were worth, over all items.
        outside: share of the step time that was not the model's forward, where known.
    """

    seconds: float
    tokens: dict[str, list[int]]
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    decoded: dict[str, int] = field(default_factory=dict)
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
        run, free = Run(0.0, {}), 0.0  # since when nobody is served
        for event in ItemRunner(self.front, params).run(items):
            if not event.done:
                continue
            if event.progress.error is not None:
                raise ValueError(f"{event.progress.item.id}: {event.progress.error}")
            run.tokens[event.progress.item.id] = [
                t for result in event.progress.results for t in result.outputs[0].token_ids
            ]
            for result in event.progress.results:
                figures = result.outputs[0].figures
                times = figures.token_times
                begun = max(free, figures.arrived)
                free = times[-1]
                _note_times(run, event.progress.item.id, times, figures.arrived, begun)
                run.speculation.add(figures.speculation)
        run.seconds = time.perf_counter() - began
        spent = stats.step_seconds - step
        run.outside = 1 - (stats.forward_seconds - forward) / spent if spent else None
        return run


def _note_times(run: Run, item: str, times: Sequence[float], arrived: float, begun: float) -> None:
    """Add a turn of an item, whose tokens came at ``times``: those of one step at the same. It
    was ``begun`` when what was before it had ended."""
    spent = times[-1] - times[0]
    run.ttft.append(times[0] - arrived)
    run.whole[item] = run.whole.get(item, 0.0) + times[-1] - begun
    if spent > 0:  # else one step gave all tokens, and says nothing about the next
        run.tpot.append(spent / (len(times) - 1))
    run.spent[item] = run.spent.get(item, 0.0) + spent
    run.decoded[item] = run.decoded.get(item, 0) + len(times) - 1


class PeerContestant:
    """Another engine, in a process of its own that stays alive between runs.

    It takes the prompts in groups of ``batch`` that run to their end together, greedily and past
    the end-of-sequence token; others do the same with ``ignore_eos``. Each turn of a conversation
    is a prompt of its own. Times are taken in the engine's process. As hasten's queue holds two
    batches, so a prompt arrives here when the group before the one ahead of it has ended.
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
        run = Run(0.0, {item.id: [] for item in items})
        ahead = 0.0  # seconds of the group before
        for start in range(0, len(items), self._batch):
            group = [Conversation(item, self._tokenizer) for item in items[start:][: self._batch]]
            began, waited = run.seconds, ahead
            while open_ := [one for one in group if one.prompt]:
                answer = self._process.ask(
                    do="generate", prompts=[one.prompt for one in open_], new=new
                )
                times = answer["times"]
                for one, tokens in zip(open_, answer["tokens"], strict=True):
                    run.tokens[one.item.id] += tokens
                    _note_times(run, one.item.id, times, -waited, 0.0)
                    _note_steps(run.speculation, times)
                    one.answer(tokens)
                run.seconds += times[-1]
                waited = 0.0
            ahead = run.seconds - began
        return run

    def close(self) -> None:
        self._process.close()


def _note_steps(speculation: DraftStatistics, times: Sequence[float]) -> None:
    """Count what each step after a prompt's gave. How many tokens were drafted is not known."""
    for tokens in Counter(times[bisect_right(times, times[0]) :]).values():
        speculation.plain(tokens)
        speculation.accepted += tokens - 1


class Conversation:
    """An item on its way through an engine that takes token ids.

    Attributes:
        prompt: ids of the turn to answer; empty after the last one.
        turns: the user's later turns.
    """

    def __init__(self, item: Item, tokenizer: Any) -> None:
        self.item = item
        self._tokenizer = tokenizer
        self._messages: list[Any] = []
        self.turns = list(item.turns)
        self.prompt: list[int] = []
        if item.prompt is None:
            self._ask()
        else:
            text = item.prompt
            self.prompt = tokenizer.encode(text) if isinstance(text, str) else list(text)

    def answer(self, tokens: Sequence[int]) -> None:
        """Take the answer to ``prompt``, and go on to the next turn."""
        if not self.turns:
            self.prompt = []
            return
        stream = self._tokenizer.decode_stream(self.prompt)
        text = "".join(map(stream.step, tokens)) + stream.flush()
        self._messages.append({"role": "assistant", "content": text})
        self._ask()

    def _ask(self) -> None:
        turn = self.turns.pop(0)
        self._messages += turn if isinstance(turn, list) else [{"role": "user", "content": turn}]
        self.prompt = self._tokenizer.chat_ids(self._messages)


def longest(items: Sequence[Item], tokenizer: Any, new: int) -> int:
    """Tokens of the longest item with its answers of ``new`` tokens each.

    An answer that is read back as part of the next turn may become other tokens, and more of them:
    of a conversation's earlier answers, twice as many are reckoned with.
    """
    found = []
    for item in items:
        one = Conversation(item, tokenizer)
        answers = new
        while one.turns:
            one.answer([])
            answers += 2 * new
        found.append(len(one.prompt) + answers)
    return max(found)


@contextmanager
def peer_contestants(
    front: Frontend,
    items: Sequence[Item],
    max_tokens: int,
    batch: int,
    setup: Setup,
    convert: bool = False,
    named: Sequence[tuple[Peer, Speculation | None]] = (),
    others: bool = True,
) -> Iterator[tuple[list[PeerContestant], list[str]]]:
    """Engines that run a model with the weights that its stack asks for.

    Args:
        named: those that must take part.
        others: whether all other engines that can shall take part, too, without speculation.

    Yields:
        The contestants, and for each of the others that cannot take part a line that says why.

    Raises:
        PeerError: one of ``named`` cannot take part.
    """
    from hasten import _native

    length = longest(items, front.tokenizer, max_tokens)
    weights = weights_name(front.stack, front.engine.model.config.dtype)
    contestants: list[PeerContestant] = []
    absent: list[str] = []
    try:
        more = [(peer, None) for peer in PEERS if others and (peer, None) not in named]
        for peer, speculation in [*named, *more]:
            try:
                process, name = setup.start(
                    peer,
                    front.folder,
                    weights,
                    threads=_native.get_num_threads(),  # the same threads for everybody
                    length=length,
                    sequences=batch,
                    convert=convert,
                    speculation=speculation,
                )
            except PeerError as error:
                if (peer, speculation) in named:
                    raise
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
