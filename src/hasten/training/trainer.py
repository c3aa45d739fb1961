"""The training loop: mixed precision, warmup-stable-decay, checkpoints, logs, clean interruption.

Everything that decides the next step (learning rate, sequence length, batch) is a function of the
step and of *progress*, the larger of the shares of the token budget and of the time budget that are
used up. With a token budget only, runs repeat and resumed runs continue exactly.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.training.data import Batch
from hasten.training.model import Llama
from hasten.training.team import Team


@dataclass(frozen=True)
class TrainConfig:
    """Budgets and hyperparameters of one run.

    ``phases`` is the curriculum: ``(until, length)`` pairs, ``until`` a progress in (0, 1].
    """

    tokens: int
    minutes: float = math.inf
    batch_tokens: int = 8192
    phases: tuple[tuple[float, int], ...] = ((1.0, 512),)
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.97)
    clip: float = 1.0
    precision: str = "auto"
    compile: bool = False
    checkpoint_minutes: float = 5.0

    def length(self, progress: float) -> int:
        """The sequence length at a progress."""
        later = [length for until, length in self.phases if progress < until]
        return later[0] if later else self.phases[-1][1]

    def rate(self, step: int, progress: float) -> float:
        """Warmup by steps, then stable, then linear decay over the last ``decay_share``."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        left = max(0.0, 1.0 - progress) / self.decay_share if self.decay_share else 1.0
        return self.learning_rate * warm * min(1.0, left)


class BatchSource(Protocol):
    def batch(self, step: int, rows: int, length: int) -> Batch: ...


@dataclass
class TrainState:
    """What a checkpoint holds beside tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def progress(self, config: TrainConfig) -> float:
        return max(self.tokens / config.tokens, self.seconds / 60 / config.minutes)


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def cross_entropy(model: Llama) -> Loss:
    """Mean next-token loss over the scored rows."""

    def loss(tokens: Tensor, rows: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        hidden = model(tokens).flatten(0, 1)[rows]
        each = F.cross_entropy(model.logits(hidden).float(), targets, reduction="none")
        return (each * mask).sum() / mask.sum()

    return loss


def distillation(model: Llama, teacher: Llama, share: float) -> Loss:
    """``share`` of the loss is the divergence from the teacher's distribution at each scored row.

    A draft is accepted as often as it agrees with its target, so the target's own probabilities are
    the better lesson (DistillSpec, Zhou et al. 2023).
    """

    def loss(tokens: Tensor, rows: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher.logits(teacher(tokens).flatten(0, 1)[rows]).float().log_softmax(-1)
        own = model.logits(model(tokens).flatten(0, 1)[rows]).float().log_softmax(-1)
        truth = F.nll_loss(own, targets, reduction="none")
        apart = (wanted.exp() * (wanted - own)).sum(-1)
        return (((1 - share) * truth + share * apart) * mask).sum() / mask.sum()

    return loss


def sorted_cross_entropy(model: Llama, exits: Sequence[int]) -> Loss:
    """The mean over ``exits`` of the next-token loss of the sub-model that ends there (SoFT).

    All share the layers up to their exit, the last norm and the head, so that one set of weights
    is several models (S2D, Kavehzadeh et al. 2024).
    """

    def loss(tokens: Tensor, rows: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        total = torch.zeros(())
        for hidden in model.model.at_exits(tokens, exits):
            logits = model.logits(hidden.flatten(0, 1)[rows]).float()
            total = total + (F.cross_entropy(logits, targets, reduction="none") * mask).sum()
        return total / (len(exits) * mask.sum())

    return loss


def pick_precision(wanted: str = "auto") -> torch.dtype:
    """The type of the matrix products: as asked, or the faster one by a short measurement.

    bfloat16 wins several times over where the processor has AMX or AVX512-BF16 and loses elsewhere.
    """
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if wanted != "auto":
        if wanted not in named:
            raise ValueError(f"precision must be auto, float32 or bfloat16, not {wanted!r}")
        return named[wanted]
    seconds: dict[torch.dtype, float] = {}
    for dtype in named.values():
        x, w = torch.randn(2048, 256).to(dtype), torch.randn(768, 256).to(dtype)
        for _ in range(3):
            F.linear(x, w)
        start = time.perf_counter()
        for _ in range(10):
            F.linear(x, w)
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=lambda dtype: seconds[dtype])


class Optimizer:
    """Muon for the matrices of the layers, AdamW for embedding and norms; one learning rate.

    Muon (Jordan et al. 2024) orthogonalizes the momentum of each matrix; with the update scaled to
    AdamW's root mean square it needs clearly fewer tokens at this size.
    """

    def __init__(self, model: Llama, config: TrainConfig) -> None:
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError("training needs torch 2.9 or later (torch.optim.Muon)")
        matrices = [p for p, name in self.names.items() if p.ndim == 2 and ".layers." in name]
        embeddings = [p for p, name in self.names.items() if p.ndim == 2 and ".layers." not in name]
        norms = [p for p in self.names if p.ndim == 1]
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                matrices,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(
                [
                    {"params": embeddings, "weight_decay": config.weight_decay},
                    {"params": norms, "weight_decay": 0.0},
                ],
                lr=config.learning_rate,
                betas=config.betas,
                fused=True,
            ),
        )

    def step(self, rate: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors, for safetensors."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            for parameter, state in part.state.items():
                for key, value in state.items():
                    found[f"{self.names[parameter]}/{key}"] = torch.as_tensor(value).contiguous()
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        parameters = {name: p for p, name in self.names.items()}
        owner = {
            p: part for part in self.parts for group in part.param_groups for p in group["params"]
        }
        for full, value in tensors.items():
            name, key = full.rsplit("/", 1)
            parameter = parameters[name]
            owner[parameter].state[parameter][key] = value.clone()


def save_checkpoint(folder: Path, model: Llama, optimizer: Optimizer, state: TrainState) -> None:
    """Write a checkpoint beside the old one and swap them, so that a crash leaves a whole one."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for stale in (fresh, old):
        shutil.rmtree(stale, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(
        {name: value.detach().contiguous() for name, value in model.state_dict().items()},
        fresh / "model.safetensors",
    )
    save_file(optimizer.tensors(), fresh / "optimizer.safetensors")
    described = {"shape": model.shape.to_dict(), "state": asdict(state)}
    (fresh / "state.json").write_text(json.dumps(described, indent=2) + "\n")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path, model: Llama, optimizer: Optimizer | None) -> TrainState:
    """Fill ``model`` and, where given, ``optimizer`` from a checkpoint."""
    described: dict[str, Any] = json.loads((folder / "state.json").read_text())
    if described["shape"] != model.shape.to_dict():
        raise ValueError(f"checkpoint {folder} holds another shape: {described['shape']}")
    model.load_state_dict(load_file(folder / "model.safetensors"))
    if optimizer is not None:
        optimizer.load(load_file(folder / "optimizer.safetensors"))
    return TrainState(**described["state"])


