"""Datastores: texts as token ids, searchable for what follows any short passage.

A file is safetensors with two int32 tensors of equal length, ``tokens`` (the texts one after the
other, -1 after each) and ``sorted`` (all places, in the order of the `SUFFIX_DEPTH` tokens that
stand there), and says in its metadata: ``format``, ``version``, ``tokenizer`` (the fingerprint of
the vocabulary), ``checksum`` (BLAKE2b of both tensors). It takes 8 bytes a token, and is mapped
into memory, not read into it.
"""

from __future__ import annotations

import array
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hasten import _native
from hasten.models.tokenizer import Tokenizer

FORMAT = "hasten-datastore"
VERSION = "1"
"""Of the layout; raised with every change that an older reader would misread."""

PIECE = 1 << 18
"""Characters that are tokenized, and places that are sorted, between two signs of progress."""

Report = Callable[[str, float], None]
"""Told what is being done and the share of it that is done, 0 to 1."""


class DatastoreError(ValueError):
    """A file that cannot be used as a datastore; the text says why and what to do."""


@dataclass(frozen=True, eq=False)
class Datastore:
    """An open datastore.

    Attributes:
        tokens, sorted: see the module.
    """

    path: Path
    tokens: Tensor
    sorted: Tensor

    @classmethod
    def open(cls, path: str | Path, vocab_size: int, tokenizer: Tokenizer | None) -> Datastore:
        """Map a file whose ids mean what the model's do.

        Args:
            vocab_size: of the model; no id may be larger.
            tokenizer: the model's; without one its vocabulary is not compared.

        Raises:
            DatastoreError: there is no such file, it is damaged, of another version, or made for
                another vocabulary.
        """
        path = Path(path).expanduser()
        again = "build it again: hasten datastore build TEXT... -o FILE -m MODEL"
        if not path.is_file():
            raise DatastoreError(f"{path}: no such file; {again}")
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise DatastoreError(f"{path}: not a datastore; {again}")
                if about.get("version") != VERSION:
                    raise DatastoreError(
                        f"{path}: version {about.get('version')} of the layout, this hasten reads "
                        f"version {VERSION}; {again}"
                    )
                if tokenizer is not None and about.get("tokenizer") != tokenizer.fingerprint:
                    raise DatastoreError(
                        f"{path}: built with another tokenizer than this model's, so its token "
                        f"ids mean something else; {again}"
                    )
                tokens, places = file.get_tensor("tokens"), file.get_tensor("sorted")
        except (OSError, SafetensorError) as error:
            raise DatastoreError(f"{path}: damaged ({error}); {again}") from None
        if checksum(tokens, places) != about.get("checksum"):
            raise DatastoreError(f"{path}: damaged (its checksum differs); {again}")
        count = len(tokens)
        for name, tensor, low, high in (
            ("tokens", tokens, -1, vocab_size),
            ("sorted", places, 0, count),
        ):
            whole = tensor.dtype == torch.int32 and tensor.shape == (count,) and count > 0
            if not whole or int(tensor.min()) < low or int(tensor.max()) >= high:
                raise DatastoreError(f"{path}: '{name}' holds what it must not; {again}")
        return cls(path, tokens, places)


def checksum(tokens: Tensor, places: Tensor) -> str:
    """Of the bytes of both tensors, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (tokens, places):
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def build(
    texts: Sequence[Path],
    out: Path,
    tokenizer: Tokenizer,
    report: Report = lambda what, share: None,
) -> int:
    """Write a datastore of some UTF-8 text files; returns the number of its tokens.

    Needs 8 bytes of memory a token. Whatever goes wrong, nothing half-written remains, and a file
    that was there stays as it was.

    Raises:
        DatastoreError: a file is not UTF-8 text, or there are no tokens at all, or too many.
        OSError: a file cannot be read or written.
    """
    tokens = _tokenized(texts, tokenizer, report)
    write(out, tokens, tokenizer.fingerprint, report)
    return len(tokens)


def write(
    out: Path, tokens: Tensor, fingerprint: str, report: Report = lambda what, share: None
) -> None:
    """Sort tokens (int32 [n], -1 after each text) and write the file."""
    places = sorted_places(tokens, report)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": fingerprint,
        "checksum": checksum(tokens, places),
    }
    handle, name = tempfile.mkstemp(prefix=f".{out.name}-", dir=out.parent)
    os.close(handle)
    fresh = Path(name)
    try:
        save_file({"tokens": tokens, "sorted": places}, fresh, metadata=about)
        fresh.chmod(0o644)
        fresh.replace(out)
    finally:
        fresh.unlink(missing_ok=True)


def _tokenized(texts: Sequence[Path], tokenizer: Tokenizer, report: Report) -> Tensor:
    ids = array.array("i")
    total = sum(path.stat().st_size for path in texts) or 1
    done = 0
    for path in texts:
        try:
            with path.open(encoding="utf-8") as file:
                for piece in _pieces(file.read()):
                    ids.extend(tokenizer.encode(piece, add_special_tokens=False))
                    done += len(piece.encode())
                    report("tokenizing", min(1.0, done / total))
        except UnicodeDecodeError as error:
            raise DatastoreError(f"{path}: not UTF-8 text ({error.reason}); convert it") from None
        ids.append(-1)
    if len(ids) == len(texts):
        raise DatastoreError("the texts are empty; name files with text")
    if len(ids) >= 1 << 31:
        raise DatastoreError(f"{len(ids)} tokens are too many for one datastore (2^31)")
    return torch.frombuffer(ids, dtype=torch.int32)


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces that end with a line, if there are lines."""
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield text[start:end]
        start = end


def sorted_places(tokens: Tensor, report: Report = lambda what, share: None) -> Tensor:
    """All places in the order of the tokens that stand there (`SUFFIX_DEPTH` of them)."""
    ids = tokens.numpy()
    places = torch.from_numpy(np.argsort(ids, kind="stable").astype(np.int32))
    # Places of one first token lie together now: each run of them can be sorted by itself.
    starts = np.flatnonzero(np.diff(ids[places.numpy()], prepend=-2)).tolist()
    first = 0
    for end in [*starts[1:], len(ids)]:
        if end - first >= PIECE or end == len(ids):
            _native.sort_suffixes(tokens, places, first, end)
            first = end
            report("sorting", end / len(ids))
    return places
