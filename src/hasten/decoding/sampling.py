"""Choosing a token from a row of logits: processors, filters, and a draw that load cannot change.

All arithmetic of a row involves that row alone, in float64 and in a total order (probability
descending, then id ascending), so the choice is a function of (logits, history, parameters, seed,
stream, position) and of nothing else.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.decoding.constraints.base import ConstraintState
from hasten.decoding.params import SamplingParams
from hasten.kernels.logits import row_top, sum_exp

Row = NDArray[np.float32]


class NoTokenLeft(ValueError):
    """Bias, allowed tokens and bans leave nothing to choose (or the logits are not numbers)."""


class Number(IntEnum):
    """What a random number is for. Numbers of different purposes are independent."""

    CHOICE = 0
    VERIFY = 1
    GUMBEL = 2
    DRAFT = 3


def uniform(
    seed: int, stream: int, position: int, purpose: Number = Number.CHOICE, index: int = 0
) -> float:
    """A number in [0, 1) that belongs to one place of one sequence: counter-based, stateless."""
    bits = int.from_bytes(_digest(seed, stream, position, purpose, index, 8), "little")
    return (bits >> 11) * 2.0**-53


def generator(
    seed: int, stream: int, position: int, purpose: Number, index: int = 0
) -> np.random.Generator:
    """A source of many numbers that belong to one place of one sequence (Philox counters)."""
    key = _digest(seed, stream, position, purpose, index, 16)
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def _digest(seed: int, stream: int, position: int, purpose: Number, index: int, size: int) -> bytes:
    packed = struct.pack("<QQQ", seed & (2**64 - 1), stream, position)
    if purpose is not Number.CHOICE:
        packed += struct.pack("<QQ", purpose, index)
    return hashlib.blake2b(packed, digest_size=size).digest()


def gumbel(numbers: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Standard Gumbel noise float64 [size]."""
    # 1 - u is in (0, 1], and the smallest positive number keeps the outer logarithm finite
    inner = -np.log(1.0 - numbers.random(size))
    noise: NDArray[np.float64] = -np.log(np.maximum(inner, np.finfo(np.float64).tiny))
    return noise


def descending(values: Row) -> NDArray[np.int64]:
    """Indices by value descending, ties by index ascending. NaN sorts last.

    One sort of 64-bit integers: the upper half is the float mapped to an order-reversing integer,
    the lower half the index, so that no comparison is ever a tie.
    """
    row = np.where(np.isnan(values), np.float32(-np.inf), values) + np.float32(0)  # -0 -> +0
    bits = row.astype(np.float32, copy=False).view(np.uint32).astype(np.uint64)
    negative = (bits >> np.uint64(31)).astype(bool)
    rising = np.where(negative, ~bits & np.uint64(0xFFFFFFFF), bits | np.uint64(0x80000000))
    keys = ((np.uint64(0xFFFFFFFF) - rising) << np.uint64(32)) | np.arange(
        len(row), dtype=np.uint64
    )
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def likeliest(values: Row, k: int) -> NDArray[np.int64]:
    """The first ``k`` of ``descending(values)``, without sorting the rest."""
    if k >= len(values):
        return descending(values)
    row = torch.from_numpy(np.ascontiguousarray(values, np.float32))[None]
    ids: NDArray[np.int64] = row_top(row, k)[3][0].numpy()
    return ids


@dataclass(frozen=True)
class Distribution:
    """The tokens that can be chosen, likeliest first, or only the first of them.

    Attributes:
        ids: tokens in total order.
        weights: their probabilities times ``mass``.
        mass: sum of the weights of all tokens that can be chosen.
        whole: whether ``ids`` are all of them.
    """

    ids: NDArray[np.int64]
    weights: NDArray[np.float64]
    mass: float = 1.0
    whole: bool = True

    @property
    def probs(self) -> NDArray[np.float64]:
        return self.weights / self.mass

    def draw(self, u: float) -> int | None:
        """The token at quantile u, or None if it is none of ``ids``."""
        cumulative = np.cumsum(self.weights)
        place = int(np.searchsorted(cumulative, u * self.mass, side="right"))
        if place == len(cumulative):
            if not self.whole:
                return None
            # the mass was added up in another order: the last token that adds to it
            place = int(np.searchsorted(cumulative, cumulative[-1], side="left"))
        return int(self.ids[place])

    def dense(self, vocab: int) -> NDArray[np.float64]:
        """Probabilities indexed by token id."""
        out = np.zeros(vocab)
        out[self.ids] = self.probs
        return out


FEW = (64, 1024)
"""Tokens that are looked at first. A draw needs the head of the order only; all of it is sorted
where these do not reach the end of the filters, or the token."""


