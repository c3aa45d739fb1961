"""onnxruntime-genai on the CPU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, ClassVar

import answering
import numpy as np
import onnxruntime_genai as genai


class OnnxRuntime:
    engine = "onnxruntime-genai"
    facts: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder: str, threads: int) -> None:
        self.version = genai.__version__
        config = genai.Config(folder)
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = genai.Model(config)
        said = json.loads((Path(folder) / "genai_config.json").read_text())
        self._pad = said["model"]["pad_token_id"]  # the engine takes its mask from this id

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        if len(prompts) > 1 and any(self._pad in prompt for prompt in prompts):
            raise ValueError(f"a prompt holds the padding token {self._pad}")
        ids, _ = answering.padded(prompts, self._pad)
        params = genai.GeneratorParams(self._model)
        length = len(ids[0]) + new
        params.set_search_options(
            max_length=length, min_length=length, do_sample=False, batch_size=len(prompts)
        )
        generator = genai.Generator(self._model, params)
        times: list[float] = []
        began = time.perf_counter()
        generator.append_tokens(np.array(ids, np.int32))
        for _ in range(new):
            generator.generate_next_token()
            times.append(time.perf_counter() - began)
        rows = range(len(prompts))
        return times, [generator.get_sequence(row)[len(ids[0]) :].tolist() for row in rows]


def load(message: dict[str, Any]) -> OnnxRuntime:
    return OnnxRuntime(message["model"], message["threads"])


if __name__ == "__main__":
    answering.answer(load)
