"""lm-evaluation-harness against the server, with nothing but its address: it finds the server's
tokenizer by itself, and its log-likelihoods and texts are those of `LLM`.

The harness needs packages that hasten does not; it may have an environment of its own, whose
Python ``HASTEN_LM_EVAL`` names.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hasten import LLM, SamplingParams
from tests.serving.live import live

HARNESS = os.environ.get("HASTEN_LM_EVAL") or (
    sys.executable if importlib.util.find_spec("lm_eval") else None
)
pytestmark = pytest.mark.skipif(
    HARNESS is None,
    reason="needs lm-eval[api], here or in the Python that HASTEN_LM_EVAL names",
)

DOCS = [
    {"text": "import os\nimport", "choices": [" sys", " banana", " re\n"], "answer": 0},
    {"text": "def add(a, b):\n    return", "choices": [" a + b", " None", " (((", "  # 東京"]},
    {"text": "for i in range(10):\n", "choices": ["    print(i)\n", "print", "    pass"]},
    {"text": "class Größe:\n    def __init__(self", "choices": ["):", ", value):", " 🙂"]},
    {"text": "assert 1 + 1 ==", "choices": [" 2", " 3"]},
]

COMMON = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
num_fewshot: 0
metadata: {{version: 1}}
"""
TASKS = {
    "choices": (
        "multiple_choice",
        'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    ),
    "targets": (
        "loglikelihood",
        'doc_to_target: "{{choices[0]}}"\n'
        "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]\n",
    ),
    "texts": (
        "generate_until",
        'doc_to_target: "{{choices[0]}}"\n'
        'generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 16, temperature: 0.0}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
    ),
}


async def evaluate(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Samples of each task, as the harness logs them."""
    data = folder / "docs.json"
    data.write_text("\n".join(json.dumps({"answer": 0, **doc}) for doc in DOCS))
    for task, (kind, rest) in TASKS.items():
        (folder / f"{task}.yaml").write_text(COMMON.format(task=task, data=data, kind=kind) + rest)
    async with live(folder) as server:
        url = f"base_url={server.server.base_url}/v1/completions"
        command = [str(HARNESS), "-m", "lm_eval", "--model", "local-completions"]
        command += ["--model_args", f"model=reference,{url},max_length=512,num_concurrent=4"]
        command += ["--tasks", ",".join(TASKS), "--include_path", str(folder)]
        command += ["--log_samples", "--output_path", str(folder / "out")]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
        process = await asyncio.create_subprocess_exec(
            *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=folder
        )
        printed, _ = await process.communicate()
        assert process.returncode == 0, printed.decode()[-4000:]
        assert b"remote tokenizer" in printed, printed.decode()[-4000:]
    found = {}
    for task in TASKS:
        (path,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
        found[task] = [json.loads(line) for line in path.read_text().splitlines()]
        found[task].sort(key=lambda sample: sample["doc_id"])
    return found


def split(llm: LLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The token ids of both, cut where the harness cuts them: before the white space."""
    bare = context.rstrip()
    context, continuation = bare, context[len(bare) :] + continuation
    encode = llm.frontend.tokenizer.encode
    whole = encode(context + continuation, add_special_tokens=False)
    head = encode(context, add_special_tokens=False)
    return whole[: len(head)], whole[len(head) :]


@pytest.mark.timeout(600)
def test_scores_and_texts_are_those_of_llm(tmp_path: Path) -> None:
    samples = asyncio.run(evaluate(tmp_path))
    llm = LLM("reference", max_length=512, kv_bytes=48 << 20)
    pairs, answers = [], []
    for sample in [*samples["choices"], *samples["targets"]]:
        requests = sample["arguments"].values()
        answers += [(float(r[0][0]), r[0][1] == "True") for r in sample["resps"]]
        pairs += [(r["arg_0"], r["arg_1"]) for r in requests]
    assert len(pairs) == len(answers) == sum(len(doc["choices"]) + 1 for doc in DOCS)
    heads, tails = zip(*(split(llm, *pair) for pair in pairs), strict=True)
    for pair, answer, score in zip(pairs, answers, llm.score(tails, heads), strict=True):
        assert answer == (pytest.approx(sum(score.logprobs), abs=1e-6), all(score.greedy)), pair
    prompts = [llm.frontend.tokenizer.encode(doc["text"], add_special_tokens=False) for doc in DOCS]
    params = SamplingParams(max_tokens=16, temperature=0, stop=["\n\n"])
    texts = [result.outputs[0].text for result in llm.generate(prompts, params)]
    assert [sample["resps"][0][0] for sample in samples["texts"]] == texts
