"""llama.cpp through its C interface (ctypes declarations of llama-cpp-python).

``LLAMA_CPP_LIB_PATH`` names the folder with libllama.so. The next token is the argmax of the
logits that the library hands out, so that no sampler of the binding is timed.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any, ClassVar

import answering
import llama_cpp as api
import numpy as np


class LlamaCpp:
    engine = "llama.cpp"
    facts: ClassVar[dict[str, Any]] = {}

    def __init__(self, path: str, threads: int, length: int, sequences: int) -> None:
        self.version = _version()
        api.llama_backend_init()
        how = api.llama_model_default_params()
        how.load_mode = api.LLAMA_LOAD_MODE_NONE  # pages of a file might go while it is paused
        model = api.llama_model_load_from_file(path.encode(), how)
        if model is None:
            raise ValueError(f"llama.cpp cannot load {path}")
        params = api.llama_context_default_params()
        params.n_ctx = length * sequences
        params.n_seq_max = sequences
        params.n_batch = max(2048, length)
        params.n_threads = params.n_threads_batch = threads
        self._context = api.llama_init_from_model(model, params)
        if self._context is None:
            raise ValueError(f"llama.cpp cannot make a context of {length} x {sequences}")
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._logits = ctypes.c_float * self._vocab
        self._memory = api.llama_get_memory(self._context)
        self._room = params.n_batch
        self._batch = api.llama_batch_init(self._room, 0, 1)

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        api.llama_memory_clear(self._memory, True)
        times: list[float] = []
        tokens: list[list[int]] = [[] for _ in prompts]
        began = time.perf_counter()
        self._prefill(prompts, tokens)
        times.append(time.perf_counter() - began)
        for step in range(1, new):
            rows = [
                (out[-1], len(prompt) + step - 1, sequence, True)
                for sequence, (prompt, out) in enumerate(zip(prompts, tokens, strict=True))
            ]
            for out, token in zip(tokens, self._decode(rows), strict=True):
                out.append(token)
            times.append(time.perf_counter() - began)
        return times, tokens

    def verify(self, context: int, counts: list[int], repeats: int) -> dict[int, list[float]]:
        """Steps of several rows of one sequence; what they stored is dropped again."""
        rng = np.random.default_rng(0)
        api.llama_memory_clear(self._memory, True)
        prompt = rng.integers(self._vocab, size=context).tolist()
        self._prefill([prompt], [[]])
        seconds: dict[int, list[float]] = {count: [] for count in counts}
        for repeat in range(repeats + 1):
            for count in counts:
                drafted = rng.integers(self._vocab, size=count).tolist()
                rows = [(token, context + i, 0, True) for i, token in enumerate(drafted)]
                began = time.perf_counter()
                self._decode(rows)
                if repeat:  # the first round warms up
                    seconds[count].append(time.perf_counter() - began)
                api.llama_memory_seq_rm(self._memory, 0, context, -1)
        return seconds

    def _prefill(self, prompts: list[list[int]], tokens: list[list[int]]) -> None:
        """All prompts, as many rows at once as a batch holds; the first token of each."""
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for start in range(0, len(rows), self._room):
            part = rows[start : start + self._room]
            found = self._decode(part)
            for (_, _, sequence, last), token in zip(
                [row for row in part if row[3]], found, strict=True
            ):
                assert last
                tokens[sequence].append(token)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute rows of (token, position, sequence, whether its logits are wanted).

        Returns the likeliest next token of each wanted row.
        """
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        if (status := api.llama_decode(self._context, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return [self._best(i) for i, row in enumerate(rows) if row[3]]

    def _best(self, row: int) -> int:
        """The likeliest token after a row; its logits are read where they lie."""
        logits = api.llama_get_logits_ith(self._context, row)
        place = self._logits.from_address(ctypes.addressof(logits.contents))
        return int(np.frombuffer(place, np.float32).argmax())


def _version() -> str:
    """Commit, as the tools that were built beside the library tell it."""
    tool = Path(os.environ["LLAMA_CPP_LIB_PATH"]) / "llama-bench"
    told = subprocess.run([tool, "--version"], capture_output=True, text=True)
    found = re.search(r"commit:? (\w+)", told.stdout + told.stderr)
    return found[1] if found else f"llama-cpp-python {api.__version__}"


def load(message: dict[str, Any]) -> LlamaCpp:
    return LlamaCpp(message["model"], message["threads"], message["length"], message["sequences"])


if __name__ == "__main__":
    answering.answer(load)
