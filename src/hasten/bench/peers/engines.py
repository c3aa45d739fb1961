"""The engines that hasten is held against, and the checkpoints in their own formats.

Nothing is installed by hasten. ``$HASTEN_PEERS`` names a folder in which each engine that is to
take part has a virtual environment of its own (docs/peers.md says how to make them):

- ``venv-llama`` and ``build-llama``: llama-cpp-python, and llama.cpp built with its tools,
- ``venv-ov``: OpenVINO GenAI with optimum-intel,
- ``venv-ct2``: CTranslate2,
- ``venv-ort``: onnxruntime-genai,
- ``venv-hf``: transformers; without it, that of hasten itself is used.

``$HASTEN_PEERS/models`` keeps what was converted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hasten.bench.peers.process import RUNNERS, EngineProcess, PeerError

Command = Sequence[str | Path]

OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Peer:
    """An engine.

    Attributes:
        name: for the command line and for reports.
        venv: its virtual environment below ``$HASTEN_PEERS``.
        runner: the script that drives it, below ``runners/``.
        forms: weights as hasten names them -> what the engine calls them. ``int4`` has a head of
            8 bits (or what the engine chooses beyond 4), ``int4-head4`` one of 4 bits.
        commands: (setup, checkpoint, form, target) -> what converts the checkpoint; None where
            the engine reads checkpoints itself.
        speculation: the engine's own ways to draft -> whether one needs a draft model.
    """

    name: str
    venv: str
    runner: str
    forms: Mapping[str, str]
    commands: Callable[[Setup, Path, str, Path], list[Command]] | None = None
    speculation: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Speculation:
    """How an engine drafts for itself.

    Attributes:
        name: a key of ``Peer.speculation``.
        draft: path or id of the draft model, where it needs one.
    """

    name: str
    draft: str | None = None

    def __str__(self) -> str:
        return self.name if self.draft is None else f"{self.name}={self.draft}"

    def told(self, checkpoint: Path) -> dict[str, str]:
        """What a runner is told. Raises ``ValueError`` for a draft that cannot be the model's."""
        from hasten.models.loading import locate, read_facts
        from hasten.models.tokenizer import Tokenizer
        from hasten.speculation.draft_model import vocabulary_difference

        if self.draft is None:
            return {"speculation": self.name}
        folder = locate(self.draft)
        own, targets = (read_facts(one).count("vocab_size") for one in (folder, checkpoint))
        if differ := vocabulary_difference(folder, own, targets, Tokenizer.load(checkpoint)):
            raise PeerError(
                f"{self}: the draft model and {checkpoint.name} have different vocabularies "
                f"({differ}); give a draft of the model's family"
            )
        return {"speculation": self.name, "draft": str(folder)}


def named_peer(text: str) -> tuple[Peer, Speculation | None] | None:
    """The engine in a text such as ``llama.cpp``, ``transformers:prompt-lookup`` or
    ``transformers:assisted=MODEL``, with the speculation asked of it; None if there is no engine.

    Raises:
        PeerError: the engine has no such speculation, or its draft model is not named.
    """
    engine, colon, how = text.strip().partition(":")
    peer = next((peer for peer in PEERS if peer.name == engine), None)
    if peer is None or not colon:
        return None if peer is None else (peer, None)
    name, equals, draft = how.partition("=")
    ways = {way: f"{engine}:{way}{'=MODEL' * drafts}" for way, drafts in peer.speculation.items()}
    if name not in ways:
        known = ", ".join([engine, *ways.values()])
        raise PeerError(f"{engine}: no speculation '{name}' is measured; give one of {known}")
    if bool(draft) != peer.speculation[name] or bool(equals) != bool(draft):
        raise PeerError(f"'{text}' is written {ways[name]}")
    return peer, Speculation(name, draft or None)