@contextlib.contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM asks the loop to stop after the current step; a second Ctrl-C kills."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Reporter:
    """A progress bar on a terminal, plain lines elsewhere, and always one JSON line a step."""

    def __init__(self, title: str, log: Path, every: int = 20) -> None:
        self.title, self.every = title, every
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log.open("a", encoding="utf-8", buffering=1)
        console = Console()
        self.bar: Progress | None = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %  {task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self.bar.start()
            self.task = self.bar.add_task(title, total=1.0, note="")

    def step(self, entry: dict[str, float | int], progress: float) -> None:
        self.log.write(json.dumps(entry) + "\n")
        note = (
            f"loss {entry['loss']:.3f}  {entry['tokens'] / 1e6:.1f} M tokens"
            f"  {entry['tokens_per_second']:.0f} tokens/s"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=progress, note=note)
        elif entry["step"] % self.every == 0:
            print(
                f"{self.title} step {entry['step']} length {entry['length']}"
                f" rate {entry['rate']:.2e} {note} ({progress:.1%})",
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.log.close()


def train(
    model: Llama,
    source: BatchSource,
    config: TrainConfig,
    folder: Path,
    *,
    title: str = "model",
    loss: Loss | None = None,
    team: Team | None = None,
) -> TrainState:
    """Train until a budget is used up or an interrupt; leaves ``folder/checkpoint`` behind.

    ``folder/loss.jsonl`` gets one line a step. An existing checkpoint is continued.
    """
    team = team or Team()
    optimizer = Optimizer(model, config)
    state = TrainState()
    checkpoint = folder / "checkpoint"
    log = folder / "loss.jsonl"
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, model, optimizer)
        if team.leads:
            cut_log(log, state.step)
    elif log.exists() and team.leads:
        log.unlink()
    dtype = pick_precision(config.precision)
    objective = loss or cross_entropy(model)
    if config.compile:
        objective = torch.compile(objective, dynamic=False)
    team.wait()
    reporter = Reporter(title, log) if team.leads else None
    started = time.monotonic() - state.seconds
    saved = time.monotonic()
    parameters = list(model.parameters())
    model.train()
    try:
        with stop_flag() as stopping:
            while True:
                progress, stop = team.largest(state.progress(config), stopping())
                if progress >= 1.0 or stop:
                    break
                begin = time.monotonic()
                length = config.length(progress)
                rows = max(1, config.batch_tokens // (length * team.size))
                batch = source.batch(state.step * team.size + team.rank, rows, length)
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    value = objective(batch.tokens, batch.rows, batch.targets, batch.mask)
                torch.autograd.backward(value)
                team.average_gradients(parameters)
                norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
                rate = config.rate(state.step, progress)
                optimizer.step(rate)
                now = time.monotonic()
                state.step += 1
                state.tokens += rows * length * team.size
                if config.minutes < math.inf:
                    state.seconds = now - started
                entry = {
                    "step": state.step,
                    "tokens": state.tokens,
                    "loss": round(value.item(), 5),
                    "norm": round(float(norm), 4),
                    "rate": rate,
                    "length": length,
                    "tokens_per_second": round(rows * length * team.size / (now - begin)),
                }
                if reporter is None:
                    continue
                reporter.step(entry, progress)
                if now - saved > 60 * config.checkpoint_minutes:
                    save_checkpoint(checkpoint, model, optimizer, state)
                    saved = time.monotonic()
    finally:
        if reporter is not None:
            reporter.close()
    if team.leads:
        save_checkpoint(checkpoint, model, optimizer, state)
    team.wait()
    return state


def cut_log(log: Path, steps: int) -> None:
    """Drop the lines of steps that come after the checkpoint that is resumed."""
    if not log.exists():
        return
    lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= steps]
    fresh = log.with_suffix(".new")
    fresh.write_text("".join(line + "\n" for line in lines))
    os.replace(fresh, log)
