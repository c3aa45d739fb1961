"""Drafts from a table of tri-grams that adapts to what the model writes."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hasten.methods import method
from hasten.speculation.base import Draftable, DraftContext, Outcome, StatelessDrafting
from hasten.speculation.tenants import TenantTables
from hasten.speculation.tree import TokenTree

if TYPE_CHECKING:
    from hasten._native import TrigramCorpus, Trigrams

MOST_SUCCESSORS = 15

MOST = {"iterations": 100_000, "depth": 64, "prefixes": 100_000, "pairs": 1 << 24}
"""With the first two at their bound a draft takes a second; a table of so many pairs takes 3 GB."""


@method(
    "aded",
    slot="draft",
    paper="ADED: Adaptive Draft-Verification for Efficient Large Language Model Decoding "
    "(arXiv:2407.12021)",
    exact="bitwise",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens", "drafts-from-text"),
)
@dataclass(frozen=True)
class Aded:
    """Searches a table of tri-grams, made heavier by every text that passes, for likely paths.

    The table holds what followed each pair of tokens, with weights. Before each draft every
    tri-gram among the last ``window`` tokens gains ``boost``, up to ``cap``; windows overlap, so a
    fresh one gains several times. From the last two tokens on, ``iterations`` rounds of Monte-Carlo
    tree search go ``depth`` tokens deep and weigh mean value (the weights along a path) against
    prior weight and rarity of visits (``c1``, ``c2``). The ``prefixes`` most visited paths, each
    with its heaviest successor behind, are the draft: the most visited first, up to the budget.

    It needs no training, costs some tens of microseconds a draft, and pays where a stream of
    requests has a language of its own. ``corpus`` names a table of texts that all tenants start
    from (``hasten train trigrams``); what is learned stays with the tenant. A tenant's table holds
    ``pairs`` pairs of about 190 bytes, 6 MB; when it is full, the lighter half of the older half
    goes. The ``tenants`` last seen have one.

    Beyond the paper, each measured to pay: ``prompt`` counts the whole prompt, not its end alone;
    ``backoff`` is the weight of what followed the last token wherever the pair is unknown (0:
    no draft there); ``logits`` likeliest tokens of every verified row gain their probability times
    ``logit_boost``; ``decay`` is what remains of a pair's other weights when one of them gains,
    as weights at the cap would be equal for ever. To compare with: ``search=beam`` takes the
    likeliest paths by shares of weight instead, ``adapt=false`` freezes the table, and
    ``prompt=false,backoff=0,logits=0,decay=1`` is the paper's method.
    """

    corpus: str | None = None
    adapt: bool = True
    search: str = "mcts"
    boost: float = 0.04
    cap: float = 3.0
    window: int = 16
    iterations: int = 150
    depth: int = 3
    prefixes: int = 24
    nodes: int = 64
    c1: float = 32.0
    c2: float = 8.0
    successors: int = 12
    prompt: bool = True
    backoff: float = 0.4
    logits: int = 4
    logit_boost: float = 0.4
    decay: float = 0.9
    pairs: int = 32768
    tenants: int = 32

    def __post_init__(self) -> None:
        if self.search not in ("mcts", "beam"):
            raise ValueError(f"search={self.search}: expected mcts or beam")
        if self.window < 3:
            raise ValueError(f"window={self.window}: a tri-gram has 3 tokens")
        for name in ("iterations", "depth", "prefixes", "nodes", "pairs", "tenants"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name}={getattr(self, name)}: at most {most}")
        if not 1 <= self.successors <= MOST_SUCCESSORS:
            raise ValueError(f"successors={self.successors}: between 1 and {MOST_SUCCESSORS}")
        if not 0 < self.boost <= self.cap < float("inf"):
            raise ValueError(f"need 0 < boost ({self.boost}) <= cap ({self.cap})")
        if not (0 <= self.c1 < float("inf") and 0 < self.c2 < float("inf")):
            raise ValueError(f"need c1 ({self.c1}) of at least 0 and c2 ({self.c2}) above")
        if not 0 <= self.backoff <= 1:
            raise ValueError(f"backoff={self.backoff}: between 0 (off) and 1")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay}: above 0, at most 1 (off)")
        if self.logits < 0:
            raise ValueError(f"logits={self.logits}: tokens a row, or 0")
        if not 0 < self.logit_boost <= self.cap:
            raise ValueError(f"need 0 < logit_boost ({self.logit_boost}) <= cap ({self.cap})")

    def start(self, context: DraftContext) -> AdedDrafting:
        context.check_fits(self.nodes)
        corpus = None
        if self.corpus is not None:
            from hasten.speculation.trigrams import load

            corpus = load(self.corpus, context.tokenizer)
        return AdedDrafting(self, corpus)


@dataclass(slots=True)
class Progress:
    """How many of a sequence's tokens the table has seen."""

    seen: int


class AdedDrafting(StatelessDrafting):
    """ADED at work: the tables of the tenants."""

    def __init__(self, method: Aded, corpus: TrigramCorpus | None) -> None:
        self.method = method
        self.corpus = corpus
        self.tables = TenantTables(self._table, method.tenants)

    def _table(self) -> Trigrams:
        from hasten import _native

        m = self.method
        return _native.Trigrams(
            self.corpus,
            successors=m.successors,
            boost=m.boost,
            cap=m.cap,
            decay=m.decay,
            backoff=m.backoff,
            pairs=m.pairs,
            iterations=m.iterations,
            depth=m.depth,
            prefixes=m.prefixes,
            c1=m.c1,
            c2=m.c2,
        )

    def open(self, sequence: Draftable) -> Progress:
        return Progress(0 if self.method.prompt else len(sequence.tokens))

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        return [self._tree(s, b) for s, b in zip(sequences, budgets, strict=True)]

    def _tree(self, sequence: Draftable, budget: int) -> TokenTree:
        m, tokens, progress = self.method, sequence.tokens, sequence.draft_state
        table = self.tables[sequence.tenant]
        recent = tokens[-m.window :]
        if m.adapt:
            new = len(tokens) - progress.seen + 2  # with the pair before the first new one
            table.absorb(recent if new <= m.window else tokens[-new:])
            progress.seen = len(tokens)
        budget = min(budget, m.nodes)
        before = tokens[-2] if len(tokens) > 1 else -1
        if budget < 1:
            return TokenTree.root(tokens[-1])
        if m.search == "beam":
            return TokenTree(*table.beam(before, tokens[-1], budget))
        # roll-outs depend on the text and the place in it: a run repeats whatever ran before
        key = zlib.crc32(array("i", recent).tobytes(), len(tokens))
        return TokenTree(*table.search(before, tokens[-1], budget, key))

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        if not (self.method.adapt and self.method.logits):
            return
        from hasten.kernels.logits import row_top

        for outcome in outcomes:
            tree, tokens = outcome.tree, outcome.sequence.tokens
            logits = torch.from_numpy(outcome.logits)
            _, _, lse, ids = row_top(logits, min(self.method.logits, logits.shape[1]))
            shares = (logits.gather(1, ids) - lse[:, None]).exp()
            first = tokens[outcome.start - 1] if outcome.start else -1
            before = [first, *(tree.token[parent] for parent in tree.parent[1:])]
            self.tables[outcome.sequence.tenant].add_rows(
                before, tree.token, ids, shares * self.method.logit_boost
            )

    def rollback(self, sequence: Draftable, length: int) -> None:
        sequence.draft_state.seen = min(sequence.draft_state.seen, length)
