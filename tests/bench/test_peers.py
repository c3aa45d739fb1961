"""Other engines as contestants: their processes, what is converted for them, their runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hasten import LLM, SamplingParams
from hasten.bench import contestants
from hasten.bench.contestants import HastenContestant, PeerContestant, weights_name
from hasten.bench.peers import engines
from hasten.bench.peers.engines import (
    LLAMA_CPP,
    ONNXRUNTIME,
    OPENVINO,
    PEERS,
    TRANSFORMERS,
    Setup,
    Speculation,
    named_peer,
)
from hasten.bench.peers.process import RUNNERS, EngineProcess, PeerError
from hasten.bench.workloads import Item
from hasten.models.loading import REFERENCE
from hasten.stack import Stack
from tests.cli.common import hasten, write_lines

SCRIPTED = f"""
import os, sys, time
sys.path.insert(0, {str(RUNNERS)!r})
import answering

class Scripted:
    engine, version, facts = "scripted", "1.0", {{"extra": 7}}

    def generate(self, prompts, new):
        print("noise on standard output")
        os.system("echo more of it")
        if prompts == [[0]]:
            raise ValueError("no zeros")
        if prompts == [[1]]:
            print("first\\nlast words", file=sys.stderr)
            os._exit(3)
        if prompts == [[2]]:
            time.sleep(60)
        return [0.5 + i for i in range(new)], [[sum(p)] * new for p in prompts]

