"""Tables of texts: counted right, saved whole, and refused where they do not fit."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Core
from tokenizers import models

from hasten import _native
from hasten.methods import MethodError
from hasten.models.tokenizer import Tokenizer
from hasten.speculation import trigrams
from hasten.speculation.trigrams import TrigramCounter, load, save


def tokenizer(words: int = 8) -> Tokenizer:
    return Tokenizer(Core(models.WordLevel({f"w{i}": i for i in range(words)}, "w0")))


def rows(table: dict[str, torch.Tensor]) -> dict[tuple[int, int], list[tuple[int, float]]]:
    at = table["offsets"].tolist()
    token, weight = table["tokens"].tolist(), table["weights"].tolist()
    return {
        (pair >> 32, pair & 0xFFFFFFFF): list(
            zip(token[at[i] : at[i + 1]], weight[at[i] : at[i + 1]], strict=True)
        )
        for i, pair in enumerate(table["pairs"].tolist())
    }


@pytest.mark.parametrize("min_count", [1, 3])
def test_counts_against_dictionaries(monkeypatch: pytest.MonkeyPatch, min_count: int) -> None:
    monkeypatch.setattr(trigrams, "_CHUNK", 50)  # several merges
    rng = random.Random(min_count)
    texts = [
        [min(int(rng.paretovariate(0.6)), 20) for _ in range(rng.randrange(60))] for _ in range(20)
    ]
    counter = TrigramCounter()
    counted: Counter[tuple[int, int, int]] = Counter()
    for text in texts:
        counter.add(text)
        counted.update(zip(text, text[1:], text[2:], strict=False))
    expected: defaultdict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for (a, b, c), count in counted.items():
        if count >= min_count:
            expected[a, b][c] += count
            expected[-1, b][c] += count
    table = counter.table(successors=4, min_count=min_count)
    found = rows(table)
    assert found.keys() == expected.keys()
    for pair, counts in expected.items():
        best = sorted(counts, key=lambda c: (-counts[c], c))[:4]
        total = sum(counts.values())
        assert [c for c, _ in found[pair]] == best
        assert [w for _, w in found[pair]] == pytest.approx([counts[c] / total for c in best])
    assert len(_native.TrigramCorpus(*table.values())) == len(expected)


def test_texts_without_trigrams() -> None:
    counter = TrigramCounter()
    counter.add([1, 2])
    table = counter.table()
    assert rows(table) == {}
    assert len(_native.TrigramCorpus(*table.values())) == 0


def test_ids_that_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="token ids"):
        TrigramCounter().add([1, 2, 1 << 21])


def some_table(path: Path) -> None:
    counter = TrigramCounter()
    counter.add([1, 2, 3, 4, 1, 2, 3, 5])
    save(counter.table(), tokenizer(), path)


def test_a_saved_table_is_read(tmp_path: Path) -> None:
    some_table(tmp_path / "t")
    corpus = load(tmp_path / "t", tokenizer())
    assert len(corpus) == 4 + 4  # pairs, and tokens alone
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with pytest.raises(MethodError, match="no such file; make one with: hasten train trigrams"):
        load(path, tokenizer())
    some_table(path)
    with pytest.raises(MethodError, match="another model's tokenizer"):
        load(path, tokenizer(9))
    with pytest.raises(MethodError, match="without one"):
        load(path, None)
    whole = path.read_bytes()
    for damaged in (whole[:-8], whole[:20], b""):
        path.write_bytes(damaged)
        with pytest.raises(MethodError, match="damaged"):
            load(path, tokenizer())
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(MethodError, match="no tri-gram table"):
        load(path, tokenizer())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("offsets", lambda x: x + 1),
        ("offsets", lambda x: x.flip(0)),
        ("pairs", lambda x: x.flip(0)),
        ("weights", lambda x: -x),
        ("weights", lambda x: x * float("nan")),
        ("tokens", lambda x: x[:-1]),
        ("tokens", lambda x: x.long()),
        ("tokens", lambda x: x - 5),
        ("tokens", lambda x: x + 5),
    ],
)
def test_tables_that_lie_are_refused(tmp_path: Path, name: str, change: object) -> None:
    path = tmp_path / "t"
    some_table(path)
    table = load_file(path)
    table[name] = change(table[name]).contiguous()  # type: ignore[operator]
    save_file(table, path, {"format": trigrams.FORMAT, "tokenizer": tokenizer().fingerprint})
    with pytest.raises(MethodError, match="damaged"):
        load(path, tokenizer())


def test_a_failed_save_leaves_the_old_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t"
    some_table(path)
    before = path.read_bytes()

    def interrupted(*args: object) -> None:
        Path(str(args[1])).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(trigrams, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        some_table(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
