"""Weights as int4, at load and saved by `compress`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hasten.kernels.linear import Int4Weight, Int8Weight, unpack
from hasten.models.facts import CheckpointError
from hasten.models.loading import load_model
from hasten.stack import Stack
from hasten.weights.base import Matrix
from hasten.weights.compress import compress
from tests.conftest import RandomWeights

REFERENCE = "reference"


def chosen(text: str):
    return Stack.parse(f"weights={text}")["weights"]


@pytest.mark.parametrize("text", ["int4", "int4(group=64)", "int4(asymmetric=true,head=int4)"])
def test_a_saved_checkpoint_is_the_same_weights(text: str, tmp_path: Path) -> None:
    """Saved and read back: bit for bit what quantizing at load gives."""
    out = tmp_path / "saved"
    compress(REFERENCE, out, chosen(text))
    saved, fresh = load_model(out), load_model(REFERENCE, format=chosen(text))
    assert torch.equal(saved.embedding.data, fresh.embedding.data)
    for a, b in zip(saved.layers, fresh.layers, strict=True):
        for one, other in (
            (a.attention.qkv, b.attention.qkv),
            (a.attention.out, b.attention.out),
            (a.mlp.gate_up, b.mlp.gate_up),
            (a.mlp.down, b.mlp.down),
        ):
            assert isinstance(one.weight, Int4Weight)
            assert torch.equal(one.weight.data, other.weight.data)
        assert torch.equal(a.norm, b.norm)
    assert not list(tmp_path.glob(".*")) and (out / "tokenizer.json").is_file()


def test_head_and_embedding() -> None:
    source = RandomWeights(0, 0.25)
    head = Matrix({"lm_head": 48}, 64, "head")
    assert isinstance(chosen("int4").matrix(source, head), Int8Weight)
    assert isinstance(chosen("int4(head=int4)").matrix(source, head), Int4Weight)


def test_inputs_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tensor a\.weight: 48 inputs are no whole number"):
        chosen("int4").matrix(RandomWeights(0, 0.25), Matrix({"a": 32}, 48))
    for bad in ("int4(group=48)", "int4(head=int2)"):
        with pytest.raises(ValueError, match="expected"):
            chosen(bad)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "int4"
    compress(REFERENCE, out, chosen("int4"))
    return out


def test_what_was_asked_for_must_agree(saved: Path) -> None:
    load_model(saved, format=chosen("int4"))
    expanded = load_model(saved, torch.float32)
    assert torch.equal(unpack(expanded.embedding), unpack(load_model(saved).embedding))
    with pytest.raises(CheckpointError, match="has weights=int4, and weights=int8 was asked for"):
        load_model(saved, format=chosen("int8"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2 of the layout; this hasten reads version 1"),
        ({"format": "int5"}, "has no method 'int5'"),
        ({"parameters": {"group": 48}}, "group is 48"),
        ({"parameters": {"group": 64}}, "has shape"),
        ({"parameters": {"asymmetric": True}}, r"zero' is missing"),
        ({"parameters": {"head": "int4"}}, "has shape|has dtype I8"),
        ({"parameters": None}, "'parameters' must be an object"),
    ],
)
def test_mismatches_are_refused(saved: Path, tmp_path: Path, change: dict, words: str) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        load_model(tmp_path)


def test_nothing_half_written_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.weights.compress.write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress(REFERENCE, tmp_path / "out", chosen("int4"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="give the name of a new folder"):
        compress(REFERENCE, tmp_path / "there", chosen("int4"))


def test_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.weights.compress.SHARD_BYTES", 1 << 20)
    compress(REFERENCE, tmp_path / "out", chosen("int4"))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    load_model(tmp_path / "out")
