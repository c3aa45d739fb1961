"""Training a draft: what it learns from, that it goes on after an interrupt, and that it serves."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as Core

from hasten import LLM, SamplingParams
from hasten.models.loading import locate
from hasten.speculation.statistics import DraftStatistics
from hasten.training import draft as module
from hasten.training.corpus import SourceFile
from hasten.training.data import Mixture
from hasten.training.draft import (
    DraftRecipe,
    Target,
    alpha_interval,
    report_text,
    speed_up,
    train_draft,
)
from hasten.training.draft_data import Answers, Division, Prompts, Windows, read_answers
from hasten.training.export import export_model
from hasten.training.model import Llama, LlamaShape
from hasten.training.trainer import TrainConfig, cross_entropy, sorted_cross_entropy, train
from tests.cli.common import assert_one_line, hasten

SOURCES = ["while index < total:\n    index, seen = index + step, True\n" * 40]
FILES = [
    SourceFile(f"f{i}.py", f"def add_{i}(first, second):\n    return first + {i} * second\n" * 4)
    for i in range(120)
]
TINY = DraftRecipe(
    layers=2,
    hidden=32,
    tokens=20 * 256,
    align_tokens=2500,
    lengths=(32, 64),
    batch_tokens=256,
    align_rate=3e-3,
    shortest=2,
    longest=12,
    answer_tokens=20,
    prompts=6,
    measured_tokens=16,
    epochs=4,
    precision="float32",
    compile=False,
)
SIXTEEN = SamplingParams(max_tokens=16, temperature=0)


@pytest.fixture(scope="session")
def target(tokenizer: Core, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers that were taught to write something else than the draft's texts."""
    folder = tmp_path_factory.mktemp("target")
    shape = LlamaShape(1024, 64, 2, 4, 2, 16, 128, max_position_embeddings=256)
    model = Llama(shape, torch.Generator().manual_seed(0))
    torch.set_num_threads(1)  # before the fixture of each test does
    config = TrainConfig(
        60 * 512, batch_tokens=512, phases=((1.0, 64),), warmup_steps=5, precision="float32"
    )
    source = Mixture(tokenizer, SOURCES, (), code_share=1.0, scored_share=1.0)
    train(model, source, config, folder / "run")
    export_model(model, tokenizer, folder / "tiny-target", torch.float32)
    return folder / "tiny-target"


