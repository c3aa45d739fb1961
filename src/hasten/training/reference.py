"""The recipe of the shipped reference models: tokenizer, target, draft, validation, report.

The draft learns mostly from the target's probabilities, since its only use is to agree with it.
Every stage leaves its result in the work folder; running again continues where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from hasten.models.facts import write_json
from hasten.training import corpus, validate
from hasten.training.bpe import train_tokenizer
from hasten.training.data import Curriculum, Mixture
from hasten.training.export import export_model, load_exported
from hasten.training.model import Llama, LlamaShape
from hasten.training.plot import plot_losses
from hasten.training.tasks import Task, all_tasks
from hasten.training.team import Team
from hasten.training.trainer import (
    TrainConfig,
    TrainState,
    cross_entropy,
    distillation,
    load_checkpoint,
    train,
)

VOCAB_SIZE = 4096
TARGET_SHAPE = LlamaShape(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    intermediate_size=768,
)
# Heads as large as the target's: one page layout serves both.
DRAFT_SHAPE = LlamaShape(
    vocab_size=VOCAB_SIZE,
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    intermediate_size=384,
)
TARGET_RUN = TrainConfig(
    tokens=60_000_000,
    batch_tokens=4096,
    phases=((0.35, 256), (0.8, 512), (1.0, 1024)),
    compile=True,
)
DRAFT_RUN = TrainConfig(
    tokens=30_000_000,
    batch_tokens=4096,
    phases=((0.5, 256), (1.0, 512)),
    learning_rate=3e-3,
    compile=True,
)
# Until copying forms, short rows with much of it; it forms within 5 M tokens (700 steps) then.
FIRST_CODE_SHARE = 0.2
FIRST_BOOST = {
    "copy.block": 3.0,
    "retrieve.pairs": 2.0,
    "chat": 0.5,
    "arithmetic": 0.5,
    "list": 0.5,
    "json": 0.5,
}
FIRST_LENGTH = 256
SHIPPED = Path(__file__).resolve().parent.parent / "reference"
SHORT_TASKS = ("list", "arithmetic")
OPEN_TASKS = ("chat",)


@dataclass(frozen=True)
class Recipe:
    """Budgets, and what the two runs share. A run ends at its first spent budget."""

    target: TrainConfig = TARGET_RUN
    draft: TrainConfig = DRAFT_RUN
    teacher_share: float = 0.8
    target_shape: LlamaShape = TARGET_SHAPE
    draft_shape: LlamaShape = DRAFT_SHAPE
    seed: int = 1


@dataclass(frozen=True)
class Texts:
    """The two sides of the standard library and the tasks over each."""

    train: list[str]
    held_out: list[str]

    @classmethod
    def load(cls) -> Texts:
        train_files, held_out = corpus.split(corpus.standard_library())
        return cls([file.text for file in train_files], [file.text for file in held_out])

    def training_tasks(self) -> tuple[tuple[Task, float], ...]:
        return all_tasks(self.train)

    def validation_tasks(self) -> list[Task]:
        return [task for task, _ in all_tasks(self.held_out)]


def make_tokenizer(work: Path, texts: Texts, vocab_size: int, seed: int = 0) -> Tokenizer:
    """Train the tokenizer on the training mixture once; later runs read it back."""
    path = work / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    rng = random.Random(seed)
    tasks, weights = zip(*texts.training_tasks(), strict=True)
    samples = [
        rng.choices(tasks, weights)[0].generate(rng, rng.randint(64, 500)).text for _ in range(3000)
    ]
    tokenizer = train_tokenizer([*texts.train, *samples, *samples], vocab_size)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def batches(tokenizer: Tokenizer, texts: Texts, seed: int) -> Curriculum:
    """The training batches of both models."""
    main = Mixture(tokenizer, texts.train, texts.training_tasks(), seed=seed)
    return Curriculum(main.with_shares(FIRST_CODE_SHARE, FIRST_BOOST), main, FIRST_LENGTH)


def train_target(
    work: Path, texts: Texts, tokenizer: Tokenizer, recipe: Recipe, team: Team
) -> tuple[Llama, bool]:
    """Train, or go on training, the target; whether its budget is spent."""
    generator = torch.Generator().manual_seed(recipe.seed)
    model = Llama(recipe.target_shape, generator)
    source = batches(tokenizer, texts, recipe.seed)
    state = train(
        model,
        source,
        recipe.target,
        work / "target",
        title="target",
        loss=cross_entropy(model),
        team=team,
    )
    return model.eval(), state.progress(recipe.target) >= 1.0


@torch.no_grad()
def inherit_embedding(draft: Llama, target: Llama) -> None:
    """Start the draft's embedding as the target's, cut to its first principal directions.

    Which tokens are alike is known already; the draft's few training tokens go to its layers.
    """
    wide, narrow = target.model.embed_tokens.weight, draft.model.embed_tokens.weight
    _, _, directions = torch.linalg.svd(wide, full_matrices=False)
    cut = wide @ directions[: narrow.shape[1]].T
    # Turned at random, so that no unit of the residual stream dominates.
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(cut.shape[1], cut.shape[1], generator=generator)
    turned = cut @ torch.linalg.qr(square).Q
    narrow.copy_(turned * (wide.norm() / turned.norm() * (narrow.numel() / wide.numel()) ** 0.5))


def train_draft(
    work: Path, texts: Texts, tokenizer: Tokenizer, recipe: Recipe, target: Llama, team: Team
) -> tuple[Llama, bool]:
    """The same for the draft, with ``target`` as its teacher."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    model = Llama(recipe.draft_shape, generator)
    if model.shape.hidden_size < target.shape.hidden_size:
        inherit_embedding(model, target)
    source = batches(tokenizer, texts, recipe.seed + 1)
    loss = distillation(model, target.requires_grad_(False), recipe.teacher_share)
    state = train(model, source, recipe.draft, work / "draft", title="draft", loss=loss, team=team)
    return model.eval(), state.progress(recipe.draft) >= 1.0


