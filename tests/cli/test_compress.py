"""``hasten compress`` and ``--weights``: the same tokens, and what cannot be read is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.common import assert_one_line, hasten

PROMPT = "def parse(text):\n    "
OPTIONS = ("--max-tokens", 32, "--temperature", 1, "--seed", 3, "--no-figures")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "int4"
    result = hasten("compress", "rtn", "reference", "-o", out, "--weights", "int4(group=64)")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"wrote {out} (")
    return out


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def generated(*options: object) -> str:
    result = hasten("generate", PROMPT, *OPTIONS, *options)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_a_saved_model_gives_the_tokens_of_weights_rounded_at_load(saved: Path) -> None:
    """Bit for bit the same weights, so the same text; the unrounded model says something else."""
    expected = generated("--weights", "int4(group=64)")
    assert generated("-m", saved) == expected
    assert generated("-m", saved, "--weights", "int4(group=64)") == expected
    assert generated("-m", saved, "--stack", "draft=prompt-lookup") == expected
    assert generated() != expected


def test_int8(tmp_path: Path) -> None:
    out = tmp_path / "int8"
    assert hasten("compress", "rtn", "reference", "-o", out, "--weights", "int8").exit_code == 0
    assert generated("-m", out) == generated("--weights", "int8")


def test_other_weights_than_the_saved_are_refused(saved: Path) -> None:
    result = hasten("generate", PROMPT, "-m", saved, "--weights", "int8")
    assert_one_line(result, "weights=int4(group=64)", "weights=int8 was asked for")


def test_another_version_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (copy / "config.json").write_text(json.dumps(config))
    assert_one_line(hasten("generate", PROMPT, "-m", copy), "version 2", "reads version 1")


@pytest.mark.parametrize("part", ["codes", "scale"])
def test_another_shape_is_refused(copy: Path, part: str) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.3.mlp.down_proj.weight.{part}"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    assert_one_line(hasten("generate", PROMPT, "-m", copy), name, "shape")


def test_what_cannot_be_written_is_told_in_one_line(saved: Path, tmp_path: Path) -> None:
    compress = ("compress", "rtn", "reference", "-o")
    assert_one_line(hasten(*compress, saved), str(saved), "exists")
    out = tmp_path / "out"
    for weights, word in (("checkpoint", "expected int8 or int4"), ("int4(group=48)", "group is")):
        assert_one_line(hasten(*compress, out, "--weights", weights), word)
    assert not list(tmp_path.iterdir())
