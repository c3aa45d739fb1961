"""What quantized weights cost the bundled model: python benchmarks/weight_quality.py

    python benchmarks/weight_quality.py --llama ~/llama.cpp/build -o benchmarks/weight-quality.md

Perplexity of held-out standard library code, in windows of 1,024 tokens without overlap, through
the engine and its kernels (`LLM.score`). With ``--llama``, a build of llama.cpp, the same weights
are quantized by its own llama-quantize and the files are read by hasten, as blocks (8-bit
activations) and expanded to float32; with ``--llama-python``, an interpreter that has
llama-cpp-python, llama.cpp itself scores the same windows of tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tokenizers import Tokenizer  # noqa: E402

from hasten import LLM  # noqa: E402
from hasten.bench.conditions import conditions  # noqa: E402
from hasten.models.loading import locate  # noqa: E402
from hasten.training import corpus  # noqa: E402
from hasten.training.data import encode_files  # noqa: E402

WINDOW = 1024
STACKS = (
    "weights=checkpoint",
    "weights=checkpoint(dtype=float32)",
    "weights=int8",
    "weights=int4",
    "weights=int4(asymmetric=true)",
    "weights=int4(head=int4)",
    "weights=int4(group=64)",
    "weights=int4(group=128)",
    "codec=int8",
    "weights=int8,codec=int8",
    "weights=int4,codec=int8",
)
FILES = {
    "BF16": [],
    "Q8_0": [],
    "Q4_0": [],
    "Q4_0-pure": ["--pure"],
    "Q4_0-head-8": ["--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0"],
}
"""Options of llama-quantize; the type is the name's part before the hyphen."""

SCORER = """
import json, sys
import numpy as np
from llama_cpp import Llama
windows = json.load(open(sys.argv[2]))
model = Llama(sys.argv[1], n_ctx=1024, n_batch=1024, logits_all=True, n_threads=2,
              n_threads_batch=2, verbose=False)
total = count = 0
for window in windows:
    model.reset()
    model.eval(window[:-1])
    logits = model.scores[: len(window) - 1].astype(np.float64)
    top = logits.max(-1)
    mass = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    total += float((mass - logits[np.arange(len(window) - 1), window[1:]]).sum())
    count += len(window) - 1
print(total / count)
"""


def windows(limit: int) -> list[list[int]]:
    """Windows that share one token: the last of one is the first, not predicted, of the next."""
    tokenizer = Tokenizer.from_file(f"{locate('reference')}/tokenizer.json")
    _, held_out = corpus.split(corpus.standard_library())
    stream, _ = encode_files(tokenizer, [file.text for file in held_out])
    ids = stream[: limit + 1].tolist()
    return [ids[i : i + WINDOW + 1] for i in range(0, len(ids) - 1, WINDOW)]


def perplexity(model: str | Path, stack: str, texts: list[list[int]]) -> float:
    llm = LLM(model, stack=stack, max_sequences=4, max_length=WINDOW + 16, prefix_reuse=False)
    logprobs = [value for score in llm.score(texts) for value in score.logprobs]
    assert len(logprobs) == sum(map(len, texts)) - len(texts)
    return math.exp(-math.fsum(logprobs) / len(logprobs))


def quantized(build: Path, folder: Path) -> dict[str, Path]:
    """The bundled model as GGUF files of llama.cpp's own rounding."""
    from tests.models.gguf_files import add_tokenizer, bfloat, convert

    source = Path(locate("reference"))
    files = {"BF16": folder / "BF16.gguf"}
    convert(
        source, files["BF16"], bfloat, edit=lambda writer: add_tokenizer(writer, source, "gpt2")
    )
    for name, options in FILES.items():
        if name == "BF16":
            continue
        files[name] = folder / f"{name}.gguf"
        command = [build / "bin" / "llama-quantize", *options, files["BF16"], files[name]]
        subprocess.run([*command, name.partition("-")[0]], check=True, capture_output=True)
    return files


def by_llama(build: Path, python: str, file: Path, texts: list[list[int]], folder: Path) -> float:
    (folder / "windows.json").write_text(json.dumps(texts))
    done = subprocess.run(
        [python, "-c", SCORER, file, folder / "windows.json"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "LLAMA_CPP_LIB_PATH": str(build / "bin")},
    )
    return math.exp(float(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llama", type=Path, help="build folder of llama.cpp")
    parser.add_argument("--llama-python", help="python that has llama-cpp-python")
    parser.add_argument("--tokens", type=int, default=1 << 40, help="so many of the text, or all")
    parser.add_argument("--out", "-o", type=Path, help="report to write")
    args = parser.parse_args()
    texts = windows(args.tokens)
    rows: list[tuple[str, str, int, float]] = []

    def measure(what: str, by: str, model: str | Path, stack: str, size: int = 0) -> None:
        start = time.monotonic()
        if by == "llama.cpp":
            value = by_llama(args.llama, args.llama_python, Path(model), texts, Path(folder))
        else:
            value = perplexity(model, stack, texts)
        rows.append((what, by, size, value))
        change = 100 * (value / rows[0][3] - 1)
        took = time.monotonic() - start
        print(f"{what:36} {by:16} {value:8.4f} {change:+7.3f} %  ({took:.0f} s)", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for stack in STACKS:
            measure(f"`{stack}`", "hasten", "reference", stack)
        files = quantized(args.llama, Path(folder)) if args.llama else {}
        for name, file in files.items():
            size = file.stat().st_size
            measure(f"llama.cpp {name}", "hasten, blocks", file, "", size)
            if name != "BF16":
                expanded = "weights=checkpoint(dtype=float32)"
                measure(f"llama.cpp {name}", "hasten, expanded", file, expanded, size)
            if args.llama_python:
                measure(f"llama.cpp {name}", "llama.cpp", file, "", size)
    if args.out:
        count = sum(map(len, texts)) - len(texts)
        args.out.write_text(report(rows, count))


def report(rows: list[tuple[str, str, int, float]], count: int) -> str:
    base = rows[0][3]
    lines = [
        "# What quantized weights cost",
        "",
        f"Perplexity of the bundled model on {count:,} held-out tokens of code, windows of "
        f"{WINDOW:,} without overlap.",
        "",
        conditions().markdown(),
        "| weights | run by | file, MB | perplexity | change |",
        "|---|---|---|---|---|",
    ]
    for what, by, size, value in rows:
        mega = f"{size / 1e6:.2f}" if size else ""
        lines.append(
            f"| {what} | {by} | {mega} | {value:.4f} | {100 * (value / base - 1):+.3f} % |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
