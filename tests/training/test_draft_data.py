"""Texts of a draft model: three parts that share nothing, rows that score what they should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Core
from tokenizers import models as token_models
from tokenizers import pre_tokenizers, processors

from hasten.models.base import ModelConfig
from hasten.models.facts import CheckpointError
from hasten.models.llama import configure
from hasten.models.tokenizer import Tokenizer
from hasten.training import draft_data
from hasten.training.bpe import BOS, EOS
from hasten.training.corpus import SourceFile, is_held_out
from hasten.training.data import Batch
from hasten.training.draft_data import (
    Answer,
    Answers,
    Division,
    Prompts,
    Speech,
    Windows,
    read_answers,
    read_texts,
)
from tests.conftest import tiny_facts

FILES = [SourceFile(f"file{i}.py", f"value_{i} = {i}\n" * (i % 7 + 1)) for i in range(400)]


def config_of(vocab_size: int = 1024) -> ModelConfig:
    return configure(tiny_facts(vocab_size=vocab_size, eos_token_id=[1, 6]), torch.float32)


@pytest.fixture(scope="session")
def speech(tokenizer: Core) -> Speech:
    return Speech(Tokenizer(tokenizer, {"bos_token": BOS, "eos_token": EOS}), config_of(), "tiny")


def targets_of(batch: Batch) -> list[int]:
    return batch.targets[batch.mask > 0].tolist()


def test_parts_share_nothing() -> None:
    parts = Division.of([*FILES, *(SourceFile(f"copy of {f.path}", f.text) for f in FILES)])
    sets = [set(parts.pretraining), set(parts.asking), set(parts.held_out)]
    assert all(sets)
    assert sum(map(len, sets)) == len(set().union(*sets)) == len(FILES)
    assert len(sets[1]) < len(sets[0]) / 3


def test_the_held_out_files_are_those_of_the_reference_models() -> None:
    parts = Division.of(FILES)
    assert set(parts.held_out) == {file.text for file in FILES if is_held_out(file.path)}


@pytest.mark.parametrize("lines", [8, 40, 500])
def test_few_long_texts_are_cut(lines: int) -> None:
    text = "".join(f"line {i} of a long text\n" * 200 for i in range(lines))
    parts = Division.of([SourceFile("long.txt", text)])
    assert parts.asking and parts.held_out and parts.pretraining
    whole = [*parts.pretraining, *parts.asking, *parts.held_out]
    assert sum(map(len, whole)) == len(text)
    assert len(set(whole)) == len(whole)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="give more text"):
        Division.of([SourceFile("a", "x = 1\n"), SourceFile("b", "y = 1\n")])


def test_reads_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("alpha")
    (tmp_path / "deep" / "b.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "c.txt").write_text("gamma")
    found = read_texts([tmp_path / "deep", tmp_path / "c.txt"])
    assert [file.text for file in found] == ["alpha", "gamma"]
    with pytest.raises(FileNotFoundError):
        read_texts([tmp_path / "missing"])


def test_a_text_begins_as_the_target_reads_it(tokenizer: Core, speech: Speech) -> None:
    """The special tokens are those that the target's tokenizer puts around a prompt."""
    text = "def add(first, second):"
    body = speech.bodies([text])[0]
    assert [*speech.lead, *body] == speech.tokenizer.encode(text)
    assert speech.document(body).tolist() == [
        tokenizer.token_to_id(BOS),
        *body,
        tokenizer.token_to_id(EOS),
    ]
    plain = Core.from_str(tokenizer.to_str())
    plain.post_processor = processors.ByteLevel()  # this one puts nothing there
    without = Speech(Tokenizer(plain), config_of(), "plain")
    assert without.lead == []
    assert without.document(body).tolist() == [*body, 1]