@dataclass(frozen=True)
class Setup:
    """The engines found on this machine.

    Attributes:
        folder: what ``$HASTEN_PEERS`` names; None = transformers alone can take part.
    """

    folder: Path | None

    @classmethod
    def find(cls, folder: Path | None = None) -> Setup:
        """Raises ``PeerError`` if a folder was named that does not exist."""
        if folder is None and (named := os.environ.get("HASTEN_PEERS")):
            folder = Path(named)
        if folder is not None and not folder.is_dir():
            raise PeerError(f"HASTEN_PEERS is {folder}, which is no folder; see docs/peers.md")
        return cls(folder)

    def python(self, peer: Peer) -> Path:
        """The interpreter that has an engine. Raises ``PeerError`` if there is none."""
        own = self.folder / peer.venv / "bin" / "python" if self.folder else None
        if own is not None and own.exists():
            return own
        if peer.name == "transformers" and importlib.util.find_spec("transformers"):
            return Path(sys.executable)
        where = f"no {own}" if own else "HASTEN_PEERS names no folder"
        raise PeerError(f"{peer.name}: {where}; docs/peers.md says how to set engines up")

    def environment(self, threads: int) -> dict[str, str]:
        """Variables for runners: the same threads for everybody, and no network."""
        settings = OFFLINE | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        if self.folder is not None:
            settings["LLAMA_CPP_LIB_PATH"] = str(self.folder / "build-llama" / "bin")
        return settings

    def start(
        self,
        peer: Peer,
        checkpoint: Path,
        weights: str,
        *,
        threads: int,
        length: int,
        sequences: int,
        convert: bool = False,
        speculation: Speculation | None = None,
    ) -> tuple[EngineProcess, str]:
        """Load a checkpoint in an engine; returns the process and a name with version and form.

        Args:
            checkpoint: folder in Hugging Face layout.
            weights: a key of ``peer.forms``.
            length: longest sequence, prompt and output.
            sequences: sequences that run together.
            convert: whether to convert the checkpoint if that was not done before.
            speculation: how the engine drafts; None = not at all.

        Raises:
            PeerError: the engine is not there, has no such weights, the checkpoint is not
                converted, or it fails; the text says which.
        """
        how = "" if speculation is None else f":{speculation}"
        if speculation is not None and sequences > 1:
            raise PeerError(f"{peer.name}{how}: one sequence at a time, not {sequences}; --batch 1")
        python = self.python(peer)
        if weights not in peer.forms:
            raise PeerError(f"{peer.name}: no form of {weights} weights")
        form = peer.forms[weights]
        model = self.converted(peer, checkpoint, form, convert)
        extra = {} if speculation is None else speculation.told(checkpoint)
        process = EngineProcess(
            f"{peer.name}{how} {form}",
            [python, RUNNERS / peer.runner],
            self.environment(threads),
        )
        try:
            told = process.ask(
                do="load",
                model=str(model),
                weights=weights,
                threads=threads,
                length=length,
                sequences=sequences,
                **extra,
            )
        except BaseException:
            process.close()
            raise
        return process, f"{told['engine']}{how} {told['version']} {form}"

    def converted(self, peer: Peer, checkpoint: Path, form: str, convert: bool) -> Path:
        """The checkpoint in an engine's form; made now if ``convert`` and it is not there."""
        if peer.commands is None:
            return checkpoint
        assert self.folder is not None  # or there would be no interpreter
        if not checkpoint.is_dir():
            raise PeerError(f"{peer.name}: converts folders in Hugging Face layout only")
        ending = ".gguf" if peer.name == "llama.cpp" else ""
        target = self.folder / "models" / _key(checkpoint) / f"{peer.name}-{form}{ending}"
        if target.exists():
            return target
        if not convert:
            raise PeerError(f"{peer.name}: {checkpoint.name} is not converted to {form}; --convert")
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"part-{target.name}")  # a half-written one must not be found
        _remove(part)
        try:
            for command in peer.commands(self, checkpoint, form, part):
                _run(peer, command)
            part.rename(target)
        finally:
            _remove(part)
        return target


def _llama_cpp(setup: Setup, checkpoint: Path, form: str, target: Path) -> list[Command]:
    assert setup.folder is not None
    build = setup.folder / "build-llama"
    cache = build / "CMakeCache.txt"
    said = "CMAKE_HOME_DIRECTORY:INTERNAL="
    lines = cache.read_text().splitlines() if cache.exists() else []
    sources = [line.removeprefix(said) for line in lines if line.startswith(said)]
    if not sources:
        raise PeerError(f"llama.cpp: {cache} names no source folder; build it there")
    python = setup.python(LLAMA_CPP)
    config = json.loads((checkpoint / "config.json").read_text())
    stored = config.get("dtype", config.get("torch_dtype"))
    plain = "f32" if stored == "float32" else "bf16"

    def convert(outtype: str, out: Path) -> Command:
        script = RUNNERS / "convert_gguf.py"
        return [python, script, sources[0], checkpoint, "--outfile", out, "--outtype", outtype]

    if form in ("F32", "BF16"):
        return [convert(form.lower(), target)]
    whole = target.with_name(f"whole-{target.name}")
    kind, _, pure = form.partition("-")
    quantize: Command = [
        build / "bin" / "llama-quantize",
        *(["--pure"] if pure else []),
        whole,
        target,
        kind,
    ]
    return [convert(plain, whole), quantize]


