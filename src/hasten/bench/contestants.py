"""Who is measured: a stack of hasten, or another engine on the same weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from hasten.api.frontend import Frontend
from hasten.api.run_items import ItemRunner
from hasten.bench.workloads import Item
from hasten.decoding.params import SamplingParams


@dataclass(slots=True)
class Run:
    """One pass over a workload.

    Attributes:
        seconds: from the first prompt's submission to the last token.
        tokens: output token ids, by item.
        ttft: seconds to the first token, by item.
        tpot: seconds per token after the first, by item that took at least two steps.
        accepted, passes: accepted drafts and target passes, where drafts are used.
        outside: share of the step time that was not the model's forward, where known.
    """

    seconds: float
    tokens: dict[str, list[int]]
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    accepted: int = 0
    passes: int = 0
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
        accepted, passes = stats.accepted, stats.passes
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
            for result in event.progress.results:
                _note_times(run, result.outputs[0].figures)
        run.seconds = time.perf_counter() - began
        run.accepted, run.passes = stats.accepted - accepted, stats.passes - passes
        spent = stats.step_seconds - step
        run.outside = 1 - (stats.forward_seconds - forward) / spent if spent else None
        return run


def _note_times(run: Run, figures: Any) -> None:
    times = figures.token_times
    run.ttft.append(times[0] - figures.arrived)
    if times[-1] > times[0]:  # else one step gave all tokens, and says nothing about the next
        run.tpot.append((times[-1] - times[0]) / (len(times) - 1))


class TransformersContestant:
    """transformers' own ``generate``, eager, greedy, all prompts of a run as one padded batch.

    It goes on past the end-of-sequence token; others do the same with ``ignore_eos``.
    """

    def __init__(self, folder: str, dtype: Any, tokenizer: Any) -> None:
        import torch
        import transformers

        from hasten import _native

        torch.set_num_threads(_native.get_num_threads())  # the same threads for everybody

        transformers.utils.logging.disable_progress_bar()
        self.name = f"transformers {transformers.__version__} (eager)"
        self._tokenizer = tokenizer
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", trust_remote_code=False
        ).eval()
        self._model.generation_config.eos_token_id = None

    def run(self, items: Sequence[Item], params: SamplingParams) -> Run:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        times: list[float] = []

        class Clock(StoppingCriteria):
            def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
                times.append(time.perf_counter())
                return torch.zeros(ids.shape[0], dtype=torch.bool)

        prompts = [self._ids(item) for item in items]
        outputs = {item.params.get("max_tokens", params.max_tokens) for item in items}
        if len(outputs) != 1:
            raise ValueError("peers need the same max_tokens for every prompt of a run")
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        count = outputs.pop()
        began = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=count,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([Clock()]),
            )
        seconds = time.perf_counter() - began
        tokens = {i.id: row[longest:].tolist() for i, row in zip(items, out, strict=True)}
        tpot = (times[-1] - times[0]) / max(len(times) - 1, 1)
        return Run(seconds, tokens, [times[0] - began] * len(items), [tpot] * len(items))

    def _ids(self, item: Item) -> list[int]:
        if isinstance(item.prompt, str):
            ids: list[int] = self._tokenizer.encode(item.prompt)
            return ids
        if item.prompt is None:
            raise ValueError("peers run single prompts, not conversations")
        return list(item.prompt)
