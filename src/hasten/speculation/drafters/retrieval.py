"""Drafts looked up in a datastore of the user's texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasten import _native
from hasten.methods import MethodError, method
from hasten.speculation.base import Draftable, DraftContext, StatelessDrafting
from hasten.speculation.datastore import Datastore, DatastoreError
from hasten.speculation.tree import TokenTree, TreeBuilder

MOST_HITS = 1_000_000
"""So many take about 10 ms a draft, and say no more than some thousands."""


@method(
    "retrieval",
    slot="draft",
    paper="REST: Retrieval-Based Speculative Decoding (arXiv:2311.08252)",
    exact="bitwise",
    needs=("token-history", "spare-slots"),
    does=("proposes-tokens", "drafts-from-text"),
)
@dataclass(frozen=True)
class Retrieval(StatelessDrafting):
    """Proposes what mostly follows the last tokens in texts that the user chose.

    Pays where output resembles a corpus: an organization's code, forms, manuals. The longest end
    of the sequence (from ``longest`` tokens down to ``shortest``) that occurs in ``file`` is
    looked up in microseconds, whatever the size; of its continuations, up to ``length`` tokens
    long, the ``nodes`` most frequent ones among at most ``hits`` occurrences become a tree. Build
    the file with ``hasten datastore build``; all requests of the engine may draft from it.
    """

    file: str = ""
    nodes: int = 64
    longest: int = 16
    shortest: int = 2
    length: int = 10
    hits: int = 5000

    def __post_init__(self) -> None:
        for name in ("nodes", "shortest", "length", "hits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.hits > MOST_HITS:
            raise ValueError(f"hits={self.hits} must be at most {MOST_HITS}")
        if self.longest < self.shortest:
            raise ValueError(f"longest={self.longest} is below shortest={self.shortest}")
        if self.longest + self.length > _native.SUFFIX_DEPTH:
            raise ValueError(
                f"longest + length is {self.longest + self.length}; datastores are sorted by "
                f"{_native.SUFFIX_DEPTH} tokens, so lower one of them"
            )

    def start(self, context: DraftContext) -> RetrievalDrafting:
        context.check_fits(self.nodes)
        if not self.file:
            raise MethodError(
                "draft=retrieval has no datastore: write retrieval(file=FILE), and build the file "
                "with: hasten datastore build TEXT... -o FILE -m MODEL"
            )
        try:
            vocab = context.model.config.vocab_size
            return RetrievalDrafting(self, Datastore.open(self.file, vocab, context.tokenizer))
        except DatastoreError as error:
            raise MethodError(f"draft=retrieval: {error}") from None


@dataclass
class RetrievalDrafting(StatelessDrafting):
    """`Retrieval` at work. Keeps nothing of any sequence."""

    method: Retrieval
    store: Datastore

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        return [
            self._tree(sequence.tokens, min(budget, self.method.nodes))
            for sequence, budget in zip(sequences, budgets, strict=True)
        ]

    def _tree(self, tokens: list[int], nodes: int) -> TokenTree:
        if not nodes:
            return TokenTree.root(tokens[-1])
        m = self.method
        _, _, found, parents, _ = _native.continuations(
            self.store.tokens,
            self.store.sorted,
            tokens[-m.longest :],
            shortest=m.shortest,
            longest=m.longest,
            length=m.length,
            nodes=nodes,
            hits=m.hits,
        )
        builder = TreeBuilder(tokens[-1])
        for token, parent in zip(found, parents, strict=True):
            builder.add(parent + 1, token)
        return builder.build()[0]
