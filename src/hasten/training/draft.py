"""A draft model for a given target: FastDraft's two stages, and a report of what they gave.

    pre-train   next tokens of a text, with the target's tokenizer
    ask         the target goes on from beginnings cut from other text, at several temperatures
    align       fine-tune on these answers; nothing is learned from the prompts
    measure     acceptance on text that none of the stages saw, before and after alignment

A draft is accepted as often as it writes what its target would, and that is neither the text that
the target was trained on nor what is true. Source: FastDraft: How to Train Your Draft (Zafrir et
al., 2024). With ``exits`` the draft is several nested models, trained together (S2D: Sorted
Speculative Decoding, Kavehzadeh et al., 2024), for ``draft=s2d``.

The work folder keeps checkpoints and answers; the same call goes on from where it stopped.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hasten import LLM, SamplingParams
from hasten.models.base import ModelConfig
from hasten.models.facts import read_json, write_json
from hasten.models.loading import load_config, locate
from hasten.models.tokenizer import Tokenizer
from hasten.speculation.drafters.model import ModelDraft
from hasten.speculation.drafters.s2d import S2D
from hasten.speculation.statistics import DraftStatistics
from hasten.training import corpus
from hasten.training.corpus import SourceFile
from hasten.training.draft_data import (
    Answer,
    Answers,
    Division,
    Prompts,
    Speech,
    Windows,
    read_answers,
)
from hasten.training.export import fresh_folder, llama_config, write_model
from hasten.training.model import Llama, LlamaShape
from hasten.training.trainer import (
    Loss,
    TrainConfig,
    cross_entropy,
    sorted_cross_entropy,
    train,
)

HEAD_SIZE = 32
BY_NAME = "hasten_draft_of"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
ASKED_AT_ONCE = 64
MODES = {"greedy": 0.0, "sampled": 1.0}
"""Temperatures at which acceptance is measured."""
RESAMPLES = 1000


@dataclass(frozen=True)
class DraftRecipe:
    """Sizes and budgets.

    Attributes:
        layers, hidden: of the draft; heads of 32, feed-forward three times as wide.
        exits: layers after which the draft can answer, rising to ``layers``; empty = the last.
        tokens: to pre-train on; ``minutes`` ends it earlier.
        align_tokens: that the target writes; 5 to 20 % of ``tokens`` in the paper's scale.
        epochs: over the answers.
        shortest, longest: prompts, in tokens.
        answer_tokens: the longest answer.
        temperatures: taken in turns; with 0 the draft also learns what is likeliest.
        prompts, measured_tokens: of the measurement at the end.
        k: candidates a pass there.
    """

    layers: int = 2
    hidden: int = 128
    exits: tuple[int, ...] = ()
    tokens: int = 8_000_000
    minutes: float = math.inf
    align_tokens: int = 800_000
    epochs: int = 2
    lengths: tuple[int, ...] = (256, 512)
    batch_tokens: int = 4096
    learning_rate: float = 3e-3
    align_rate: float = 1e-3
    shortest: int = 16
    longest: int = 96
    answer_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 0.5, 1.0)
    prompts: int = 48
    measured_tokens: int = 64
    k: int = 4
    seed: int = 1
    precision: str = "auto"
    compile: bool = True

    def __post_init__(self) -> None:
        if self.layers < 1 or self.hidden < HEAD_SIZE or self.hidden % HEAD_SIZE:
            raise ValueError(
                f"layers={self.layers}, hidden={self.hidden}: a draft has at least one layer and "
                f"a hidden size in steps of {HEAD_SIZE}"
            )
        exits = list(self.exits)
        if exits and (exits != sorted(set(exits)) or exits[0] < 1 or exits[-1] != self.layers):
            raise ValueError(
                f"exits {exits} must rise and end with the draft's {self.layers} layers"
            )
        for name in ("tokens", "minutes", "align_tokens", "epochs", "answer_tokens", "prompts"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above zero")
        if not 0 < self.shortest <= self.longest:
            raise ValueError(f"prompts of {self.shortest} to {self.longest} tokens")

    def shape(self, config: ModelConfig) -> LlamaShape:
        """Of a draft for a target: its vocabulary and positions, heads in groups of two."""
        heads = self.hidden // HEAD_SIZE
        return LlamaShape(
            vocab_size=config.vocab_size,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
            head_dim=HEAD_SIZE,
            intermediate_size=3 * self.hidden,
            max_position_embeddings=config.max_positions,
        )

    def pretraining(self) -> TrainConfig:
        count = len(self.lengths)
        steps = self.tokens // self.batch_tokens
        return TrainConfig(
            tokens=self.tokens,
            minutes=self.minutes,
            batch_tokens=self.batch_tokens,
            phases=tuple(((i + 1) / count, length) for i, length in enumerate(self.lengths)),
            learning_rate=self.learning_rate,
            warmup_steps=min(100, steps // 10),
            precision=self.precision,
            compile=self.compile,
        )

    def alignment(self, answers: Answers) -> TrainConfig:
        """Whole epochs; the rate falls from the start, as the weights are good already."""
        rows = max(1, self.batch_tokens // answers.length)
        steps = -(-self.epochs * len(answers.answers) // rows)
        return TrainConfig(
            tokens=steps * rows * answers.length,
            batch_tokens=rows * answers.length,
            phases=((1.0, answers.length),),
            learning_rate=self.align_rate,
            warmup_steps=min(20, steps // 5),
            decay_share=1.0,
            precision=self.precision,
            compile=self.compile,
        )

    def objective(self, model: Llama) -> Loss:
        return sorted_cross_entropy(model, self.exits) if self.exits else cross_entropy(model)


class Target:
    """What a draft must know of its target, which is loaded only to ask it."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.folder = locate(model)
        self.config = load_config(self.folder, torch.float32)
        self.tokenizer = Tokenizer.load(self.folder)
        self.speech = Speech(self.tokenizer, self.config, model)

    def save_tokenizer(self, folder: Path) -> None:
        """The target's own files; for a GGUF file what they would say."""
        if (self.folder / "tokenizer.json").is_file():
            for name in TOKENIZER_FILES:
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, folder / name)
            return
        self.tokenizer.core.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.tokenizer.special_tokens,
        }
        if template := self.tokenizer.chat_templates.get("default"):
            config["chat_template"] = template
        write_json(folder / "tokenizer_config.json", config)


