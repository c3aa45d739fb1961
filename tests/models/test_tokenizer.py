"""Round trips, streaming that never shows half a character, and the pieces a server needs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hasten.models.facts import CheckpointError
from hasten.models.tokenizer import HELD, Tokenizer

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n\treturn {'a': x}  # indented",
    "Grüße aus Köln, naïve café — “quoted”",
    "日本語のテキスト 中文 한국어",
    "👩‍👩‍👧‍👦 family 🇩🇪 flag 👍🏽",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 a\u0301 \u200b zero width",
    "",
    " ",
    "  leading and trailing  ",
)


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE with 60 merges, as in Llama 3 and Qwen."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 60 + 3,
        special_tokens=["<s>", "</s>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return core


def byte_fallback() -> tokenizers.Tokenizer:
    """Metaspace pieces with byte fallback, as in Llama 2 and Gemma."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    pieces += sorted(set("The quick brown fox jumps over the lazy dog.".replace(" ", "")))
    pieces += ["▁t", "▁th", "▁the", "▁b"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "b")]
    core = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens(["<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return core


CORES = {"byte level": byte_level(), "byte fallback": byte_fallback()}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(params=CORES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(CORES[request.param], SPECIAL)


def streamed(tokenizer: Tokenizer, ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    stream = tokenizer.decode_stream(context)
    return [*map(stream.step, ids), stream.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=False).startswith("<s>")


@pytest.mark.parametrize("text", TEXTS)
def test_stream_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == "", "a complete text leaves nothing to flush"


@settings(deadline=None, max_examples=300)
@given(text=st.text(max_size=40), seen=st.text(max_size=10))
def test_stream_adds_up_for_any_text(text: str, seen: str) -> None:
    """Also behind a context, whose last piece decides about the leading space."""
    for core in CORES.values():
        tokenizer = Tokenizer(core, SPECIAL)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
        before = tokenizer.encode(seen)
        pieces = streamed(tokenizer, ids, before)
        whole = tokenizer.decode([*before, *ids])
        assert tokenizer.decode(before) + "".join(pieces) == whole


@settings(deadline=None, max_examples=500)
@given(ids=st.lists(st.integers(0, 318), max_size=40))
def test_stream_adds_up_for_any_bytes(ids: list[int]) -> None:
    """A byte-level model may emit bytes that are no UTF-8: streamed as the whole decodes."""
    tokenizer = Tokenizer(CORES["byte level"], SPECIAL)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=300)
@given(ids=st.lists(st.integers(0, 258), max_size=40))
def test_stream_of_spoilt_bytes_ends(ids: list[int]) -> None:
    """With byte fallback one bad byte spoils a whole run when decoded at once. What is out
    stays out; the stream neither raises nor holds back for ever."""
    tokenizer = Tokenizer(CORES["byte fallback"], SPECIAL)
    stream = tokenizer.decode_stream()
    for token in ids:
        stream.step(token)
        assert stream._held <= HELD
    stream.flush()


def test_unfinished_character_is_flushed_once(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a👍", add_special_tokens=False)[:-1]
    stream = tokenizer.decode_stream()
    assert "".join(map(stream.step, ids)) == "a"
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == ""


def test_context_keeps_the_leading_space() -> None:
    tokenizer = Tokenizer(CORES["byte fallback"], SPECIAL)
    ids = tokenizer.encode("the", add_special_tokens=False)
    assert "".join(streamed(tokenizer, ids)) == "the"
    assert "".join(streamed(tokenizer, ids, tokenizer.encode("over"))) == " the"


def test_special_tokens_in_a_stream(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("fox over", add_special_tokens=False)
    assert tokenizer.eos_id is not None
    mixed = [ids[0], tokenizer.eos_id, *ids[1:], tokenizer.eos_id]
    assert "".join(streamed(tokenizer, mixed)) == "fox over"
    stream = tokenizer.decode_stream(skip_special_tokens=False)
    assert "".join(map(stream.step, mixed)).count("</s>") == 2


@pytest.mark.parametrize("text", [text for text in TEXTS if text])
def test_token_bytes_spell_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    spelled = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert spelled in (text, f" {text}")  # byte fallback prepends a space
    assert tokenizer.token_text(tokenizer.eos_id or 0) == "</s>"
    assert tokenizer.token_bytes(10**6) == b""


def test_every_byte_has_a_token() -> None:
    for core in CORES.values():
        tokenizer = Tokenizer(core)
        spelled = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
        assert {bytes([i]) for i in range(256)} <= spelled


def save(folder: Path, core: tokenizers.Tokenizer, **config: object) -> None:
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_load_agrees_with_transformers(tmp_path: Path) -> None:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=CORES["byte level"], bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_token_id, reference.eos_token_id)
    assert tokenizer.vocab_size == len(reference)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": "fox"}]
    assert tokenizer.chat_ids(messages) == reference.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_special_tokens_as_objects_and_from_the_old_map(tmp_path: Path) -> None:
    save(tmp_path, CORES["byte level"], eos_token={"content": "<|im_end|>", "lstrip": False})
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}


def test_where_chat_templates_come_from(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }} tools"},
    ]
    save(tmp_path, CORES["byte level"], chat_template=named)
    tokenizer = Tokenizer.load(tmp_path)
    hello = [{"role": "user", "content": "hello"}]
    assert tokenizer.has_chat_template
    assert tokenizer.chat_text(hello) == "plain"
    assert tokenizer.chat_text(hello, tools=[{"type": "function"}]) == "1 tools"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.load(tmp_path).chat_text(hello) == "from the file"


def test_without_a_chat_template() -> None:
    tokenizer = Tokenizer(CORES["byte level"])
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.chat_text([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"model": {"type": "Evil"}}'])
def test_spoilt_tokenizer(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_without_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_fallback_through_transformers(tmp_path: Path) -> None:
    """vocab.json and merges.txt alone, as in old GPT-2 style checkpoints."""
    core = CORES["byte level"]
    core.model.save(str(tmp_path))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = Tokenizer.load(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == core.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


def test_loading_imports_neither_transformers_nor_the_hub(tmp_path: Path) -> None:
    """They cost seconds before the first token."""
    save(tmp_path, CORES["byte level"], chat_template="{{ messages[0].content }}")
    script = (
        "import sys\n"
        "from hasten.models.loading import load_model\n"
        "from hasten.models.tokenizer import Tokenizer\n"
        "t = Tokenizer.load(sys.argv[1])\n"
        "t.chat_ids([{'role': 'user', 'content': 'x'}])\n"
        "assert not {'transformers', 'huggingface_hub', 'rich'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_the_fingerprint_is_what_the_ids_mean() -> None:
    def other(before: str = "", after: str = "") -> Tokenizer:
        text = byte_level().to_str()
        assert before in text
        return Tokenizer(tokenizers.Tokenizer.from_str(text.replace(before, after, 1)))

    plain = Tokenizer(byte_level())
    assert len(plain.fingerprint) == 64 and plain.fingerprint == other().fingerprint
    changed = [
        other('"special":true', '"special":false'),
        other("<|im_end|>", "<|im_over|>"),
        Tokenizer(byte_level(), {"eos_token": "</s>"}),
        Tokenizer(byte_level(), {"bos_token": "</s>"}),
        Tokenizer(byte_fallback()),
    ]
    marks = {plain.fingerprint, *(tokenizer.fingerprint for tokenizer in changed)}
    assert len(marks) == 1 + len(changed)
    longer = byte_level()
    longer.add_tokens(["more"])
    assert Tokenizer(longer).fingerprint not in marks
