"""transformers: ``generate``, eager attention, greedy, prompts padded on the left.

Weights: ``float32``, ``bfloat16`` (activations too), or ``int8``: torch's dynamic quantization
(weights once, activations per call) of every linear layer, the head included.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar

import answering
import torch
import transformers
from transformers import StoppingCriteria, StoppingCriteriaList


class Transformers:
    engine = "transformers"
    facts: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder: str, weights: str, threads: int) -> None:
        self.version = f"{transformers.__version__} (eager)"
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        dtype = torch.bfloat16 if weights == "bfloat16" else torch.float32
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", trust_remote_code=False
        ).eval()
        if weights == "int8":
            if model.config.tie_word_embeddings:  # the embedding stays, its twin is quantized
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
                model.config.tie_word_embeddings = False
            model = torch.ao.quantization.quantize_dynamic(
                model, {torch.nn.Linear}, dtype=torch.qint8
            )
        model.generation_config.eos_token_id = None
        self._model = model

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        times: list[float] = []

        class Clock(StoppingCriteria):
            def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
                times.append(time.perf_counter() - began)
                return torch.zeros(ids.shape[0], dtype=torch.bool)

        ids, mask = (torch.tensor(x) for x in answering.padded(prompts, pad=0))
        began = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([Clock()]),
            )
        return times, out[:, ids.shape[1] :].tolist()


def load(message: dict[str, Any]) -> Transformers:
    return Transformers(message["model"], message["weights"], message["threads"])


if __name__ == "__main__":
    answering.answer(load)
