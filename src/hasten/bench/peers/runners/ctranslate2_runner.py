"""CTranslate2's ``Generator``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, ClassVar

import answering
import ctranslate2

COMPUTE = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8_float32"}


class CTranslate2:
    engine = "CTranslate2"
    facts: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder: str, weights: str, threads: int) -> None:
        self.version = ctranslate2.__version__
        self._generator = ctranslate2.Generator(
            folder,
            device="cpu",
            compute_type=COMPUTE[weights],
            intra_threads=threads,
            inter_threads=1,
        )
        self._words = json.loads((Path(folder) / "vocabulary.json").read_text())

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        words = [[self._words[token] for token in prompt] for prompt in prompts]
        times: list[float] = []

        def clock(result: Any) -> bool:
            if result.batch_id == 0:
                times.append(time.perf_counter() - began)
            return False

        began = time.perf_counter()
        results = self._generator.generate_batch(
            words,
            max_length=new,
            min_length=new,
            sampling_topk=1,
            beam_size=1,
            include_prompt_in_result=False,
            end_token=[],
            callback=clock,
        )
        return times, [result.sequences_ids[0] for result in results]


def load(message: dict[str, Any]) -> CTranslate2:
    return CTranslate2(message["model"], message["weights"], message["threads"])


if __name__ == "__main__":
    answering.answer(load)