@pytest.fixture(scope="session")
def trained(target: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A draft with two exits."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("trained") / "draft"
    report = train_draft(str(target), out, replace(TINY, exits=(1, 2)), files=FILES)
    assert report is not None
    return out, report


def test_the_draft_serves_its_target(target: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    """Its exits are stated, so that s2d needs none; texts are the target's, greedy and sampled."""
    out, _ = trained
    config = json.loads((out / "config.json").read_text())
    assert config["draft_exits"] == [1, 2] and config["hasten_draft_of"] == "tiny-target"
    assert config["vocab_size"] == 1024 and config["eos_token_id"] == [1, 6]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (target / name).read_bytes()
    prompts = ["def add_3(", "def", "return first + 7", "total"]
    params = [replace(SIXTEEN, temperature=t, seed=1) for t in (0, 0, 1, 0.5)]
    plain = [o.outputs[0].token_ids for o in LLM(target).generate(prompts, params)]
    for drafter in ("model", "s2d", "s2d(threshold=0.1"):
        inside = f"{drafter}{',' if '(' in drafter else '('}path={out},k=3)"
        llm = LLM(target, stack=f"draft={inside}")
        assert [o.outputs[0].token_ids for o in llm.generate(prompts, params)] == plain
        assert llm.stats.speculation.accepted > 0


def test_alignment_raises_acceptance(trained: tuple[Path, dict[str, Any]]) -> None:
    out, report = trained
    before, after = report["before"]["greedy"], report["after"]["greedy"]
    assert after["alpha"] > before["alpha"] + 0.05
    assert after["tau"] > before["tau"]
    assert report["after"]["sampled"]["alpha"] >= report["before"]["sampled"]["alpha"]
    assert after["alpha_95"][0] <= after["alpha"] <= after["alpha_95"][1]
    assert report["after"]["drafter"] == "s2d"
    assert json.loads((out / "report.json").read_text()) == report
    price = report["cost"]
    expected = price["draft_pass_ms"] / price["target_pass_ms"]
    assert price["latency_ratio"] == pytest.approx(expected)
    expected = after["tau"] / (4 * price["parameter_ratio"] + 1)
    assert after["mbsu"] == pytest.approx(expected)
    text = report_text(report)
    assert "MBSU is a bound" in text and f"{after['alpha']:.3f}" in text


def test_it_learns_from_the_targets_own_answers(
    target: Path, trained: tuple[Path, dict[str, Any]]
) -> None:
    """Not from the text: each answer is what the target says, at each of the temperatures."""
    out, report = trained
    answers = read_answers(out.with_name("draft.work") / "answers.jsonl")
    assert sum(len(one.tokens) for one in answers) >= TINY.align_tokens
    assert {one.temperature for one in answers} == set(TINY.temperatures)
    params = [
        SamplingParams(max_tokens=20, temperature=one.temperature, seed=number)
        for number, one in enumerate(answers)
    ]
    again = LLM(target).generate([one.prompt for one in answers], params)
    assert [o.outputs[0].token_ids for o in again] == [one.tokens for one in answers]
    assert report["answers"]["count"] == len(answers)


def test_no_stage_sees_the_prompts_of_the_measurement(
    target: Path, trained: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run measures again what it did; its prompts lie in held-out documents alone."""
    out, _ = trained
    measured: list[list[int]] = []
    true = module.acceptance

    def spy(target: Target, draft: Path, prompts: Any, recipe: DraftRecipe) -> dict[str, Any]:
        measured.extend(prompts)
        return true(target, draft, prompts, recipe)

    monkeypatch.setattr(module, "acceptance", spy)
    train_draft(str(target), out, replace(TINY, exits=(1, 2)), files=FILES)
    parts = Division.of(FILES)
    speech = Target(str(target)).speech
    answers = read_answers(out.with_name("draft.work") / "answers.jsonl")
    assert len(measured) == 2 * TINY.prompts
    numbers = {i for i in range(len(FILES)) for t in parts.held_out if f"add_{i}(" in t}
    assert len(numbers) == len(parts.held_out)
    for prompts, documents in (
        (measured, parts.held_out),
        ([one.prompt for one in answers], parts.asking),
    ):
        texts = ["".join(map(chr, body)) for body in speech.bodies(documents)]
        for prompt in prompts:
            body = "".join(map(chr, prompt[len(speech.lead) :]))
            assert any(body in text for text in texts)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupt() -> None:
    raise KeyboardInterrupt


def at_call(number: int, true: Callable[..., Any], happens: Callable[[], None]) -> Any:
    """The function, but that something happens when it is called for the nth time."""
    calls = count(1)

    def called(*args: Any, **more: Any) -> Any:
        if next(calls) == number:
            happens()
        return true(*args, **more)

    return called


def test_goes_on_where_it_stopped(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After interrupts in all three stages the draft is that of a run without any."""
    recipe = replace(TINY, align_tokens=1500, prompts=2)
    whole = tmp_path / "whole"
    assert train_draft(str(target), whole, recipe, files=FILES)

    def run() -> dict[str, Any] | None:
        return train_draft(str(target), tmp_path / "parts", recipe, files=FILES)

    with monkeypatch.context() as patch:
        patch.setattr(Windows, "batch", at_call(5, Windows.batch, press_ctrl_c))
        assert run() is None
    with monkeypatch.context() as patch:
        patch.setattr(LLM, "generate", at_call(2, LLM.generate, interrupt))
        with pytest.raises(KeyboardInterrupt):
            run()
    kept = read_answers(tmp_path / "parts.work" / "answers.jsonl")
    assert len(kept) == module.ASKED_AT_ONCE
    with monkeypatch.context() as patch:
        patch.setattr(Answers, "batch", at_call(5, Answers.batch, press_ctrl_c))
        assert run() is None
    assert not (tmp_path / "parts").exists()
    assert run() is not None
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("parts", "whole"))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_another_run_and_another_folder_are_refused(
    target: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, _ = trained
    with pytest.raises(ValueError, match="another hidden, exits"):
        train_draft(str(target), out, replace(TINY, hidden=64), files=FILES)
    with pytest.raises(ValueError, match="is not a draft model made here"):
        train_draft(str(target), target, TINY, work=tmp_path / "work", files=FILES)
    with pytest.raises(ValueError, match="was made for 256"):
        train_draft(str(target), tmp_path / "o", replace(TINY, answer_tokens=300), files=FILES)


def test_recipes_are_checked() -> None:
    for changes, reason in (
        ({"hidden": 48}, "steps of 32"),
        ({"layers": 0}, "at least one layer"),
        ({"exits": (2, 1)}, "must rise"),
        ({"exits": (1,)}, "must rise and end with the draft's 2 layers"),
        ({"tokens": 0}, "tokens=0 must be above zero"),
        ({"shortest": 9, "longest": 3}, "prompts of 9 to 3"),
    ):
        with pytest.raises(ValueError, match=reason):
            replace(TINY, **changes)  # type: ignore[arg-type]


def test_the_loss_of_a_sorted_draft_is_the_mean_of_its_sub_models() -> None:
    model = Llama(LlamaShape(50, 32, 3, 2, 1, 16, 48), torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 50, (2, 9), generator=generator)
    rows = torch.tensor([0, 3, 8, 11, 17])
    targets = torch.randint(0, 50, (5,), generator=generator)
    batch = tokens, rows, targets, torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    alone = []
    for layers in (1, 3):
        part = Llama(replace(model.shape, num_hidden_layers=layers))
        part.load_state_dict(model.state_dict(), strict=False)
        alone.append(cross_entropy(part)(*batch))
    found = sorted_cross_entropy(model, (1, 3))(*batch)
    torch.testing.assert_close(found, torch.stack(alone).mean())
    torch.testing.assert_close(sorted_cross_entropy(model, (3,))(*batch), alone[1])
    found.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_worth() -> None:
    assert speed_up(3.0, 0.125, 4) == 2.0
    sure = [DraftStatistics(accepted=3, examined=4)] * 9
    assert alpha_interval(sure) == [0.75, 0.75]
    low, high = alpha_interval([*sure, DraftStatistics(accepted=0, examined=4)])
    assert 0 < low < 0.675 < high <= 0.75


def test_a_target_in_a_gguf_file(target: Path, tmp_path: Path) -> None:
    """Its tokenizer is in the file; the draft gets one of its own that says the same."""
    pytest.importorskip("gguf")
    from tests.models.gguf_files import add_tokenizer, bfloat, convert

    file = tmp_path / "target.gguf"
    convert(target, file, bfloat, edit=lambda writer: add_tokenizer(writer, target, "gpt2"))
    found = Target(str(file))
    recipe = replace(TINY, hidden=32, layers=1)
    model = Llama(recipe.shape(found.config))
    module.export_draft(model, found, (), tmp_path / "draft")
    llm = LLM(file, stack=f"draft=model(path={tmp_path / 'draft'},k=2)")
    plain = LLM(file).generate("def add", SIXTEEN)[0].outputs[0].token_ids
    assert llm.generate("def add", SIXTEEN)[0].outputs[0].token_ids == plain
    assert llm.stats.speculation.drafted > 0


def test_the_command(target: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(file.text for file in FILES))
    command: list[object] = ["train", "draft", "-m", target, "-o", tmp_path / "d", "--text", text]
    command += ["--tokens", 2048, "--align-tokens", 200, "--answer-tokens", 8, "--prompts", 2]
    command += ["--hidden", 32, "--exits", "1/2", "--no-compile", "--threads", 1]
    done = hasten(*command)
    assert done.exit_code == 0, done.stderr
    assert "aligned, greedy" in done.stdout and (tmp_path / "d" / "report.json").is_file()
    assert_one_line(hasten(*command, "--seed", 2), "another seed")
    assert_one_line(hasten("train", "draft", "-o", tmp_path / "e", "--exits", "a/b"), "1/2/3")
    missing = ("train", "draft", "-o", tmp_path / "e", "--text", tmp_path / "missing")
    assert_one_line(hasten(*missing), "no such file", "missing")
    short = tmp_path / "short.txt"
    short.write_text("one line\n")
    assert_one_line(hasten("train", "draft", "-o", tmp_path / "e", "--text", short), "more text")


def test_the_bundled_target_can_have_one() -> None:
    found = Target("reference")
    assert found.folder == locate("reference")
    assert TINY.shape(found.config).vocab_size == found.config.vocab_size
    prompts = Prompts(found.speech, SOURCES, 4, 8, "s")
    assert prompts[0][0] == found.config.bos_id
