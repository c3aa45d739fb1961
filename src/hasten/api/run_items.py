"""Work through many items in one continuous batch: conversations of several turns included."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hasten.api.frontend import Frontend
from hasten.api.interrupts import held_back
from hasten.api.output import Piece, RequestOutput
from hasten.decoding.params import SamplingParams


@dataclass(frozen=True)
class Item:
    """One piece of work.

    Exactly one of ``prompt`` (text or token ids) and ``turns`` (user messages, answered in order)
    is given. ``params`` overrides the sampling parameters of the run. ``category`` says what kind
    of work it is, for reports.
    """

    id: str
    prompt: str | tuple[int, ...] | None = None
    turns: tuple[Any, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    category: str = ""


@dataclass(slots=True)
class Progress:
    """An item on its way. ``messages`` grows with each answered turn."""

    item: Item
    params: SamplingParams
    messages: list[dict[str, Any]] = field(default_factory=list)
    results: list[RequestOutput] = field(default_factory=list)
    error: str | None = None


@dataclass(slots=True)
class Event:
    """A piece of an item's text, or (``done``) the item as a whole."""

    progress: Progress
    piece: Piece | None = None
    done: bool = False


class ItemRunner:
    """Feeds items into an engine as it has room, so that any number of them runs in bounded
    memory, and yields pieces and finished items as they come."""

    def __init__(
        self, front: Frontend, params: SamplingParams, truncate: bool = False, ahead: int = 2
    ) -> None:
        """
        Args:
            params: of the run; an item's own ``params`` override it.
            truncate: cut prompts that are too long from the left instead of refusing them.
            ahead: requests submitted at most, in multiples of the sequences that can run.
        """
        self.front = front
        self.params = params
        self.truncate = truncate
        self._limit = ahead * front.engine.config.max_sequences
        self._active: dict[str, Progress] = {}

    def run(self, items: Iterable[Item]) -> Generator[Event, None, None]:
        """Run all items; closing the generator ends what is on its way."""
        source = iter(items)
        failed: deque[Progress] = deque()
        exhausted = False
        try:
            while True:
                while not exhausted and len(self._active) < self._limit:
                    item = next(source, None)
                    if item is None:
                        exhausted = True
                    elif (broken := self._begin(item)) is not None:
                        failed.append(broken)
                while failed:
                    yield Event(failed.popleft(), done=True)
                if not self._active:
                    if exhausted:
                        return
                    continue
                yield from self._step()
        finally:
            for request_id in list(self._active):
                self.front.discard(request_id)
            self._active.clear()

    def _begin(self, item: Item) -> Progress | None:
        """Submit an item's first turn; returns it if that failed."""
        progress = Progress(item, self.params)
        try:
            progress.params = replace(self.params, **item.params)
            if progress.params.n != 1:
                raise ValueError("n > 1 is not possible here: give the prompt several lines")
            for name in ("logprobs", "prompt_logprobs"):
                if getattr(progress.params, name) is not None:
                    raise ValueError(f"{name} are not written by 'hasten run'")
            self._submit(progress)
        except (ValueError, TypeError) as error:
            progress.error = str(error)
            return progress
        return None

    def _submit(self, progress: Progress) -> None:
        item = progress.item
        tokenizer = self.front.tokenizer
        if item.prompt is not None:
            ids = (
                tokenizer.encode(item.prompt) if isinstance(item.prompt, str) else list(item.prompt)
            )
        else:
            turn = item.turns[len(progress.results)]
            new = turn if isinstance(turn, list) else [{"role": "user", "content": turn}]
            progress.messages += new
            ids = tokenizer.chat_ids(progress.messages)
        if self.truncate:
            room = self.front.engine.max_length - min(progress.params.max_tokens or 1, 256)
            ids = ids[-max(room, 1) :]
        with held_back():
            request = self.front.submit(ids, progress.params)
            self._active[request.id] = progress

    def _step(self) -> Iterator[Event]:
        finished: dict[str, None] = {}
        for piece in self.front.step():
            progress = self._active.get(piece.request_id)
            if progress is None:
                continue
            yield Event(progress, piece)
            if piece.finish_reason is not None and (
                piece.request_id not in self.front.engine.requests
            ):
                finished[piece.request_id] = None
        for request_id in finished:
            progress = self._active.pop(request_id)
            result = self.front.collect(request_id)
            progress.results.append(result)
            progress.error = result.outputs[0].error
            if progress.item.prompt is None and progress.error is None:
                progress.messages.append({"role": "assistant", "content": result.text})
                if len(progress.results) < len(progress.item.turns):
                    try:
                        self._submit(progress)
                        continue
                    except (ValueError, TypeError) as error:
                        progress.error = str(error)
            yield Event(progress, done=True)