def validate_model(
    folder: Path, texts: Texts, count: int
) -> tuple[dict[str, Any], list[validate.Continuation]]:
    """The figures of one exported model, and its greedy continuations."""
    model, tokenizer = load_exported(folder)
    code = validate.score_code(model, tokenizer, texts.held_out)
    exact: dict[str, dict[str, float | None]] = {}
    for task in texts.validation_tasks():
        if task.name in OPEN_TASKS:
            continue
        if task.name in SHORT_TASKS:
            share = validate.exact_match_any_length(model, tokenizer, task, count)
            exact[task.name] = {"short": share}
            continue
        exact[task.name] = {
            str(length): validate.exact_match(model, tokenizer, task, length, count)
            for length in validate.LENGTHS
        }
    prompts = validate.open_prompts(tokenizer, texts.held_out, count)
    outputs = validate.continuations(folder, prompts)
    chats = [text for text in outputs if text.kind == "chat"]
    loops = {
        kind: sum(validate.ends_in_loop(text.output) for text in outputs if text.kind == kind)
        / max(1, sum(text.kind == kind for text in outputs))
        for kind in ("code", "chat")
    }
    found = {
        "parameters": model.num_parameters(),
        "shape": model.shape.to_dict(),
        "held_out_code": asdict(code),
        "exact_match": exact,
        "loops": loops,
        "chat_stops_by_itself": validate.stops_by_itself(chats, tokenizer),
        "samples_per_cell": count,
    }
    return found, outputs


def figures(
    work: Path, out: Path, name: str, texts: Texts, count: int
) -> tuple[dict[str, Any], list[validate.Continuation]]:
    """``validate_model``, kept in the work folder until weights or sample count change."""
    weights = (out / name / "model.safetensors").read_bytes()
    key = {"sha256": hashlib.sha256(weights).hexdigest(), "samples": count}
    kept = work / name / "validation.json"
    if kept.exists():
        known = json.loads(kept.read_text())
        if known["key"] == key:
            return known["figures"], [validate.Continuation(**text) for text in known["texts"]]
    found, outputs = validate_model(out / name, texts, count)
    kept.parent.mkdir(parents=True, exist_ok=True)
    known = {"key": key, "figures": found, "texts": [asdict(text) for text in outputs]}
    kept.write_text(json.dumps(known))
    return found, outputs


def training_facts(run: Path) -> dict[str, Any]:
    """Tokens, steps and time of a run from its checkpoint and log."""
    state = TrainState(**json.loads((run / "checkpoint" / "state.json").read_text())["state"])
    return {
        "tokens": state.tokens,
        "steps": state.step,
        "minutes": round(state.seconds / 60, 1),
    }


