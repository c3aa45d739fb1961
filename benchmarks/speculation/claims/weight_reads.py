"""Bytes of weights that an engine reads at batch 1, counted call by call.

A model that does not fit the caches takes as long as its weights take to read, so tokens by bytes
read are its speed without the noise of a clock. Prompts are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hasten import LLM, SamplingParams, Stack
from hasten.engine.engine import Engine, EngineConfig


@dataclass
class Reads:
    """What some requests took, one after the other."""

    tokens: int
    bytes: int
    seconds: float
    tau: float
    drafted: int
    wasted: int
    outputs: list[list[int]]

    def row(self, model_bytes: int) -> dict[str, Any]:
        """Figures for a report; ``tokens_per_read`` is 1 without drafts."""
        return {
            "tau": round(self.tau, 3),
            "tokens_per_read": round(self.tokens * model_bytes / self.bytes, 4),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "drafted_per_token": round(self.drafted / self.tokens, 3),
            "wasted_per_token": round(self.wasted / self.tokens, 3),
        }


def measure_reads(engine: Engine, prompts: Sequence[list[int]], tokens: int) -> Reads:
    """Greedy answers to prompts."""
    model, drafting = engine.model, engine.drafting
    layer_bytes = (model.weight_bytes - model.output.weight.nbytes) // model.config.num_layers
    engine.runner.recorder.refused = "calls are counted"
    adapter = getattr(drafting, "adapter", None)
    adapter_bytes = 0
    if adapter is not None:
        adapter_bytes = adapter.attention.qkv.weight.nbytes + adapter.attention.out.weight.nbytes
    found = Reads(0, 0, 0.0, 0.0, 0, 0, [])
    layer, head = model.layer, model.head

    def counted_layer(index: int, hidden: Any, kv: Any) -> Any:
        found.bytes += layer_bytes
        return layer(index, hidden, kv)

    def counted_head(hidden: Any) -> Any:
        found.bytes += model.output.weight.nbytes
        return head(hidden)

    model.layer, model.head = counted_layer, counted_head
    try:
        for ids in prompts:
            request = engine.add(ids, SamplingParams(max_tokens=tokens, temperature=0.0))
            earlier = found.bytes
            while not request.sequences[0].num_output:
                engine.step()  # the prompt, and the first token
            found.bytes = earlier
            if request.finished:
                continue
            passes, began = getattr(drafting, "passes", 0), time.perf_counter()
            while not request.finished:
                engine.step()
            found.seconds += time.perf_counter() - began
            found.bytes += (getattr(drafting, "passes", 0) - passes) * adapter_bytes
            found.tokens += request.sequences[0].num_output - 1
            found.outputs.append(request.sequences[0].tokens[len(ids) :])
    finally:
        del model.layer, model.head
    statistics = engine.stats.speculation
    found.tau = statistics.tau or 1.0
    found.drafted = statistics.drafted
    found.wasted = statistics.drafted - statistics.accepted
    return found


def engine_for(llm: LLM, stack: str) -> Engine:
    """An engine for one sequence that shares the weights of ``llm``."""
    config = EngineConfig(max_sequences=1, max_batch_tokens=512, prefix_reuse=False)
    return Engine(llm.engine.model, Stack.parse(stack), config, tokenizer=llm.tokenizer)
