"""OpenVINO GenAI: ``LLMPipeline`` on the CPU, its default paged-attention backend."""

from __future__ import annotations

from typing import Any, ClassVar

import answering
import numpy as np
import openvino
import openvino_genai as genai


class OpenVINO:
    engine = "OpenVINO GenAI"
    facts: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder: str, threads: int, length: int, sequences: int) -> None:
        self.version = genai.__version__.split("-")[0]
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1  # GiB
        scheduler.max_num_batched_tokens = max(4096, length)  # no prompt is cut
        scheduler.enable_prefix_caching = False
        self._pipeline = genai.LLMPipeline(
            folder,
            "CPU",
            INFERENCE_NUM_THREADS=threads,
            PERFORMANCE_HINT="LATENCY",
            ENABLE_MMAP=False,  # pages of a file might go while it is paused
            scheduler_config=scheduler,
        )

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        ids, mask = answering.padded(prompts, pad=0)
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos, config.do_sample = True, False
        config.apply_chat_template = False
        inputs = genai.TokenizedInputs(
            openvino.Tensor(np.array(ids, np.int64)), openvino.Tensor(np.array(mask, np.int64))
        )
        result = self._pipeline.generate(inputs, config)
        metrics = result.perf_metrics
        first = metrics.get_ttft().mean / 1e3
        stamps = [_seconds(t) for t in metrics.raw_metrics.m_new_token_times]
        if len(stamps) != new:
            raise RuntimeError(f"{len(stamps)} times of {new} steps")
        return [first + t - stamps[0] for t in stamps], [list(t) for t in result.tokens]


def _seconds(stamp: Any) -> float:
    """Time points are milliseconds, or times of day."""
    return stamp.timestamp() if hasattr(stamp, "timestamp") else stamp / 1e3


def load(message: dict[str, Any]) -> OpenVINO:
    return OpenVINO(message["model"], message["threads"], message["length"], message["sequences"])


if __name__ == "__main__":
    answering.answer(load)