def _openvino(setup: Setup, checkpoint: Path, form: str, target: Path) -> list[Command]:
    grouped = ["--weight-format", "int4", "--sym", "--ratio", "1.0", "--group-size", "64"]
    options = {"int4": grouped, "int4-all-layers": [*grouped, "--all-layers"]}
    command = setup.python(OPENVINO).with_name("optimum-cli")
    task: Command = ["export", "openvino", "--task", "text-generation-with-past", "-m", checkpoint]
    chosen = options.get(form, ["--weight-format", form])
    return [[command, *task, *chosen, target]]


def _ctranslate2(setup: Setup, checkpoint: Path, form: str, target: Path) -> list[Command]:
    command = setup.python(CTRANSLATE2).with_name("ct2-transformers-converter")
    options = ["--quantization", form, "--low_cpu_mem_usage"]
    return [[command, "--model", checkpoint, "--output_dir", target, *options]]


def _onnxruntime(setup: Setup, checkpoint: Path, form: str, target: Path) -> list[Command]:
    command: list[str | Path] = [
        setup.python(ONNXRUNTIME),
        "-m",
        "onnxruntime_genai.models.builder",
    ]
    command += ["-i", checkpoint, "-o", target, "-p", form, "-e", "cpu"]
    command += ["-c", target.with_name(f"cache-{target.name}")]
    if form != "fp32":  # products of 8-bit activations, as the engine recommends for CPUs
        command += ["--extra_options", "accuracy_level=4"]
    return [command]


LLAMA_CPP = Peer(
    "llama.cpp",
    "venv-llama",
    "llama_cpp_runner.py",
    {
        "float32": "F32",
        "bfloat16": "BF16",
        "int8": "Q8_0",
        "int4": "Q4_0",
        "int4-head4": "Q4_0-pure",
    },
    _llama_cpp,
)
OPENVINO = Peer(
    "openvino",
    "venv-ov",
    "openvino_runner.py",
    {
        "float32": "fp32",
        "bfloat16": "fp16",
        "int8": "int8",
        "int4": "int4",
        "int4-head4": "int4-all-layers",
    },
    _openvino,
)
CTRANSLATE2 = Peer(
    "ctranslate2",
    "venv-ct2",
    "ctranslate2_runner.py",
    {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8"},
    _ctranslate2,
)
ONNXRUNTIME = Peer(
    "onnxruntime-genai",
    "venv-ort",
    "onnxruntime_runner.py",
    {"float32": "fp32", "int8": "int8", "int4-head4": "int4"},
    _onnxruntime,
)
TRANSFORMERS = Peer(
    "transformers",
    "venv-hf",
    "transformers_runner.py",
    {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8"},
    speculation={"prompt-lookup": False, "assisted": True},
)
PEERS = (LLAMA_CPP, OPENVINO, CTRANSLATE2, ONNXRUNTIME, TRANSFORMERS)


def _key(checkpoint: Path) -> str:
    """A folder name for a checkpoint: its own, and what changes when its files do."""
    facts = hashlib.sha256((checkpoint / "config.json").read_bytes())
    for path in sorted(checkpoint.glob("*.safetensors")):
        status = path.stat()
        facts.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return f"{checkpoint.resolve().name}-{facts.hexdigest()[:10]}"


def _run(peer: Peer, command: Command) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | OFFLINE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        said = lines[-1] if lines else f"status {done.returncode}"
        raise PeerError(f"{peer.name}: {Path(command[0]).name} failed: {said}")


def _remove(path: Path) -> None:
    """The target of a conversion and what its commands left beside it."""
    for old in (path, *(path.with_name(f"{what}-{path.name}") for what in ("whole", "cache"))):
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