def export_draft(
    model: Llama, target: Target, exits: Sequence[int], folder: Path, *reports: dict[str, Any]
) -> None:
    """A checkpoint with the target's tokenizer, and ``report.json``; replaces ``folder``."""
    config = llama_config(
        model.shape, torch.bfloat16, bos=target.config.bos_id, eos=target.config.eos_ids
    )
    config[BY_NAME] = Path(target.model).name
    if exits:
        config["draft_exits"] = list(exits)
    with fresh_folder(folder) as fresh:
        write_model(model, config, fresh, torch.bfloat16)
        target.save_tokenizer(fresh)
        for report in reports:
            write_json(fresh / "report.json", report)


def pretrain(
    target: Target, texts: Sequence[str], recipe: DraftRecipe, work: Path
) -> tuple[Llama, bool]:
    """Stage 1; the model, and whether it is finished."""
    model = Llama(recipe.shape(target.config), torch.Generator().manual_seed(recipe.seed))
    source = Windows(target.speech, texts, target.config.vocab_size, recipe.seed)
    config = recipe.pretraining()
    objective = recipe.objective(model)
    state = train(model, source, config, work / "pretraining", title="pre-train", loss=objective)
    return model, state.progress(config) >= 1.0


def ask(target: Target, texts: Sequence[str], recipe: DraftRecipe, file: Path) -> list[Answer]:
    """The target's answers to prompts cut from ``texts``, ``align_tokens`` or a little more.

    Each batch of them is written to ``file`` as it is there; the next call goes on behind them.
    """
    answers = read_answers(file)
    written = sum(len(one.tokens) for one in answers)
    if written >= recipe.align_tokens:
        return answers
    seed = f"{recipe.seed}/ask"
    prompts = Prompts(target.speech, texts, recipe.shortest, recipe.longest, seed)
    llm = LLM(target.model, max_sequences=ASKED_AT_ONCE, max_length=context(target, recipe))
    console = Console()
    bar = Progress(
        TextColumn("ask the target"),
        BarColumn(),
        TextColumn("{task.completed:,} of {task.total:,} tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with file.open("a", encoding="utf-8") as kept, bar:
        task = bar.add_task("", total=recipe.align_tokens, completed=written)
        while written < recipe.align_tokens:
            numbers = range(len(answers), len(answers) + ASKED_AT_ONCE)
            params = [
                SamplingParams(
                    max_tokens=recipe.answer_tokens,
                    temperature=recipe.temperatures[number % len(recipe.temperatures)],
                    seed=number,
                )
                for number in numbers
            ]
            outputs = llm.generate([prompts[number] for number in numbers], params)
            fresh = [
                Answer(list(out.prompt_token_ids), list(out.outputs[0].token_ids), p.temperature)
                for out, p in zip(outputs, params, strict=True)
                if p.temperature is not None
            ]
            kept.write("".join(one.to_json() + "\n" for one in fresh))
            kept.flush()
            answers += fresh
            written += sum(len(one.tokens) for one in fresh)
            bar.update(task, completed=written)
            if not console.is_terminal:
                print(f"asked: {written:,} of {recipe.align_tokens:,} tokens", flush=True)
    return answers


def align(
    model: Llama, answers: Sequence[Answer], target: Target, recipe: DraftRecipe, work: Path
) -> bool:
    """Stage 2, in place; whether it is finished."""
    source = Answers(answers, target.config.vocab_size, recipe.seed)
    config = recipe.alignment(source)
    objective = recipe.objective(model)
    state = train(model, source, config, work / "alignment", title="align", loss=objective)
    return state.progress(config) >= 1.0


def context(target: Target, recipe: DraftRecipe) -> int:
    """Positions that prompts and answers take.

    Raises:
        ValueError: more than the target was made for.
    """
    answer = max(recipe.answer_tokens, recipe.measured_tokens)
    needed = len(target.speech.lead) + recipe.longest + answer
    if needed > target.config.max_positions:
        raise ValueError(
            f"prompts and answers take {needed} positions and {target.model} was made for "
            f"{target.config.max_positions}: ask for shorter ones"
        )
    return needed


def acceptance(
    target: Target, draft: Path, prompts: Sequence[Sequence[int]], recipe: DraftRecipe
) -> dict[str, Any]:
    """Acceptance of a draft by its target on some prompts, greedy and at temperature 1.

    ``alpha`` is the share of examined candidates that were accepted, with a 95 % interval by
    bootstrap over the prompts; ``tau`` the tokens a pass of the target.
    """
    method = S2D if recipe.exits else ModelDraft
    llm = LLM(
        target.model,
        stack={"draft": method(path=str(draft), k=recipe.k)},
        max_sequences=16,
        max_length=context(target, recipe),
    )
    found: dict[str, Any] = {"drafter": str(llm.stack["draft"].card.name)}
    for mode, temperature in MODES.items():
        params = [
            SamplingParams(max_tokens=recipe.measured_tokens, temperature=temperature, seed=seed)
            for seed in range(len(prompts))
        ]
        outputs = llm.generate(list(prompts), params)
        each = [output.outputs[0].figures.speculation for output in outputs]
        total = DraftStatistics()
        for one in each:
            total.add(one)
        found[mode] = {
            "alpha": total.alpha_examined,
            "alpha_95": alpha_interval(each),
            "tau": total.tau,
            "by_depth": total.by_depth,
            "examined": total.examined,
        }
    return found


def alpha_interval(each: Sequence[DraftStatistics]) -> list[float]:
    """The middle 95 % of alpha over resampled requests."""
    counts = np.array([(one.accepted, one.examined) for one in each])
    drawn = np.random.default_rng(0).integers(len(each), size=(RESAMPLES, len(each)))
    sums = counts[drawn].sum(1)
    shares = sums[:, 0] / np.maximum(1, sums[:, 1])
    return [float(bound) for bound in np.quantile(shares, (0.025, 0.975))]


def cost(target: Target, draft: Path, prompt: Sequence[int], recipe: DraftRecipe) -> dict[str, Any]:
    """What a pass of the draft costs beside one of the target, in parameters and measured here."""
    parameters, seconds = [], []
    for model in (draft, target.model):
        llm = LLM(model, max_sequences=1, max_length=context(target, recipe))
        params = SamplingParams(max_tokens=recipe.measured_tokens, temperature=0, ignore_eos=True)
        llm.generate(prompt, params)
        before = llm.stats.decode_seconds, llm.stats.decode_steps
        llm.generate(prompt, params)
        passes = llm.stats.decode_steps - before[1]
        seconds.append((llm.stats.decode_seconds - before[0]) / passes)
        parameters.append(llm.engine.model.parameters)
    return {
        "draft_parameters": parameters[0],
        "target_parameters": parameters[1],
        "parameter_ratio": parameters[0] / parameters[1],
        "draft_pass_ms": 1e3 * seconds[0],
        "target_pass_ms": 1e3 * seconds[1],
        "latency_ratio": seconds[0] / seconds[1],
    }


def speed_up(tau: float, ratio: float, k: int) -> float:
    """Tokens per target pass over what the pass and its ``k`` draft passes cost, in target passes.

    With the ratio of parameters this is the memory-bound speed-up (MBSU): a bound for choosing a
    size, not a wall time.
    """
    return tau / (ratio * k + 1)


def train_draft(
    model: str,
    out: Path,
    recipe: DraftRecipe | None = None,
    *,
    work: Path | None = None,
    files: Sequence[SourceFile] | None = None,
) -> dict[str, Any] | None:
    """All stages for the target ``model``; ``out`` gets the draft with its ``report.json``.

    Args:
        work: checkpoints, logs and answers; by default ``out`` with ``.work`` behind its name.
        files: texts; by default this interpreter's standard library.

    Returns:
        The report, or None after an interrupt: the same call goes on.

    Raises:
        ValueError: ``out`` or ``work`` hold something else, or the target cannot have such a draft.
    """
    recipe = recipe or DraftRecipe()
    work = work or out.with_name(out.name + ".work")
    target = Target(model)
    context(target, recipe)
    files = corpus.standard_library() if files is None else files
    division = Division.of(files)
    refuse_other_folder(out)
    claim(work, target, recipe)

    draft, finished = pretrain(target, division.pretraining, recipe, work)
    if not finished:
        return None
    export_draft(draft, target, recipe.exits, work / "pretrained")
    answers = ask(target, division.asking, recipe, work / "answers.jsonl")
    if not align(draft, answers, target, recipe, work):
        return None
    export_draft(draft, target, recipe.exits, work / "aligned")

    held_out = Prompts(
        target.speech, division.held_out, recipe.shortest, recipe.longest, f"{recipe.seed}/measure"
    )
    prompts = [held_out[number] for number in range(recipe.prompts)]
    report: dict[str, Any] = {
        "target": Path(model).name,
        "k": recipe.k,
        "documents": {name: len(texts) for name, texts in asdict(division).items()},
        "answers": {
            "count": len(answers),
            "tokens": sum(len(one.tokens) for one in answers),
            "temperatures": list(recipe.temperatures),
        },
        "cost": cost(target, work / "aligned", prompts[0], recipe),
        "before": acceptance(target, work / "pretrained", prompts, recipe),
        "after": acceptance(target, work / "aligned", prompts, recipe),
    }
    for stage in ("before", "after"):
        for mode in MODES:
            row = report[stage][mode]
            tau, prices = row["tau"] or 1.0, report["cost"]
            row["mbsu"] = speed_up(tau, prices["parameter_ratio"], recipe.k)
            row["by_latency"] = speed_up(tau, prices["latency_ratio"], recipe.k)
    export_draft(draft, target, recipe.exits, out, report)
    return report


def refuse_other_folder(out: Path) -> None:
    """Only an earlier draft is replaced."""
    if not out.exists():
        return
    config = out / "config.json"
    if not config.is_file() or BY_NAME not in read_json(config):
        raise ValueError(f"{out} exists and is not a draft model made here: choose another folder")


def claim(work: Path, target: Target, recipe: DraftRecipe) -> None:
    """Note whose work this is, so that no other run goes on from it. Minutes may change."""
    described = {"target": target.model, **asdict(recipe)}
    del described["minutes"]
    described = json.loads(json.dumps(described))
    note = work / "recipe.json"
    if note.exists():
        known = read_json(note)
        if other := [name for name, value in described.items() if known.get(name) != value]:
            raise ValueError(
                f"{work} holds a run with another {', '.join(other)}: give these as they were, "
                "take another work folder, or remove this one"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    write_json(note, described)


def report_text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    prices = report["cost"]
    lines = [
        f"draft {prices['draft_parameters'] / 1e6:.2f} M parameters, target "
        f"{prices['target_parameters'] / 1e6:.2f} M: ratio {prices['parameter_ratio']:.3f}; "
        f"a pass {prices['draft_pass_ms']:.2f} ms against {prices['target_pass_ms']:.2f} ms: "
        f"ratio {prices['latency_ratio']:.3f}",
        f"held-out prompts, {report['k']} candidates a pass ({report['after']['drafter']})",
        f"{'':24}{'alpha (95 %)':>20}{'tau':>7}{'MBSU':>7}{'by latency':>12}",
    ]
    names = {"before": "pre-trained", "after": "aligned"}
    for mode in MODES:
        for stage, name in names.items():
            row = report[stage][mode]
            if row["alpha"] is None:
                lines.append(f"{name + ', ' + mode:24}{'nothing drafted':>20}")
                continue
            low, high = row["alpha_95"]
            alpha = f"{row['alpha']:.3f} ({low:.2f}-{high:.2f})"
            lines.append(
                f"{name + ', ' + mode:24}{alpha:>20}{row['tau']:7.2f}{row['mbsu']:7.2f}"
                f"{row['by_latency']:12.2f}"
            )
    lines.append("MBSU is a bound from parameter counts; no column is a wall time")
    return "\n".join(lines)