answering.answer(lambda message: Scripted())
"""


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[EngineProcess]:
    script = tmp_path / "scripted.py"
    script.write_text(SCRIPTED)
    with EngineProcess("scripted", [sys.executable, script], timeout=20) as process:
        yield process


def state(process: EngineProcess) -> str:
    return Path(f"/proc/{process._process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_answers_are_not_disturbed_by_what_libraries_print(scripted: EngineProcess) -> None:
    loaded = scripted.ask(do="load")
    assert 1 << 20 < loaded.pop("peak_bytes") < 100 << 20  # its own, not that of this process
    assert loaded == {"engine": "scripted", "version": "1.0", "extra": 7}
    for _ in range(3):
        told = scripted.ask(do="generate", prompts=[[3, 4], [5]], new=2)
        assert told["times"] == [0.5, 1.5] and told["tokens"] == [[7, 7], [5, 5]]


def test_errors_name_the_engine_and_it_goes_on(scripted: EngineProcess) -> None:
    scripted.ask(do="load")
    with pytest.raises(PeerError, match="scripted: ValueError: no zeros"):
        scripted.ask(do="generate", prompts=[[0]], new=1)
    with pytest.raises(PeerError, match="scripted: cannot compute the logits of several rows"):
        scripted.ask(do="verify", context=1, rows=[1], repeats=1)
    assert scripted.ask(do="generate", prompts=[[5]], new=1)["tokens"] == [[5]]


def test_a_process_that_ends_says_its_last_words(scripted: EngineProcess) -> None:
    scripted.ask(do="load")
    with pytest.raises(PeerError, match="scripted: ended with status 3: last words"):
        scripted.ask(do="generate", prompts=[[1]], new=1)


def test_a_process_that_does_not_answer_is_ended(scripted: EngineProcess) -> None:
    scripted.ask(do="load")
    scripted.timeout = 0.2
    with pytest.raises(PeerError, match="no answer within 0 s"):
        scripted.ask(do="generate", prompts=[[2]], new=1)
    assert scripted._process.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_engine_is_paused_when_it_is_not_its_turn(scripted: EngineProcess) -> None:
    scripted.ask(do="load")
    os.waitpid(scripted._process.pid, os.WUNTRACED)  # returns once it is stopped
    assert state(scripted) == "T"
    assert scripted.ask(do="generate", prompts=[[5]], new=1)["tokens"] == [[5]]
    os.waitpid(scripted._process.pid, os.WUNTRACED)
    assert state(scripted) == "T"
    scripted.close()  # a stopped process ends, too
    assert scripted._process.returncode == -signal.SIGKILL


# ---- what is there, and what is converted ------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    """An environment for OpenVINO whose exporter copies config.json, and fails for fp16."""
    where = tmp_path / "peers" / "venv-ov" / "bin"
    where.mkdir(parents=True)
    (where / "python").symlink_to(sys.executable)
    exporter = where / "optimum-cli"
    exporter.write_text(
        "#!/bin/sh\nfor out; do :; done\nmkdir -p $out\necho $* > $out/said\n"
        'case "$*" in *fp16*) echo "no halves here" >&2; exit 1;; esac\n'
    )
    exporter.chmod(0o755)
    return Setup.find(tmp_path / "peers")


def test_every_engine_has_a_runner_and_forms() -> None:
    assert len({peer.name for peer in PEERS}) == len({peer.venv for peer in PEERS}) == len(PEERS)
    for peer in PEERS:
        assert (RUNNERS / peer.runner).is_file()
        assert peer.forms.keys() <= {"float32", "bfloat16", "int8", "int4", "int4-head4"}


def test_engines_are_found_or_their_absence_is_explained(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert setup.folder is not None
    assert setup.python(OPENVINO) == setup.folder / "venv-ov" / "bin" / "python"
    assert setup.python(TRANSFORMERS) == Path(sys.executable)  # hasten's own
    with pytest.raises(PeerError, match=r"onnxruntime-genai: no .*venv-ort.*docs/peers\.md"):
        setup.python(ONNXRUNTIME)
    monkeypatch.delenv("HASTEN_PEERS", raising=False)
    with pytest.raises(PeerError, match=r"llama\.cpp: HASTEN_PEERS names no folder"):
        Setup.find().python(LLAMA_CPP)
    monkeypatch.setenv("HASTEN_PEERS", str(tmp_path / "none"))
    with pytest.raises(PeerError, match="which is no folder"):
        Setup.find()


def test_a_checkpoint_is_converted_once_and_only_when_asked(setup: Setup, checkpoint: Path) -> None:
    with pytest.raises(PeerError, match="openvino: tiny is not converted to int8; --convert"):
        setup.converted(OPENVINO, checkpoint, "int8", convert=False)
    made = setup.converted(OPENVINO, checkpoint, "int8", convert=True)
    said = (made / "said").read_text()
    assert f"-m {checkpoint} --weight-format int8" in said
    assert setup.converted(OPENVINO, checkpoint, "int8", convert=False) == made
    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(PeerError, match="not converted"):
        setup.converted(OPENVINO, checkpoint, "int8", convert=False)


def test_a_failed_conversion_leaves_nothing(setup: Setup, checkpoint: Path) -> None:
    with pytest.raises(PeerError, match="openvino: optimum-cli failed: no halves here"):
        setup.converted(OPENVINO, checkpoint, "fp16", convert=True)
    assert setup.folder is not None
    assert [p for p in (setup.folder / "models").rglob("*") if p.name != p.parent.name][1:] == []


def test_files_that_engines_cannot_convert(setup: Setup, checkpoint: Path) -> None:
    with pytest.raises(PeerError, match="folders in Hugging Face layout only"):
        setup.converted(OPENVINO, checkpoint / "model.safetensors", "int8", convert=True)
    assert setup.converted(TRANSFORMERS, checkpoint, "int8", convert=False) == checkpoint
    with pytest.raises(PeerError, match="openvino: no form of int3 weights"):
        setup.start(OPENVINO, checkpoint, "int3", threads=1, length=8, sequences=1)


def test_llama_cpp_quantizes_what_its_own_script_converted(setup: Setup, checkpoint: Path) -> None:
    assert setup.folder is not None and LLAMA_CPP.commands is not None
    (setup.folder / "venv-llama" / "bin").mkdir(parents=True)
    (setup.folder / "venv-llama" / "bin" / "python").symlink_to(sys.executable)
    target = setup.folder / "out.gguf"
    with pytest.raises(PeerError, match="names no source folder"):
        LLAMA_CPP.commands(setup, checkpoint, "Q8_0", target)
    build = setup.folder / "build-llama"
    build.mkdir()
    (build / "CMakeCache.txt").write_text("A:B=C\nCMAKE_HOME_DIRECTORY:INTERNAL=/src/llama\n")
    convert, quantize = LLAMA_CPP.commands(setup, checkpoint, "Q4_0-pure", target)
    whole = setup.folder / "whole-out.gguf"
    assert convert[2:] == ["/src/llama", checkpoint, "--outfile", whole, "--outtype", "bf16"]
    assert quantize == [build / "bin" / "llama-quantize", "--pure", whole, target, "Q4_0"]
    (single,) = LLAMA_CPP.commands(setup, checkpoint, "F32", target)
    assert single[-3:] == [target, "--outtype", "f32"]


# ---- runs --------------------------------------------------------------------------------------


def test_groups_run_one_after_another_and_later_ones_wait(scripted: EngineProcess) -> None:
    scripted.ask(do="load")
    contestant = PeerContestant("s", scripted, tokenizer=None, batch=2)
    items = [Item(str(i), (3, i + 3)) for i in range(3)]
    run = contestant.run(items, SamplingParams(max_tokens=3))
    assert run.tokens == {"0": [6] * 3, "1": [7] * 3, "2": [8] * 3}
    assert run.seconds == 5.0  # two groups of 2.5 s
    assert run.ttft == [0.5, 0.5, 3.0] and run.tpot == [1.0] * 3
    assert run.spent == {"0": 2.0, "1": 2.0, "2": 2.0} and run.decoded == dict.fromkeys("012", 2)
    assert run.speculation.tau == 1.0 and run.speculation.accepted == 0
    one_by_one = PeerContestant("s", scripted, tokenizer=None, batch=1)
    run = one_by_one.run(items, SamplingParams(max_tokens=3))
    assert run.ttft == [0.5, 3.0, 3.0]  # arrives as the one before the one ahead has ended
    mixed = [Item("a", (5,), params={"max_tokens": 1}), Item("b", (5,))]
    with pytest.raises(ValueError, match="same max_tokens"):
        contestant.run(mixed, SamplingParams(max_tokens=3))


@pytest.mark.parametrize(
    ("stack", "name"),
    [
        ("", "bfloat16"),
        ("weights=checkpoint(dtype=float32)", "float32"),
        ("weights=int8", "int8"),
        ("weights=int4", "int4"),
        ("weights=int4(head=int4)", "int4-head4"),
    ],
)
def test_weights_of_a_stack_in_the_words_of_the_table(stack: str, name: str) -> None:
    assert weights_name(Stack.parse(stack), torch.bfloat16) == name
    assert any(name in peer.forms for peer in PEERS)


def test_transformers_gives_the_same_tokens_in_the_same_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HASTEN_PEERS", raising=False)
    rows = [{"prompt": f"def f{i}(x):\n" * (i + 1), "id": i} for i in range(3)]
    questions = write_lines(tmp_path / "questions.jsonl", rows)
    sizes = ("--max-tokens", 6, "--batch", 2, "--rounds", 1)
    stack = "weights=checkpoint(dtype=float32)"
    result = hasten("compare", stack, "-w", questions, *sizes, "--peers", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    ours, theirs = data["rows"]
    assert ours["name"] == stack and theirs["name"].startswith("transformers ")
    assert theirs["name"].endswith("float32")
    assert theirs["output"] == "equal (3 of 3)"
    assert "GB/s" in data["shape"]
    for peer in PEERS[:-1]:
        assert f"without {peer.name}: HASTEN_PEERS names no folder" in data["shape"]


SPECULATIONS = [Speculation("prompt-lookup"), Speculation("assisted", "reference-draft")]


@pytest.mark.parametrize("speculation", SPECULATIONS, ids=str)
def test_speculation_of_transformers_keeps_the_tokens(
    speculation: Speculation, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers.generation")
    monkeypatch.delenv("HASTEN_PEERS", raising=False)
    target = REFERENCE / "target"
    sizes: dict[str, Any] = {"threads": 1, "length": 300, "sequences": 1}
    weights = "weights=checkpoint(dtype=float32)"
    llm = LLM("reference", stack=weights)
    # the first repeats itself, so that drafts are accepted; the others end wherever they do
    prompts = [llm.tokenizer.encode("def area(w, h):\n    return w * h\n" * 4), [400, 500, 600]]
    process, name = Setup.find().start(
        TRANSFORMERS, target, "float32", speculation=speculation, **sizes
    )
    assert name.startswith(f"transformers:{speculation} ") and name.endswith(" float32")
    with process:
        told = [process.ask(do="generate", prompts=[p], new=n) for p in prompts for n in (1, 25)]
    for prompt, new, answer in zip(
        [prompts[0]] * 2 + [prompts[1]] * 2, [1, 25] * 2, told, strict=True
    ):
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        (expected,) = llm.generate([prompt], params)
        assert answer["tokens"] == [list(expected.outputs[0].token_ids)]
        times = answer["times"]
        assert len(times) == new and times == sorted(times) and times[0] > 0
    assert len(set(told[1]["times"])) < 25  # some steps gave several tokens


def test_engines_and_their_speculation_by_name() -> None:
    assert named_peer("plain") is named_peer("draft=model(path=a:b)") is None
    assert named_peer("llama.cpp") == (LLAMA_CPP, None)
    assert named_peer("transformers:prompt-lookup") == (TRANSFORMERS, SPECULATIONS[0])
    assert named_peer("transformers:assisted=reference-draft") == (TRANSFORMERS, SPECULATIONS[1])
    ways = "give one of transformers, transformers:prompt-lookup, transformers:assisted=MODEL"
    for text, words in {
        "transformers:eagle": f"no speculation 'eagle' is measured; {ways}",
        "transformers:": ways,
        "llama.cpp:prompt-lookup": "give one of llama.cpp$",
        "transformers:assisted": "is written transformers:assisted=MODEL",
        "transformers:assisted=": "is written transformers:assisted=MODEL",
        "transformers:prompt-lookup=5": "is written transformers:prompt-lookup$",
    }.items():
        with pytest.raises(PeerError, match=words):
            named_peer(text)


def test_speculation_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HASTEN_PEERS", raising=False)
    sizes: dict[str, Any] = {"threads": 1, "length": 64}
    target = REFERENCE / "target"

    def start(draft: str | Path, sequences: int = 1) -> None:
        assisted = Speculation("assisted", str(draft))
        Setup.find().start(
            TRANSFORMERS, target, "float32", speculation=assisted, sequences=sequences, **sizes
        )

    with pytest.raises(PeerError, match=r"assisted=reference-draft: one .* not 4; --batch 1"):
        start("reference-draft", sequences=4)
    with pytest.raises(ValueError, match=r"no such folder.*/no/where"):
        start("/no/where")
    other = shutil.copytree(REFERENCE / "draft", tmp_path / "other")
    facts = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(facts | {"vocab_size": 5000}))
    with pytest.raises(PeerError, match=r"different vocabularies \(5000 ids against 4096\); give"):
        start(other)
    (other / "config.json").write_text(json.dumps(facts))
    words = json.loads((other / "tokenizer.json").read_text())
    ids = words["model"]["vocab"]
    ids["def"], ids["if"] = ids["if"], ids["def"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(PeerError, match=r"2 tokens have other ids, such as 'def'"):
        start(other)


def test_conversations_go_on_with_the_engines_own_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HASTEN_PEERS", raising=False)
    talk = Item("talk", turns=("Name a colour.", "And another one?"))
    items = [talk, Item("single", "x = 1\n" * 5), Item("other", turns=("What is 2 + 2?",))]
    front = LLM("reference", stack="weights=checkpoint(dtype=float32)", max_sequences=1).frontend
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    expected = HastenContestant("h", front).run(items, params)
    with contestants.peer_contestants(
        front, items, 6, 1, Setup.find(), named=[(TRANSFORMERS, None)], others=False
    ) as ((theirs,), absent):
        run = theirs.run(items, params)
    assert absent == [] and run.tokens == expected.tokens
    assert [len(tokens) for tokens in run.tokens.values()] == [12, 6, 6]
    assert run.decoded == expected.decoded == {"talk": 10, "single": 5, "other": 5}
    assert len(run.ttft) == len(run.tpot) == 4 and run.spent.keys() == run.tokens.keys()


def test_a_named_engine_must_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HASTEN_PEERS", raising=False)
    front = LLM("reference", max_sequences=1, kv_bytes=1 << 22).frontend
    items = [Item("a", (5,))]
    with (
        pytest.raises(PeerError, match="onnxruntime-genai: HASTEN_PEERS names no folder"),
        contestants.peer_contestants(
            front, items, 3, 1, Setup(None), named=[(ONNXRUNTIME, None)], others=False
        ),
    ):
        pass


def test_processes_are_ended_when_a_comparison_fails(
    scripted: EngineProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def start(*_: Any, **__: Any) -> tuple[EngineProcess, str]:
        return scripted, "scripted"

    monkeypatch.setattr(contestants, "PEERS", (OPENVINO,))
    monkeypatch.setattr(engines.Setup, "start", start)
    front = LLM("reference", max_sequences=1, kv_bytes=1 << 22).frontend
    items = [Item("a", (5,))]
    with (
        pytest.raises(RuntimeError, match="stop"),
        contestants.peer_contestants(front, items, 3, 1, Setup(None)) as (found, absent),
    ):
        assert [c.name for c in found] == ["scripted"] and absent == []
        raise RuntimeError("stop")
    assert scripted._process.returncode == -signal.SIGKILL


def test_hasten_in_a_process_of_its_own() -> None:
    prompts = [list(range(300, 340)), [400, 500, 600]]
    command = [sys.executable, RUNNERS / "hasten_runner.py"]
    with EngineProcess("hasten", command) as process:
        told = process.ask(
            do="load",
            model=str(REFERENCE / "target"),
            weights="weights=checkpoint(dtype=float32)",
            threads=2,
            length=300,
            sequences=2,
        )
        assert told["engine"] == "hasten" and told["weight_bytes"] > 1e6 and told["kv_bytes"] > 0
        run = process.ask(do="generate", prompts=prompts, new=5)
        steps = process.ask(do="verify", context=20, rows=[1, 4, 16], repeats=2)["seconds"]
    llm = LLM("reference", stack="weights=checkpoint(dtype=float32)")
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    expected = [list(r.outputs[0].token_ids) for r in llm.generate(prompts, params)]
    assert run["tokens"] == expected
    assert len(run["times"]) == 5 and 0 < run["times"][0] < run["times"][-1]
    assert {rows: len(times) for rows, times in steps.items()} == {"1": 2, "4": 2, "16": 2}


def test_padding_is_on_the_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RUNNERS))
    import answering

    ids, mask = answering.padded([[5, 6, 7], [8]], pad=2)
    assert ids == [[5, 6, 7], [2, 2, 8]] and mask == [[1, 1, 1], [0, 0, 1]]


def test_the_clock_of_openvino_reads_both_kinds_of_stamps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RUNNERS))
    for name in ("openvino", "openvino_genai"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    import openvino_runner

    assert openvino_runner._seconds(1500.0) == 1.5