def test_vocabularies_that_make_no_sense_are_refused(tokenizer: Core) -> None:
    with pytest.raises(CheckpointError, match="ids up to 1023, the model 1000 rows"):
        Speech(Tokenizer(tokenizer), config_of(1000), "tiny")
    assert Speech(Tokenizer(tokenizer), config_of(1100), "tiny").lead  # a padded matrix is fine
    core = Core(token_models.WordLevel({"<unk>": 0, "known": 1, "a": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    words = Speech(Tokenizer(core, {"unk_token": "<unk>"}), config_of(8), "words")
    assert words.bodies(["known a known"])[0].tolist() == [1, 2, 1]
    with pytest.raises(ValueError, match=r"5 of 6 tokens .* unknown"):
        words.bodies(["known but for these five words"])


@pytest.mark.parametrize("length", [16, 4000])
def test_windows_are_cut_from_the_documents(speech: Speech, length: int) -> None:
    """Also where a window is longer than all of the text."""
    texts = [file.text for file in FILES[:20]]
    source = Windows(speech, texts, 1024, seed=3)
    stream = [token for body in speech.bodies(texts) for token in speech.document(body)]
    assert source.stream.tolist() == stream
    batch = source.batch(5, 3, length)
    again = "".join(chr(token) for token in stream * (2 + length // len(stream)))
    for row in batch.tokens.tolist():
        assert "".join(map(chr, row)) in again
    follows = batch.tokens[:, 1:].flatten()
    picked = {int(r): int(t) for r, t in zip(batch.rows, batch.targets, strict=True)}
    assert len(picked) == 3 * length
    inside = [r for r in picked if r % length != length - 1]
    assert all(picked[r] == follows[r - r // length] for r in inside)
    same = source.batch(5, 3, length)
    assert torch.equal(same.tokens, batch.tokens)
    assert not torch.equal(source.batch(6, 3, length).tokens, batch.tokens)


def test_a_large_vocabulary_scores_fewer_positions(
    speech: Speech, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_data, "SCORED_LOGITS", 1024 * 10)
    batch = Windows(speech, [FILES[3].text], 1024, seed=0).batch(0, 4, 16)
    assert batch.tokens.shape == (4, 16) and len(batch.rows) == 10


def test_prompts_repeat_and_come_from_their_part(speech: Speech) -> None:
    parts = Division.of(FILES)
    prompts = Prompts(speech, parts.asking, 2, 9, "s")
    texts = [" ".join(map(str, body)) for body in speech.bodies(parts.asking)]
    assert [prompts[i] for i in range(50)] == [prompts[i] for i in range(50)]
    assert len({tuple(prompts[i]) for i in range(50)}) > 25
    for i in range(50):
        prompt = prompts[i]
        assert prompt[: len(speech.lead)] == speech.lead
        body = prompt[len(speech.lead) :]
        assert 2 <= len(body) <= 9
        assert any(" ".join(map(str, body)) in text for text in texts)


def answers_of(count: int) -> list[Answer]:
    rng = np.random.default_rng(0)
    return [
        Answer(
            rng.integers(0, 500, int(rng.integers(1, 9))).tolist(),
            rng.integers(500, 1000, int(rng.integers(1, 12))).tolist(),
            0.0,
        )
        for _ in range(count)
    ]


def test_answers_alone_are_scored() -> None:
    """Every token of every answer once an epoch, right behind what comes before it; no prompt."""
    answers = answers_of(14)
    source = Answers(answers, 1024, seed=1)
    for epoch in range(2):
        found: list[tuple[int, ...]] = []
        for step in range(7):
            batch = source.batch(7 * epoch + step, 2, source.length)
            real = batch.mask > 0
            for row in range(2):
                mine = real & (batch.rows // source.length == row)
                found.append(tuple(batch.targets[mine].tolist()))
                first = int(batch.rows[mine][0]) - row * source.length
                text = batch.tokens[row].tolist()
                one = next(a for a in answers if tuple(a.tokens) == found[-1])
                assert text[: first + 1] == one.prompt
                assert text[first + 1 : first + len(one.tokens)] == one.tokens[:-1]
        assert sorted(found) == sorted(tuple(a.tokens) for a in answers)
    first, second = (
        [source.answers[i] for i in source.order(epoch).tolist()] for epoch in range(2)
    )
    assert first != second


def test_long_answers_are_cut_to_the_row() -> None:
    source = Answers([Answer([1, 2, 3], [4, 5, 6, 7], 0.0)], 1024, seed=0)
    assert source.length == 6
    batch = source.batch(0, 1, 4)
    assert batch.tokens.tolist() == [[1, 2, 3, 4]]
    assert targets_of(batch) == [4, 5]


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    assert read_answers(file) == []
    answers = answers_of(3)
    file.write_text("".join(a.to_json() + "\n" for a in answers) + '{"prompt": [1, ')
    assert read_answers(file) == answers
    with file.open("a") as more:
        more.write(answers[0].to_json() + "\n")
    assert read_answers(file) == [*answers, answers[0]]
