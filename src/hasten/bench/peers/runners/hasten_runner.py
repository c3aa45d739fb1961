"""hasten itself in a process of its own, for runs in which every engine is treated alike.

``weights`` is a stack, such as ``weights=int8``.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import answering

import hasten
from hasten import LLM, SamplingParams, _native
from hasten.api.frontend import Frontend
from hasten.methods import method
from hasten.speculation.base import Draftable, StatelessDrafting
from hasten.speculation.tree import TokenTree


@method(
    "drafts-of-length",
    slot="draft",
    exact="bitwise",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens",),
)
@dataclass(frozen=True)
class Scripted(StatelessDrafting):
    """Chains of random tokens, as many as the measurement asks for."""

    length: ClassVar[int] = 0
    vocab: ClassVar[int] = 1

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        if any(budget < self.length for budget in budgets):
            raise ValueError(f"budgets {budgets} are below the {self.length} tokens to propose")
        drafted = [random.randrange(self.vocab) for _ in range(self.length)]
        return [TokenTree.chain(s.tokens[-1:] + drafted) for s in sequences]


class Hasten:
    engine = "hasten"

    def __init__(self, folder: str, stack: str, threads: int, length: int, sequences: int) -> None:
        self.version = hasten.__version__
        _native.set_num_threads(threads)
        self._sizes: dict[str, Any] = {
            "max_length": length,
            "max_sequences": sequences,
            "max_batch_tokens": 2048,
        }
        self._stack = stack
        self._llm = LLM(folder, stack=stack, prefix_reuse=False, **self._sizes)
        model, cache = self._llm.engine.model, self._llm.engine.cache
        self.facts = {
            "isa": _native.get_isa(),
            "weight_bytes": model.weight_bytes,
            "kv_bytes": cache.layout.block_bytes() * cache.pools[0].num_pages,
        }

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        began = time.monotonic()  # the engine's clock
        outputs = [result.outputs[0] for result in self._llm.generate(prompts, params)]
        steps = zip(*(output.figures.token_times for output in outputs), strict=True)
        return [max(step) - began for step in steps], [list(o.token_ids) for o in outputs]

    def verify(self, context: int, counts: list[int], repeats: int) -> dict[int, list[float]]:
        """Steps with a chain of random candidates: everything that a step does is timed."""
        stack = ",".join(filter(None, [self._stack, "draft=drafts-of-length"]))
        front = Frontend(
            self._llm.frontend.name, stack=stack, share=[self._llm.frontend], **self._sizes
        )
        engine = front.engine
        Scripted.vocab = engine.model.config.vocab_size
        rng = random.Random(0)
        prompt = [rng.randrange(Scripted.vocab) for _ in range(context)]
        steps = (repeats + 1) * len(counts)
        Scripted.length = 0
        engine.add(prompt, SamplingParams(max_tokens=8 * steps, temperature=0.0, ignore_eos=True))
        engine.step()
        seconds: dict[int, list[float]] = {count: [] for count in counts}
        for repeat in range(repeats + 1):
            for count in counts:
                Scripted.length = count - 1
                began = time.perf_counter()
                engine.step()
                if repeat:  # the first round warms up
                    seconds[count].append(time.perf_counter() - began)
        return seconds


def load(message: dict[str, Any]) -> Hasten:
    return Hasten(
        message["model"],
        message["weights"],
        message["threads"],
        message["length"],
        message["sequences"],
    )


if __name__ == "__main__":
    answering.answer(load)
