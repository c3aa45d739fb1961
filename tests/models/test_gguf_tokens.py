"""Tokenizers read from GGUF metadata give the ids of the tokenizers they were made from."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import hasten
from hasten.models.facts import CheckpointError
from hasten.models.gguf.tokens import PRE
from hasten.models.tokenizer import Tokenizer
from tests.models.gguf_files import add_tokenizer, convert

REFERENCE = Path(hasten.__file__).parent / "reference" / "target"
STRANGE = [
    *(
        "",
        " ",
        "  ",
        "\n",
        "\n\n \t\r\n",
        "   x",
        "x   ",
        " x  y   z ",
        "\t\tdef f():\n\t\treturn 1\n",
    ),
    *("naïve café", "e\u0301", "ÄÖÜß", "Привет, мир!", "こんにちは 世界", "مرحبا", "ไทย", "한국어"),
    *(
        "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈",
        "🚀🚀",
        "\U0010ffff",
        "a\u0000b",
        "\ufeffx",
        "ﬁ",
        "½³",
        "１２３",
    ),
    *("I'm, you'LL we've", "3.14159 1e-9 0xFF 1,000,000", "x" * 200, "=" * 77, "a_b-c.d/e\\f"),
    *(
        "<|user|>hi<|end|>",
        " <|bos|> <|end|>\n",
        "<|unknown|>",
        "</s> <s>",
        "<0x0A>",
        "▁x▁",
        "<tool> y",
    ),
]


def texts() -> list[str]:
    """More than 500: pieces of the standard library's source and `STRANGE` alone and joined."""
    source = "".join(
        Path(module.__file__).read_text(encoding="utf-8") for module in (json, re, subprocess)
    )
    pieces = [source[at : at + 157] for at in range(0, min(len(source), 157 * 420), 157)]
    joined = [a + b for a, b in zip(STRANGE, STRANGE[7:], strict=False)]
    return [
        *STRANGE,
        *joined,
        *(a + b[:20] for a, b in zip(STRANGE, pieces, strict=False)),
        *pieces,
    ]


def write(
    folder: Path, model: str, pre: str, edit: Callable[[gguf.GGUFWriter], None] = lambda _: None
) -> Path:
    """A file of the tokenizer in ``folder``, in a folder of its own: what lies beside may count."""
    file = folder / "alone" / "t.gguf"
    file.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(file, "llama")
    add_tokenizer(writer, folder, model, pre)
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The reference tokenizer, its files where a test may change them."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((REFERENCE / name).read_bytes())
    return tmp_path


def test_byte_level_tokenizer(folder: Path) -> None:
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_add_bos_token(True)
        writer.add_pad_token_id(2)
        writer.add_chat_template(
            [
                {"name": "default", "template": template},
                {"name": "tool_use", "template": "{{ tools }}"},
            ]
        )

    ours, theirs = Tokenizer.load(write(folder, "gpt2", "smollm", edit)), Tokenizer.load(folder)
    found = texts()
    assert len(found) >= 500
    for text in found:
        for special in (True, False):
            ids = theirs.encode(text, special)
            assert ours.encode(text, special) == ids, text
        assert ours.decode(ids) == theirs.decode(ids) and ours.decode(ids, False) == theirs.decode(
            ids, False
        )
    every = range(theirs.vocab_size)
    assert [ours.token_bytes(i) for i in every] == [theirs.token_bytes(i) for i in every]
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (theirs.vocab_size, 0, 1)
    assert ours.special_tokens == theirs.special_tokens
    talk = [{"role": "user", "content": " What? "}, {"role": "assistant", "content": "That."}]
    assert ours.chat_ids(talk) == theirs.chat_ids(talk)
    assert ours.chat_text(talk) == theirs.chat_text(talk)
    assert "name" in ours.chat_text(talk, tools=[{"name": "f"}])


def sentence_pieces(folder: Path) -> dict[str, float]:
    """Train a small vocabulary of SentencePiece's kind; the scores of its tokens by rank."""
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("▁+[^▁]*"), "isolated")
    controls = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=controls, show_progress=False, limit_alphabet=120
    )
    core.train_from_iterator([text for text in texts() if "<" not in text], trainer)
    core.decoder = decoders.Fuse()
    stated = json.loads(core.to_str())
    stated["added_tokens"] = [t for t in stated["added_tokens"] if t["id"] < 3]
    size = len(stated["model"]["vocab"])
    user = {**stated["added_tokens"][0], "id": size, "content": "<tool>", "special": False}
    stated["added_tokens"].append(user)
    (folder / "tokenizer.json").write_text(json.dumps(stated))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = {**stated["model"]["vocab"], "<tool>": size}
    return {t: 0.0 if i < 259 else float(259 - i) for t, i in vocabulary.items()}


