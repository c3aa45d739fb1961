"""Offline use: prompts in, outputs back, all in the calling thread."""

from __future__ import annotations

import operator
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hasten.api.frontend import Frontend
from hasten.api.interrupts import held_back
from hasten.api.output import Piece, RequestOutput, Score
from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine, EngineStats, RequestRefused
from hasten.engine.request import Figures, Request
from hasten.stack import Stack

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A language model ready to decode.

    >>> llm = LLM("reference", stack="draft=prompt-lookup")
    >>> llm.generate("def add(a, b):", SamplingParams(max_tokens=16))[0].text

    Args:
        model: folder or hub id in Hugging Face layout, or ``reference``, the bundled one.
        stack: one choice per slot, such as ``draft=prompt-lookup(k=8)``; see ``hasten methods``.
        max_sequences: sequences that run at the same time.
        max_batch_tokens: rows of one step; longer prompts are computed in chunks.
        max_length: longest sequence; None = what the model was made for.
        kv_bytes: memory for keys and values; None = a quarter of the free memory, at most 2 GiB.
        prefix_reuse: start from the pages of earlier prompts with the same beginning.
        device: where weights, keys and values are: "cpu", or "cuda" ("cuda:1") with a GPU.
        progress: show a bar while loading, on a terminal.

    Raises:
        ValueError: a setting is out of range, or the device cannot be used here.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "reference",
        *,
        stack: str | dict[str, Any] | Stack | None = None,
        max_sequences: int = 64,
        max_batch_tokens: int | None = None,
        max_length: int | None = None,
        kv_bytes: int | None = None,
        prefix_reuse: bool = True,
        device: str = "cpu",
        progress: bool = False,
    ) -> None:
        self.frontend = Frontend(
            model,
            stack=stack,
            max_sequences=max_sequences,
            max_batch_tokens=max_batch_tokens,
            max_length=max_length,
            kv_bytes=kv_bytes,
            prefix_reuse=prefix_reuse,
            device=device,
            progress=progress,
        )
        self.last_figures: Figures | None = None
        """Of the request that was last streamed."""
        self._streams: dict[str, deque[Piece]] = {}

    @property
    def stack(self) -> Stack:
        return self.frontend.stack

    @property
    def tokenizer(self) -> Any:
        return self.frontend.tokenizer

    @property
    def engine(self) -> Engine:
        return self.frontend.engine

    @property
    def stats(self) -> EngineStats:
        """Counters of the engine since start."""
        return self.frontend.engine.stats

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tenant: str = "",
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Complete prompts, in one continuous batch.

        Args:
            prompts: one prompt or several; each is text or token ids.
            params: for all prompts, or one for each.
            tenant: prompts share cached prefixes only within a tenant.
            progress: show a bar on a terminal.

        Returns:
            One output per prompt, in their order.

        Raises:
            RequestRefused: a prompt can never run (empty, too long, bad parameter); nothing ran.
        """
        many = _as_list(prompts)
        each = _broadcast(params, len(many))
        ids: list[str] = []
        try:
            for prompt, p in zip(many, each, strict=True):
                with held_back():
                    ids.append(self.frontend.submit(prompt, p, tenant=tenant).id)
            self._drain(set(ids), progress)
            return [self.frontend.collect(request_id) for request_id in ids]
        except BaseException as error:  # Ctrl-C too: leave no request behind
            for request_id in ids:
                self.frontend.discard(request_id)
            if isinstance(error, RequestRefused) and len(many) > 1:
                raise RequestRefused(f"prompts[{len(ids)}]: {error}") from None
            raise

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template."""
        conversations: Sequence[Any] = messages
        if messages and isinstance(messages[0], Mapping):
            conversations = [messages]
        prompts = [self.chat_prompt(c, tools=tools) for c in conversations]
        return self.generate(prompts, params, progress=progress)

    def chat_prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """The token ids that a conversation becomes, ready for the assistant's turn."""
        return self.frontend.tokenizer.chat_ids(messages, tools=tools)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, tenant: str = ""
    ) -> Iterator[Piece]:
        """Complete one prompt piece by piece. Leaving the loop early ends the request.

        Several streams may be open at the same time; their requests then share the engine's steps.
        """
        request: Request | None = None
        pieces: deque[Piece] = deque()
        try:
            with held_back():
                request = self.frontend.submit(prompt, params, tenant=tenant)
                self._streams[request.id] = pieces
            while pieces or not request.finished:
                if not pieces:
                    self._step()
                while pieces:
                    yield pieces.popleft()
        finally:
            if request is not None:
                self.frontend.discard(request.id)
                self._streams.pop(request.id, None)
                self.last_figures = request.sequences[0].figures

    def embed(self, prompts: Prompt | Sequence[Prompt], *, tenant: str = "") -> list[list[float]]:
        """Vectors of prompts: the normed hidden state of each one's last token.

        Returns:
            ``hidden_size`` float32 values a prompt, not scaled (the server's are, to length one).

        Raises:
            RequestRefused: a prompt can never run (empty, too long); nothing ran.
        """
        ids: list[str] = []
        try:
            for prompt in _as_list(prompts):
                with held_back():
                    ids.append(self.frontend.submit(prompt, tenant=tenant, embed=True).id)
                    self._streams[ids[-1]] = deque()
            self._drain(set(ids), progress=False)
            vectors = []
            for name in ids:
                last = self._streams[name][-1]
                if last.embedding is None:
                    raise RuntimeError(f"no vector was computed: {last.error}")
                vectors.append(last.embedding)
            return vectors
        finally:
            for name in ids:
                self._streams.pop(name, None)
                self.frontend.discard(name)

    def score(
        self, texts: Prompt | Sequence[Prompt], contexts: Prompt | Sequence[Prompt] | None = None
    ) -> list[Score]:
        """Log-probabilities of given texts.

        With ``contexts``, text i is scored as a continuation of context i; without, all its
        tokens but the first are scored.
        """
        many = _as_list(texts)
        befores = [None] * len(many) if contexts is None else _as_list(contexts)
        if len(befores) != len(many):
            raise ValueError(f"{len(many)} texts but {len(befores)} contexts")
        prompts, firsts = [], []
        for text, before in zip(many, befores, strict=True):
            head = [] if before is None else self._ids(before)
            prompts.append(head + self._ids(text, continues=before is not None))
            firsts.append(max(1, len(head)))
        params = SamplingParams(max_tokens=0, prompt_logprobs=1, temperature=0)
        scores = []
        for result, first in zip(self.generate(prompts, params), firsts, strict=True):
            entries = (result.prompt_logprobs or [])[first:]
            ids = result.prompt_token_ids[first:]
            pairs = [(t, e) for t, e in zip(ids, entries, strict=True) if e is not None]
            scores.append(
                Score(
                    [t for t, _ in pairs],
                    [e[0] for _, e in pairs],
                    [e[1][0][0] == t for t, e in pairs],
                )
            )
        return scores

    def _ids(self, prompt: Prompt, continues: bool = False) -> list[int]:
        if isinstance(prompt, str):
            return self.frontend.tokenizer.encode(prompt, add_special_tokens=not continues)
        return list(prompt)

    def _step(self) -> list[Piece]:
        """One step, its pieces handed to the streams that wait for them."""
        pieces = self.frontend.step()
        for piece in pieces:
            if piece.request_id in self._streams:
                self._streams[piece.request_id].append(piece)
        return pieces

    def _ends(self, ids: set[str]) -> Iterator[str]:
        """Step until these requests have ended; yields each as it ends."""
        requests = self.frontend.engine.requests
        while ids:
            for piece in self._step():
                name = piece.request_id
                if piece.finish_reason is not None and name in ids and name not in requests:
                    ids.remove(name)
                    yield name

    def _drain(self, ids: set[str], progress: bool) -> None:
        if not (progress and sys.stderr.isatty()):
            for _ in self._ends(ids):
                pass
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (TextColumn("decoding"), BarColumn(), MofNCompleteColumn(), Remaining())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=len(ids))
            for _ in self._ends(ids):
                bar.advance(task)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, Mapping) or not hasattr(prompts, "__len__"):
        what = type(prompts).__name__
        raise TypeError(f"prompts are text, token ids, or a list of these, not {what}")
    if isinstance(prompts, str) or (len(prompts) and _is_int(prompts[0])):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _is_int(value: Any) -> bool:
    """Whether it is a whole number of any kind (numpy's, a tensor's element)."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _broadcast(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not all(isinstance(p, SamplingParams) for p in params):
        raise TypeError("params are SamplingParams, one for all prompts or one for each")
    if len(params) != count:
        raise ValueError(f"{count} prompts but {len(params)} sampling parameters")
    return list(params)
