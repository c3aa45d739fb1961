"""transformers: ``generate``, eager attention, greedy, prompts padded on the left.

Weights: ``float32``, ``bfloat16`` (activations too), or ``int8``: torch's dynamic quantization
(weights once, activations per call) of every linear layer, the head included.

Speculation, for one sequence at a time: ``prompt-lookup`` with the 10 tokens that its
documentation shows, or ``assisted`` by a draft model with the same form of weights. Everything else
is left as it comes: n-grams of two tokens, up to 20 drafted tokens as long as the draft is sure
enough, and a bound for that which follows the outcomes where scikit-learn is installed.
"""

from __future__ import annotations

import importlib.util
import time
from typing import Any, ClassVar

import answering
import torch
import transformers
from transformers import StoppingCriteria, StoppingCriteriaList

PROMPT_LOOKUP_TOKENS = 10
"""``prompt_lookup_num_tokens`` in the documentation of transformers ("Generation strategies")."""


class Transformers:
    engine = "transformers"
    facts: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        folder: str,
        weights: str,
        threads: int,
        speculation: str | None = None,
        draft: str | None = None,
    ) -> None:
        self.version = f"{transformers.__version__} (eager)"
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self._model = _loaded(folder, weights)
        self._how: dict[str, Any] = {}
        if speculation == "prompt-lookup":
            self._how["prompt_lookup_num_tokens"] = PROMPT_LOOKUP_TOKENS
        elif draft is not None:
            self._how["assistant_model"] = _loaded(draft, weights)
            if importlib.util.find_spec("sklearn") is None:
                self.version = f"{transformers.__version__} (eager, no scikit-learn)"

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        times: list[float] = []

        class Clock(StoppingCriteria):
            def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
                found = ids.shape[1] - prompt - len(times)  # several where drafts were accepted
                times.extend([time.perf_counter() - began] * found)
                return torch.zeros(ids.shape[0], dtype=torch.bool)

        ids, mask = (torch.tensor(x) for x in answering.padded(prompts, pad=0))
        prompt = ids.shape[1]
        began = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([Clock()]),
                **self._how,
            )
        return times, out[:, prompt:].tolist()


def _loaded(folder: str, weights: str) -> Any:
    """A model that never stops at an end-of-sequence token."""
    dtype = torch.bfloat16 if weights == "bfloat16" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", trust_remote_code=False
    ).eval()
    if weights == "int8":
        if model.config.tie_word_embeddings:  # the embedding stays, its twin is quantized
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            model.config.tie_word_embeddings = False
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    model.generation_config.eos_token_id = None
    return model


def load(message: dict[str, Any]) -> Transformers:
    return Transformers(
        message["model"],
        message["weights"],
        message["threads"],
        message.get("speculation"),
        message.get("draft"),
    )


if __name__ == "__main__":
    answering.answer(load)