def merged(text: str, scores: dict[str, float], ids: dict[str, int], prefix: bool) -> list[int]:
    """SentencePiece by its definition: the pair of the best score is merged, the leftmost of
    equals, until none is a token; characters without a token become bytes."""
    out: list[int] = []
    for part in re.split("(<unk>|<s>|</s>|<tool>)", text):
        if part in ("<unk>", "<s>", "</s>", "<tool>"):
            out.append(ids[part])
            continue
        if not part:
            continue
        symbols = list(("▁" if prefix else "") + part.replace(" ", "▁"))
        while True:
            pairs = [a + b for a, b in pairwise(symbols)]
            best = max(
                (at for at, pair in enumerate(pairs) if pair in ids),
                key=lambda at: (scores[pairs[at]], -at),
                default=None,
            )
            if best is None:
                break
            symbols[best : best + 2] = [pairs[best]]
        for symbol in symbols:
            raw = [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
            out += [ids[symbol]] if symbol in ids else raw
    return out


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_tokenizer(prefix: bool, tmp_path: Path) -> None:
    scores = sentence_pieces(tmp_path)

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_token_scores(list(scores.values()))
        writer.add_add_space_prefix(prefix)
        writer.add_unk_token_id(0)

    ids = {token: number for number, token in enumerate(scores)}
    file = write(tmp_path, "llama", "default", edit)
    writer_order = sorted(
        json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"].items(),
        key=lambda item: item[1],
    )
    assert [token for token, _ in writer_order] == list(scores)[:-1]
    ours = Tokenizer.load(file)
    for text in texts() if prefix else STRANGE:
        expected = merged(text, scores, ids, prefix)
        assert ours.encode(text, add_special_tokens=False) == expected, text
        assert ours.encode(text) == [ids["<s>"], *expected]
        if "<" not in text and "▁" not in text:
            assert ours.decode(expected) == text
    assert ours.token_bytes(ids["<0x0A>"]) == b"\n"
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize("pre", PRE)
def test_every_known_cut_builds_and_keeps_the_text(pre: str, folder: Path) -> None:
    ours = Tokenizer.load(write(folder, "gpt2", pre))
    for text in [*STRANGE, "".join(STRANGE)]:
        if "\u0301" not in text:  # composed by NFC
            assert ours.decode(ours.encode(text, False), skip_special_tokens=False) == text
    assert (ours.encode("x")[0] == 0) == PRE[pre].bos


def test_what_the_metadata_do_not_say(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = Tokenizer.load(folder)
    file = write(folder, "gpt2", "brand-new")
    with pytest.raises(CheckpointError, match="pre 'brand-new', is not known"):
        Tokenizer.load(file)
    file = file.rename(folder / file.name)
    assert Tokenizer.load(file).encode("def f():") == theirs.encode("def f():")
    assert "tokenizer.json is used instead" in caplog.text

    def broken(what: str, change: Callable[[dict[str, Any]], object]) -> None:
        file = write(folder, "gpt2", "gpt-2", lambda writer: change(writer.kv_data[0]) and None)
        with pytest.raises(CheckpointError, match=what):
            Tokenizer.load(file)

    broken("merges' is missing", lambda data: data.pop("tokenizer.ggml.merges"))
    broken("'tokenizer.ggml.tokens' is missing", lambda data: data.pop("tokenizer.ggml.tokens"))
    broken("lists 3 of", lambda d: d["tokenizer.ggml.token_type"].value.__delitem__(slice(3, None)))
    broken(
        "bos_token_id' is 99999",
        lambda d: setattr(d["tokenizer.ggml.bos_token_id"], "value", 99_999),
    )
    broken("not two tokens", lambda d: d["tokenizer.ggml.merges"].value.__setitem__(0, "ab"))
    broken("not usable", lambda d: d["tokenizer.ggml.merges"].value.__setitem__(0, "ab zzzzq"))


def test_the_file_alone_generates_and_its_tokenizer_needs_no_torch(tmp_path: Path) -> None:
    """Through the command line, the same text as from the folder it was made from."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((REFERENCE / name).read_bytes())

    def edit(writer: gguf.GGUFWriter) -> None:
        for name in ("bos", "eos"):
            writer.kv_data[0].pop(f"tokenizer.ggml.{name}_token_id", None)
        add_tokenizer(writer, tmp_path, "gpt2", "smollm")
        writer.add_add_bos_token(True)

    file = convert(REFERENCE, tmp_path / "elsewhere.gguf", edit=edit)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    code = (
        "import sys; from hasten.models.tokenizer import Tokenizer\n"
        "assert Tokenizer.load(sys.argv[1]).encode('x'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)

    def generated(model: str) -> str:
        command = [sys.executable, "-m", "hasten", "generate", "-m", model, "def add(a, b):"]
        options = [
            "--max-tokens",
            "24",
            "--temperature",
            "0",
            "--stack",
            "weights=checkpoint(dtype=float32)",
        ]
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert generated(str(file)) == generated(str(REFERENCE))
