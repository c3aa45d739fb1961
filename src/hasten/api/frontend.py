"""Between callers and the engine: text to tokens on the way in, tokens to text on the way out."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hasten.api.interrupts import held_back
from hasten.api.output import Completion, Piece, RequestOutput
from hasten.decoding.constraints.base import ConstraintError
from hasten.decoding.params import SamplingParams
from hasten.decoding.text import TextStream
from hasten.engine.engine import Engine, EngineConfig, RequestRefused
from hasten.engine.request import Delta, Logprobs, Request
from hasten.models.base import Decoder
from hasten.models.device import parse_device, place
from hasten.models.loading import load_model, locate, read_facts
from hasten.models.tokenizer import Tokenizer
from hasten.stack import Stack


@dataclass(slots=True)
class _Output:
    text: TextStream
    parts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] | None = None


@dataclass(slots=True)
class _Entry:
    request: Request
    prompt: str | None
    outputs: list[_Output]


class Frontend:
    """A loaded model with its tokenizer and engine. Not thread-safe, but for ``prepare``."""

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
        share: Sequence[Frontend] = (),
    ) -> None:
        """Arguments as for ``LLM``. The weights of one of ``share`` are used if it has the same
        model, length and device and its stack asked for the same weights."""
        where = parse_device(device)
        self.stack = Stack.parse(stack)
        self.max_length = max_length
        self.name = str(model)
        self.folder = locate(model)
        read_facts(self.folder)  # first: a folder without a model has no tokenizer either
        self.tokenizer = Tokenizer.load(self.folder)
        weights = self.stack["weights"]
        loaded: list[Decoder] = [
            front.engine.model
            for front in share
            if (front.folder, front.max_length) == (self.folder, max_length)
            and front.engine.model.device == where
            and front.stack["weights"] == weights
        ]
        decoder = (
            loaded[0]
            if loaded
            else load_model(
                self.folder,
                progress=progress,
                max_length=max_length,
                format=weights,
            )
        )
        if decoder.device != where:
            place(decoder, where)
        self.engine: Engine = Engine(
            decoder,
            self.stack,
            EngineConfig(
                max_sequences=max_sequences,
                max_batch_tokens=max_batch_tokens or max(512, max_sequences),
                max_length=max_length,
                kv_bytes=kv_bytes or _default_kv_bytes(),
                prefix_reuse=prefix_reuse,
                model_id=str(self.folder),
            ),
            tokenizer=self.tokenizer,
        )
        self._entries: dict[str, _Entry] = {}

    def is_prepared(self, params: SamplingParams | None) -> bool:
        """Whether ``submit`` is quick; if not, call ``prepare`` in another thread before it."""
        return params is None or self.engine.constraining.is_prepared(params)

    def prepare(self, params: SamplingParams) -> None:
        """Compile what ``params`` ask for, in any thread and beside running steps. Raises
        ``RequestRefused`` where ``submit`` would, for that reason."""
        try:
            self.engine.constraining.prepare(params)
        except ConstraintError as error:
            raise RequestRefused(str(error)) from None

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        tenant: str = "",
        priority: int = 0,
        embed: bool = False,
    ) -> Request:
        """Queue a prompt (text or token ids). Raises ``RequestRefused`` if it can never run.

        With ``embed`` its one piece holds the last hidden state, and ``params`` does not matter.
        """
        params = SamplingParams(max_tokens=0) if embed else params or SamplingParams()
        if request_id in self._entries:
            raise RequestRefused(f"request id '{request_id}' is in use")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self._ids(prompt)
        texts = [
            TextStream(
                self.tokenizer.decode_stream(ids, params.skip_special_tokens),
                params.stop,
                params.include_stop,
            )
            for _ in range(params.n)
        ]
        request = self.engine.add(
            ids,
            params,
            request_id=request_id,
            tenant=tenant,
            priority=priority,
            bad_words=[self._bad_word(word) for word in params.bad_words],
            texts=texts if params.stop else (),
            embed=embed,
        )
        keep = params.logprobs is not None
        outputs = [_Output(text, logprobs=[] if keep else None) for text in texts]
        text = prompt if isinstance(prompt, str) else None
        self._entries[request.id] = _Entry(request, text, outputs)
        return request

    def _ids(self, prompt: Sequence[int]) -> list[int]:
        """Plain integers, of any kind that counts as one (numpy's, a tensor's elements)."""
        try:
            ids = [operator.index(token) for token in prompt]
        except TypeError:
            raise RequestRefused("a prompt is text or a list of token ids") from None
        vocab = self.engine.model.config.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < vocab:  # before the tokenizer sees them
            raise RequestRefused(f"prompt has token ids outside 0..{vocab - 1}")
        return ids

    def _bad_word(self, word: str | Sequence[int]) -> list[int]:
        ids = (
            self.tokenizer.encode(word, add_special_tokens=False)
            if isinstance(word, str)
            else list(word)
        )
        if not ids:
            raise RequestRefused("bad_words holds an empty entry")
        return ids

    def step(self) -> list[Piece]:
        """One engine step; returns what it added, as text. Ctrl-C waits for its end."""
        with held_back():
            return self._pieces(self.engine.step())

    def abort(self, request_id: str) -> list[Piece]:
        """End a request; its last pieces say ``finish_reason="abort"``."""
        with held_back():
            return self._pieces(self.engine.abort(request_id))

    def _pieces(self, deltas: Iterable[Delta]) -> list[Piece]:
        pieces = []
        for delta in deltas:
            sequence = delta.sequence
            entry = self._entries.get(sequence.request.id)
            if entry is None:
                continue  # its consumer went away in the meantime
            output = entry.outputs[sequence.index]
            if delta.text is not None:
                text = delta.text
            elif sequence.text is not None:  # the engine follows it, and had nothing to add
                text = ""
            else:
                text = output.text.push(delta.tokens)
            if sequence.finish_reason is not None:
                text += output.text.finish()
            output.parts.append(text)
            output.tokens += delta.tokens
            if delta.logprobs is not None and output.logprobs is not None:
                output.logprobs += delta.logprobs
            piece = Piece(
                sequence.request.id,
                sequence.index,
                text,
                delta.tokens,
                delta.logprobs,
                sequence.finish_reason,
                sequence.error,
                embedding=delta.embedding,
            )
            if sequence.finish_reason is not None:
                piece.figures = sequence.figures
                if sequence.index == 0:
                    piece.prompt_logprobs = sequence.request.prompt_logprobs
            pieces.append(piece)
        return pieces

    def discard(self, request_id: str) -> None:
        """End a request that nobody waits for, and drop its output; unknown ids are normal."""
        self.abort(request_id)
        self._entries.pop(request_id, None)

    def collect(self, request_id: str) -> RequestOutput:
        """The whole result of a finished request; it is forgotten afterwards."""
        entry = self._entries.pop(request_id)
        request = entry.request
        result = RequestOutput(
            request_id, entry.prompt, request.prompt, prompt_logprobs=request.prompt_logprobs
        )
        for sequence, output in zip(request.sequences, entry.outputs, strict=True):
            assert sequence.finish_reason is not None, "collect() before the request finished"
            result.outputs.append(
                Completion(
                    sequence.index,
                    "".join(output.parts),
                    output.tokens,
                    sequence.finish_reason,
                    sequence.figures,
                    output.logprobs,
                    sequence.error,
                )
            )
        return result


def _default_kv_bytes() -> int:
    """A quarter of the memory that is available now, at most 2 GiB and at least 64 MiB."""
    available = 4 << 30  # where the system does not say
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) << 10
    except OSError:
        pass
    return min(2 << 30, max(available // 4, 64 << 20))