def make_report(
    work: Path, out: Path, texts: Texts, count: int, hardware: str, note: str = ""
) -> dict[str, Any]:
    """Validate both exported models and write ``REPORT.md`` and ``report.json`` beside them."""
    target, target_texts = figures(work, out, "target", texts, count)
    draft, _ = figures(work, out, "draft", texts, count)
    draft_model, tokenizer = load_exported(out / "draft")
    target_model, _ = load_exported(out / "target")
    for name, facts in (("target", target), ("draft", draft)):
        facts["training"] = training_facts(work / name)
    agreement = {
        kind: asdict(
            validate.agreement(draft_model, [text for text in target_texts if text.kind == kind])
        )
        for kind in ("code", "chat")
    }
    versions = ("torch", "transformers", "tokenizers", "safetensors")
    report = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": hardware,
        "note": note,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in versions},
        },
        "megabytes": round(weight_bytes(out) / 1e6, 1),
        "target": target,
        "draft": draft,
        "agreement": agreement,
        "agreement_on_held_out_code": validate.agreement_on_text(
            draft_model, target_model, tokenizer, texts.held_out
        ),
    }
    write_json(out / "report.json", report)
    (out / "REPORT.md").write_text(report_text(report), encoding="utf-8")
    return report


def weight_bytes(out: Path) -> int:
    """Size of everything that the two model folders hold."""
    return sum(
        path.stat().st_size for name in ("target", "draft") for path in (out / name).iterdir()
    )


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def report_text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        "# Reference models",
        "",
        f"{report['date']} on {report['hardware']}; {versions}. Both models: "
        f"{report['megabytes']} MB in bfloat16. Made by `hasten train reference`; the figures are "
        "in `report.json` too.",
        "",
    ]
    if report["note"]:
        lines += [report["note"], ""]
    lines += ["| | target | draft |", "|---|---|---|"]

    def row(label: str, value: Any) -> None:
        lines.append(f"| {label} | {value(report['target'])} | {value(report['draft'])} |")

    row("parameters", lambda m: f"{m['parameters'] / 1e6:.2f} M")
    row("hidden size, layers", lambda m: "{hidden_size}, {num_hidden_layers}".format(**m["shape"]))
    row(
        "heads, key-value heads, head size",
        lambda m: "{num_attention_heads}, {num_key_value_heads}, {head_dim}".format(**m["shape"]),
    )
    row("training tokens", lambda m: f"{m['training']['tokens'] / 1e6:.1f} M")
    row("training minutes (shared machine)", lambda m: m["training"]["minutes"])
    row("held-out code: perplexity", lambda m: f"{m['held_out_code']['perplexity']:.2f}")
    row("held-out code: bits per byte", lambda m: f"{m['held_out_code']['bits_per_byte']:.3f}")
    row("ends in a loop, code (256 greedy tokens)", lambda m: percent(m["loops"]["code"]))
    row("ends in a loop, chat (256 greedy tokens)", lambda m: percent(m["loops"]["chat"]))
    row("chat answers that stop by themselves", lambda m: percent(m["chat_stops_by_itself"]))
    lines += [
        "",
        "Draft against target, on the target's greedy text:",
        "",
        "| text | same next token | accepted of 4 drafted |",
        "|---|---|---|",
    ]
    for kind, values in report["agreement"].items():
        lines.append(f"| {kind} | {percent(values['share'])} | {values['accepted']:.2f} |")
    lines += [
        "",
        f"On held-out code as it is written, both have the same most likely next token at "
        f"{percent(report['agreement_on_held_out_code'])} of the positions. That is the figure to "
        "expect on text that does not repeat itself: many greedy continuations of code end in "
        "loops, which a draft guesses easily.",
    ]
    count = report["target"]["samples_per_cell"]
    for name in ("target", "draft"):
        lengths = [str(length) for length in validate.LENGTHS]
        lines += [
            "",
            f"Exact match of the {name}, greedy, {count} fresh samples a cell, by context in "
            "tokens (prompt and answer; `-`: the task is not that long):",
            "",
            "| task | " + " | ".join(lengths) + " |",
            "|---" * (len(lengths) + 1) + "|",
        ]
        short = []
        for task, shares in report[name]["exact_match"].items():
            if "short" in shares:
                short.append(f"{task} {percent(shares['short'])}")
                continue
            lines.append(f"| {task} | " + " | ".join(percent(shares[n]) for n in lengths) + " |")
        lines += ["", "Single short questions: " + ", ".join(short) + "."]
    lines += [
        "",
        "Loops: the end repeats one n-gram (up to 48 tokens) at least three times over at least 24 "
        "tokens. Chat prompts come from the same templates as the training turns, with fresh "
        "random parts; held-out code is the 3 % of the standard library's files picked by a hash "
        "of the file name.",
    ]
    return "\n".join(lines) + "\n"