def distribution(logits: Row, params: SamplingParams) -> Distribution:
    """Temperature and filters, applied to processed logits. ``params`` is resolved, T > 0."""
    law = _distribution(logits, params, len(logits))
    assert law is not None, "all tokens are listed"
    return law


def draw(logits: Row, params: SamplingParams, u: float) -> int:
    """``distribution(logits, params).draw(u)``, without sorting the vocabulary where that can be.

    Weights are taken relative to the largest, and cumulated from it on, so that they are the same
    numbers whether or not more of them follow.
    """
    for most in (*FEW, len(logits)):
        law = _distribution(logits, params, most)
        token = None if law is None else law.draw(u)
        if token is not None:
            return token
    raise AssertionError("the last distribution is whole")


def _distribution(logits: Row, params: SamplingParams, most: int) -> Distribution | None:
    """At most the ``most`` likeliest tokens; None if these do not tell where the filters end."""
    assert params.temperature, "greedy has no distribution, and parameters are resolved first"
    size, top_p, typical_p = len(logits), params.top_p or 1.0, params.typical_p or 1.0
    if few := 0 < (params.top_k or 0) < size:
        listed = params.top_k or 0
    else:
        listed = size if typical_p < 1 else min(most, size)
    whole = few or listed == size
    ids = likeliest(logits, listed)
    z = logits[ids].astype(np.float64)
    if not np.isfinite(z[0]):
        raise NoTokenLeft(f"the largest logit is {z[0]}")
    with np.errstate(over="ignore"):
        z = (z - z[0]) / params.temperature  # in this order: the temperature may be tiny
    possible = np.isfinite(z)
    ids, weights = ids[possible], np.exp(z[possible])
    whole = whole or len(ids) < listed
    cumulative = np.cumsum(weights)
    if few or typical_p < 1:
        mass = float(cumulative[-1])
    else:
        row = torch.from_numpy(np.ascontiguousarray(logits, np.float32))[None]
        mass = float(sum_exp(row, row[:, ids[0]], params.temperature))
    keep = len(ids) if whole else None
    if top_p < 1:
        # the smallest head that reaches top_p: everything up to the first crossing
        reached = int(np.searchsorted(cumulative, top_p * mass, side="left")) + 1
        if reached <= len(ids):
            keep = reached
    if params.min_p:
        above = int(np.count_nonzero(weights >= params.min_p))
        if above < len(ids):
            keep = above if keep is None else min(keep, above)
    if top_p < 1 or params.min_p:
        if keep is None:
            return None
        ids, weights, mass, whole = ids[:keep], weights[:keep], float(cumulative[keep - 1]), True
    if typical_p < 1:
        ids, weights = _typical(ids, weights / mass, typical_p)
        mass = 1.0
    return Distribution(ids, weights, mass, whole)


