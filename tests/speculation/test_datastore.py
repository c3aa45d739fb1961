"""Datastores: built whole or not at all, and refused when they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hasten.models.loading import locate
from hasten.models.tokenizer import Tokenizer
from hasten.speculation import datastore
from hasten.speculation.datastore import Datastore, DatastoreError, build, checksum
from tests.cli.common import assert_one_line, hasten

TEXTS = ("def f(x):\n    return x\n" * 40, "Grüße, 日本語 \N{WAVING HAND SIGN}\n", "")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(locate("reference"))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.txt" for i in range(len(TEXTS))]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text)
    return paths


@pytest.fixture
def store(files: list[Path], tmp_path: Path, tokenizer: Tokenizer) -> Path:
    build(files, tmp_path / "x.store", tokenizer)
    return tmp_path / "x.store"


def test_what_is_in_it(
    files: list[Path], tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datastore, "PIECE", 100)
    said: list[tuple[str, float]] = []
    count = build(files, tmp_path / "x", tokenizer, lambda what, share: said.append((what, share)))
    store = Datastore.open(tmp_path / "x", tokenizer.vocab_size, tokenizer)
    ids = store.tokens.tolist()
    assert len(ids) == len(store.sorted) == count and ids.count(-1) == 3
    documents: list[list[int]] = [[]]
    for token in ids:
        if token < 0:
            documents.append([])
        else:
            documents[-1].append(token)
    assert [tokenizer.decode(d) for d in documents[:3]] == list(TEXTS)
    for phase in ("tokenizing", "sorting"):
        shares = [share for what, share in said if what == phase]
        assert len(shares) >= 3 and shares == sorted(shares) and shares[-1] == pytest.approx(1)


@pytest.mark.parametrize("phase", ["tokenizing", "sorting", "writing"])
def test_an_interrupt_leaves_what_was_there(
    files: list[Path],
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
) -> None:
    def interrupt(what: str, share: float) -> None:
        if what == phase:
            raise KeyboardInterrupt

    def interrupted(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    if phase == "writing":
        monkeypatch.setattr(datastore, "save_file", interrupted)
    out = tmp_path / "x.store"
    out.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        build(files, out, tokenizer, interrupt)
    assert out.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.txt", "1.txt", "2.txt", "x.store"]


def test_any_damage_is_refused(store: Path, tokenizer: Tokenizer) -> None:
    whole = store.read_bytes()
    Datastore.open(store, tokenizer.vocab_size, tokenizer)
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        store.write_bytes(whole[:size])
        with pytest.raises(DatastoreError, match="build it again"):
            Datastore.open(store, tokenizer.vocab_size, tokenizer)
    for place in range(len(whole) - 400, len(whole), 13):
        store.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DatastoreError, match="its checksum differs"):
            Datastore.open(store, tokenizer.vocab_size, tokenizer)


@pytest.mark.parametrize(
    ("tokens", "places"), [([5, -2], [0, 1]), ([5, -1], [0, 2]), ([5, -1], [-1, 0]), ([5], [0, 0])]
)
def test_ids_that_lead_outside_are_refused(
    tmp_path: Path, tokens: list[int], places: list[int]
) -> None:
    """A file may be written by anybody; its checksum proves nothing then."""
    both = [torch.tensor(x, dtype=torch.int32) for x in (tokens, places)]
    about = {"format": "hasten-datastore", "version": "1", "checksum": checksum(*both)}
    save_file({"tokens": both[0], "sorted": both[1]}, tmp_path / "x", metadata=about)
    with pytest.raises(DatastoreError, match="holds what it must not"):
        Datastore.open(tmp_path / "x", 9, None)


def test_another_vocabulary_is_refused(store: Path, tokenizer: Tokenizer) -> None:
    other = Tokenizer(tokenizer.core, {})
    assert other.fingerprint != tokenizer.fingerprint
    with pytest.raises(DatastoreError, match="built with another tokenizer than this model's"):
        Datastore.open(store, tokenizer.vocab_size, other)
    with safe_open(store, framework="pt") as file:
        about, tensors = (
            file.metadata(),
            {k: file.get_tensor(k).clone() for k in ("tokens", "sorted")},
        )
    for change, words in (
        ({"version": "2"}, "version 2 of the layout"),
        ({"format": "x"}, "not a"),
    ):
        save_file(tensors, store, metadata=about | change)
        with pytest.raises(DatastoreError, match=words):
            Datastore.open(store, tokenizer.vocab_size, tokenizer)


def test_the_command(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "x.store"
    result = hasten("datastore", "build", *files, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"wrote {out} (")
    run = ("generate", "def f(x):\n", "--max-tokens", 24, "--temperature", 0, "--no-figures")
    plain = hasten(*run)
    drafted = hasten(*run, "--stack", f"draft=retrieval(file={out})")
    assert drafted.exit_code == 0 and drafted.stdout == plain.stdout
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    for texts, words in (
        ([tmp_path / "bad.txt"], "not UTF-8 text"),
        ([files[2]], "the texts are empty"),
        ([tmp_path / "none.txt"], "No such file"),
    ):
        assert_one_line(hasten("datastore", "build", *texts, "-o", tmp_path / "y"), words)
        assert not (tmp_path / "y").exists()
    refused = hasten("generate", "x", "--stack", f"draft=retrieval(file={files[0]})")
    assert_one_line(refused, "damaged")