def describe_hardware() -> str:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in _lines(Path("/proc/cpuinfo"))
            if line.startswith("model name")
        ),
        platform.processor() or platform.machine(),
    )
    return f"{os.cpu_count()} x {model}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def train_reference(
    work: Path,
    out: Path,
    recipe: Recipe | None = None,
    *,
    stages: tuple[str, ...] = ("target", "draft", "report"),
    samples: int = 64,
    picture: Path | None = None,
    hardware: str = "",
    note: str = "",
) -> None:
    """Run the stages asked for; ``work`` keeps checkpoints and logs, ``out`` gets the models.

    ``out/target`` and ``out/draft`` are replaced as wholes. A stage continues its checkpoint; after
    an interrupt (the checkpoint is saved then) nothing is exported.
    """
    recipe = recipe or Recipe()
    team = Team.from_environment()
    texts = Texts.load()
    if team.leads:
        make_tokenizer(work, texts, recipe.target_shape.vocab_size)
        out.mkdir(parents=True, exist_ok=True)
    team.wait()
    tokenizer = make_tokenizer(work, texts, recipe.target_shape.vocab_size)
    if "target" in stages:
        model, finished = train_target(work, texts, tokenizer, recipe, team)
        if not finished:
            return
        if team.leads:
            export_model(model, tokenizer, out / "target")
        team.wait()
    if "draft" in stages:
        target, _ = load_exported(out / "target")
        model, finished = train_draft(work, texts, tokenizer, recipe, target, team)
        if not finished:
            return
        if team.leads:
            export_model(model, tokenizer, out / "draft")
    if "report" in stages and team.leads:
        begin = time.monotonic()
        make_report(work, out, texts, samples, hardware or describe_hardware(), note)
        if picture is not None:
            logs = {
                "target": work / "target" / "loss.jsonl",
                "draft (mostly divergence from the target)": work / "draft" / "loss.jsonl",
            }
            plot_losses(logs, picture)
        print(f"validated in {time.monotonic() - begin:.0f} s: {out / 'REPORT.md'}")


def export_checkpoint(work: Path, out: Path, name: str) -> None:
    """Export a run's latest checkpoint as it is, also while the run goes on."""
    folder = work / name / "checkpoint"
    shape = LlamaShape(**json.loads((folder / "state.json").read_text())["shape"])
    model = Llama(shape)
    load_checkpoint(folder, model, None)
    out.mkdir(parents=True, exist_ok=True)
    export_model(model, Tokenizer.from_file(str(work / "tokenizer.json")), out / name)


def main(arguments: list[str] | None = None) -> None:
    """Command line: ``python -m hasten.training.reference``, also under ``torchrun``."""
    parser = argparse.ArgumentParser(description="Train and validate the reference models.")
    parser.add_argument("--work", type=Path, default=Path("build/reference"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="where the models go")
    parser.add_argument("--stages", nargs="+", default=["target", "draft", "report"])
    parser.add_argument("--minutes", type=float, help="time budget of the target")
    parser.add_argument("--draft-minutes", type=float, help="time budget of the draft")
    parser.add_argument("--tokens", type=int, help="token budget of the target")
    parser.add_argument("--draft-tokens", type=int, help="token budget of the draft")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--samples", type=int, default=64, help="samples a cell of the report")
    parser.add_argument("--picture", type=Path, help="where to draw the loss curves")
    parser.add_argument("--hardware", default="", help="how the report names this machine")
    parser.add_argument("--note", default="", help="what the report says about this run")
    parser.add_argument("--export-now", choices=["target", "draft"], help="export a checkpoint")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.export_now:
        export_checkpoint(options.work, options.out, options.export_now)
        return
    recipe = Recipe()
    shared: dict[str, Any] = {
        "precision": options.precision,
        "compile": not options.no_compile,
    }
    recipe = replace(
        recipe,
        target=replace(recipe.target, **shared, **budget(options.minutes, options.tokens)),
        draft=replace(
            recipe.draft, **shared, **budget(options.draft_minutes, options.draft_tokens)
        ),
    )
    train_reference(
        options.work,
        options.out,
        recipe,
        stages=tuple(options.stages),
        samples=options.samples,
        picture=options.picture,
        hardware=options.hardware,
        note=options.note,
    )


def budget(minutes: float | None, tokens: int | None) -> dict[str, Any]:
    """Budgets as given. Time alone lifts the default token budget."""
    if minutes is None and tokens is None:
        return {}
    return {
        "minutes": minutes if minutes is not None else math.inf,
        "tokens": tokens if tokens is not None else 10**12,
    }


if __name__ == "__main__":
    main()