def _typical(
    ids: NDArray[np.int64], probs: NDArray[np.float64], mass: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Keep the tokens whose surprise is nearest to the entropy, up to ``mass`` of probability."""
    surprise = -np.log(np.maximum(probs, np.finfo(np.float64).tiny))
    entropy = float((probs * surprise).sum())
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    keep = int(np.searchsorted(np.cumsum(probs[order]), mass, side="left")) + 1
    kept = np.sort(order[:keep])  # back to the total order
    return ids[kept], probs[kept] / probs[kept].sum()


class Sampler:
    """Chooses the tokens of one sequence, one position after the other.

    It owns the history that penalties, bans and the constraint look at. ``choose`` is pure;
    ``push`` records a token that became output. Under speculation the verifier walks the tree with
    the same two calls, so every node is judged by its own path's history.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        eos: frozenset[int],
        seed: int,
        stream: int,
        bad_words: Sequence[Sequence[int]] = (),
        constraint: ConstraintState | None = None,
    ) -> None:
        self.params = params
        self.constraint = constraint
        self.seed = seed
        self.stream = stream
        self._eos = eos
        self._prompt = prompt
        self._seen: NDArray[np.bool_] | None = None  # tokens of prompt and output, by id
        self._endings: dict[int | None, list[Sequence[int]]] = {}  # bad words, by last but one
        for word in bad_words:
            self._endings.setdefault(word[-2] if len(word) > 1 else None, []).append(word)
        self._output: list[int] = []
        self._counts: dict[int, int] = {}
        p = params
        self._penalised = (
            p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        )
        self._processed = bool(
            self._penalised
            or p.logit_bias
            or p.allowed_token_ids is not None
            or bad_words
            or constraint is not None
        )

    @property
    def greedy(self) -> bool:
        return self.params.temperature == 0

    @property
    def plain(self) -> bool:
        """Whether the choice is the argmax of the raw logits now, so that no row is needed."""
        return self.greedy and not self._processed and len(self._output) >= self.params.min_tokens

    def push(self, token: int) -> None:
        """Record a token of the output."""
        self._output.append(token)
        if self.constraint is not None:
            self.constraint.advance(token)
        if self._penalised:
            self._counts[token] = self._counts.get(token, 0) + 1
            if self._seen is not None:
                self._seen[token] = True

    @contextmanager
    def after(self, tokens: Sequence[int]) -> Iterator[Sampler]:
        """What it will be once ``tokens`` became output; itself where the history is not asked.
        Until the context is left, the sampler itself must not be used."""
        if not self._processed and len(self._output) >= self.params.min_tokens:
            yield self
            return
        later = copy(self)
        later._output = list(self._output)
        later._counts = dict(self._counts)
        later._seen = None if self._seen is None else self._seen.copy()
        for token in tokens:
            later.push(token)
        yield later
        if self.constraint is not None:  # the two share it; after an error the sequence ends
            self.constraint.rollback(len(tokens))

    def choose(self, logits: Row, position: int) -> int:
        """The token at ``position``, given the logits of the position before it."""
        row = self.process(logits)
        if self.greedy:
            return self._best(row)
        return draw(row, self.params, uniform(self.seed, self.stream, position))

    def law(self, logits: Row) -> NDArray[np.float64]:
        """The distribution of the next token, by id; all on one token where decoding is greedy."""
        row = self.process(logits)
        if not self.greedy:
            return distribution(row, self.params).dense(len(row))
        law = np.zeros(len(row))
        law[self._best(row)] = 1.0
        return law

    def gumbel(self, position: int, vocab: int) -> NDArray[np.float64]:
        """Noise that belongs to a position, one number a token."""
        return gumbel(generator(self.seed, self.stream, position, Number.GUMBEL), vocab)

    def process(self, logits: Row) -> Row:
        """Bias, penalties and bans for the next token; the input is left as it is."""
        early = len(self._output) < self.params.min_tokens
        if not self._processed and not early:
            return logits
        p = self.params
        row = logits.copy()
        if p.logit_bias:
            row[list(p.logit_bias)] += np.array(list(p.logit_bias.values()), np.float32)
        if self._penalised:
            self._penalise(row)
        if p.allowed_token_ids is not None:
            allowed = np.array(p.allowed_token_ids, np.int64)
            kept = row[allowed]
            row[:] = -np.inf
            row[allowed] = kept
        if self._endings:
            self._ban_words(row)
        if self.constraint is not None:
            self.constraint.mask(row)
        if early:
            row[list(self._eos | set(p.stop_token_ids))] = -np.inf
        if not np.isfinite(row).any():
            raise NoTokenLeft(
                "no token can be chosen: structured_outputs, allowed_token_ids, bad_words, "
                "logit_bias and min_tokens together ban the whole vocabulary"
            )
        return row

    @staticmethod
    def _best(row: Row) -> int:
        best = int(np.argmax(row))  # NaN counts as the largest
        if not row[best] > -np.inf:
            raise NoTokenLeft(f"the largest logit is {row[best]}")
        return best

    def _ban_words(self, row: Row) -> None:
        """Ban the last tokens of the bad words that are written but for it."""
        (last,) = self._tail(1)
        for word in chain(self._endings.get(None, ()), self._endings.get(last, ())):
            length = len(word) - 1
            if not length or self._tail(length) == list(word[:-1]):
                row[word[-1]] = -np.inf

    def _tail(self, length: int) -> list[int]:
        if len(self._output) >= length:
            return self._output[-length:]
        missing = length - len(self._output)
        return list(self._prompt[len(self._prompt) - missing :]) + self._output

    def _penalise(self, row: Row) -> None:
        p = self.params
        generated = np.fromiter(self._counts, np.int64, len(self._counts))
        if p.repetition_penalty != 1:
            if self._seen is None:  # made once; `push` keeps it
                self._seen = np.zeros(len(row), bool)
                self._seen[np.array(self._prompt, np.int64)] = True
                self._seen[generated] = True
            seen = np.flatnonzero(self._seen)
            factor = np.float32(p.repetition_penalty)
            row[seen] = np.where(row[seen] > 0, row[seen] / factor, row[seen] * factor)
        if len(generated) and (p.presence_penalty or p.frequency_penalty):
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            row[generated] -= np.float32(p.frequency_penalty) * counts
            row[generated] -= np.float32(p.presence_penalty)


def top_logprobs(logits: Row, lse: float, k: int) -> list[tuple[int, float]]:
    """The k likeliest (token id, log-probability) of a raw row, in total order."""
    if k == 0:
        return []
    return [(int(i), float(logits[i] - np.float32(lse))) for i in likeliest(logits, k)]
