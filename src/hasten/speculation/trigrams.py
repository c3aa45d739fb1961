"""Tri-gram tables of texts: counted once, saved, and read by drafters.

A table file is safetensors: ``pairs`` int64 [P], ascending, each (a << 32 | b); ``offsets`` int64
[P + 1]; ``tokens`` int32 and ``weights`` float32 [S], of pair i from offsets[i] to offsets[i + 1],
heaviest first. A weight is the share of the pair's occurrences that the token followed. Pairs with
a = -1 hold what followed b after anything. The metadata name the format and the tokenizer.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hasten import _native
from hasten.methods import MethodError
from hasten.models.tokenizer import Tokenizer

FORMAT = "hasten-trigrams-1"
_BITS = 21  # of a token id in the packed tri-grams that are counted
_CHUNK = 4_000_000  # tri-grams that are counted at a time


class TrigramCounter:
    """Counts the tri-grams of texts. Memory: 16 bytes for each different one, and a chunk."""

    def __init__(self) -> None:
        self._pending: list[NDArray[np.int64]] = []
        self._waiting = 0
        self._packed = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)

    def add(self, ids: list[int]) -> None:
        """Count one text; no tri-gram spans two texts."""
        if len(ids) < 3:
            return
        x = np.asarray(ids, np.int64)
        if x.min() < 0 or x.max() >= 1 << _BITS:
            raise ValueError(f"token ids must lie between 0 and {(1 << _BITS) - 1}")
        self._pending.append(x[:-2] << 2 * _BITS | x[1:-1] << _BITS | x[2:])
        self._waiting += len(x) - 2
        if self._waiting >= _CHUNK:
            self._merge()

    def _merge(self) -> None:
        packed = np.concatenate([self._packed, *self._pending])
        counts = np.concatenate([self._counts, np.ones(self._waiting, np.int64)])
        self._pending, self._waiting = [], 0
        self._packed, self._counts = _summed(packed, counts)

    def table(self, successors: int = 12, min_count: int = 1) -> dict[str, torch.Tensor]:
        """The tensors of a table file.

        Args:
            successors: heaviest ones kept of each pair; of equal ones those with low ids.
            min_count: tri-grams that occur less often are left out.
        """
        self._merge()
        frequent = self._counts >= min_count
        packed, counts = self._packed[frequent], self._counts[frequent]
        a, rest = packed >> 2 * _BITS, packed & (1 << 2 * _BITS) - 1
        b, c = rest >> _BITS, rest & (1 << _BITS) - 1
        after_any, any_counts = _summed(rest, counts)
        pair = np.concatenate([(-1 << 32) | after_any >> _BITS, a << 32 | b])
        token = np.concatenate([after_any & (1 << _BITS) - 1, c])
        count = np.concatenate([any_counts, counts])
        order = np.lexsort((token, -count, pair))
        pair, token, count = pair[order], token[order], count[order]
        pairs, first, size = np.unique(pair, return_index=True, return_counts=True)
        rank = np.arange(len(pair)) - np.repeat(first, size)
        total = np.repeat(np.add.reduceat(count, first) if len(first) else count, size)
        kept = rank < successors
        offsets = np.concatenate([[0], np.cumsum(np.minimum(size, successors))])
        return {
            "pairs": torch.from_numpy(pairs),
            "offsets": torch.from_numpy(offsets.astype(np.int64)),
            "tokens": torch.from_numpy(token[kept].astype(np.int32)),
            "weights": torch.from_numpy((count[kept] / total[kept]).astype(np.float32)),
        }


def _summed(
    keys: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each key once, ascending, with the sum of its counts."""
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1))
    return keys[first], np.add.reduceat(counts, first) if len(first) else counts


def save(table: dict[str, torch.Tensor], tokenizer: Tokenizer, path: Path) -> None:
    """Write a table file; a file that is there already is replaced whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        save_file(table, part, {"format": FORMAT, "tokenizer": tokenizer.fingerprint})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(path: str | Path, tokenizer: Tokenizer | None) -> _native.TrigramCorpus:
    """Read a table file.

    Raises:
        MethodError: no such file, another format, damaged, or of another tokenizer's tokens.
    """
    path = Path(path)
    make = f"make one with: hasten train trigrams TEXT... -o {path.name} -m MODEL"
    if not path.is_file():
        raise MethodError(f"corpus={path}: there is no such file; {make}")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise MethodError(f"corpus={path} is no tri-gram table ('{FORMAT}'); {make}")
            if tokenizer is None:
                raise MethodError(
                    f"corpus={path} holds the tokens of a tokenizer, and this engine runs without "
                    "one: give it its tokenizer, or leave the corpus out"
                )
            if about.get("tokenizer") != tokenizer.fingerprint:
                raise MethodError(f"corpus={path} was made with another model's tokenizer; {make}")
            names = ("pairs", "offsets", "tokens", "weights")
            tensors = [file.get_tensor(name) for name in names]
        if not (tensors[2] < tokenizer.vocab_size).all():
            raise ValueError("it holds tokens that the tokenizer has not")
        return _native.TrigramCorpus(*tensors)
    except MethodError:
        raise
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise MethodError(f"corpus={path} is damaged ({error}); {make}") from None
