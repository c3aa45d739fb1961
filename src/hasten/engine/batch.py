"""The input of one forward pass: ragged rows over any mix of prompt chunks, decodes and trees.

A *row* is one token to compute. A row reads the keys of its sequence in the slots
``[0, base)`` and, beyond them, the slots ``base + j`` whose bit ``j`` is set in its mask (a token
tree). A *slot* is a logical place in the sequence's page table; for every committed token the
slot equals the position, and tree nodes occupy the slots after the committed ones, sorted by
depth. The visible tree slots of a row always form a path of consecutive positions that ends at
the row itself, so the position of each is known from the row's own position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hasten.speculation.tree import TokenTree

WORD = 64  # bits in one word of an ancestor mask


@dataclass(slots=True)
class Segment:
    """The rows of one sequence in this step.

    ``tokens`` are known tokens at the positions ``start, start + 1, ...``. When ``tree`` is given,
    its root is the last of ``tokens`` and its other nodes follow as candidate rows.
    ``wanted`` says which rows need logits: "last" known row and all candidates, "all" rows, or
    "none" (a prompt chunk that does not reach the end). "embedding" is "none" with the last known
    row's hidden state.
    """

    table_row: int
    start: int
    tokens: Sequence[int]
    tree: TokenTree | None = None
    wanted: str = "last"

    @property
    def num_rows(self) -> int:
        return len(self.tokens) + (len(self.tree) - 1 if self.tree is not None else 0)


@dataclass(slots=True)
class Batch:
    """Ragged rows of one step; all arrays are numpy, one entry a row unless said otherwise.

    Attributes:
        tokens: int64 [R], token ids.
        positions: int32 [R], logical position (rotary angle, window and chunk grid).
        slots: int32 [R], where the row's key and value go in its page table.
        table_row: int32 [R], which row of the page tables belongs to the row's sequence.
        base: int32 [R], slots below it are visible (window and selection permitting).
        mask: uint64 [R, W], bit j of the row's words = slot ``base + j`` is visible. W may be 0.
        wanted: int64 [n], rows whose logits the step returns, ascending.
        embedded: int64 [m], rows whose last hidden state it returns, ascending.
        segment_rows: int32 [S + 1], row offsets of the segments.
        segment_wanted: int32 [S + 1], offsets of the segments into ``wanted``.
        tables: one int32 array [table rows, head groups, blocks] per layer group: the page id of
            each logical block, -1 where none is held.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int32]
    slots: NDArray[np.int32]
    table_row: NDArray[np.int32]
    base: NDArray[np.int32]
    mask: NDArray[np.uint64]
    wanted: NDArray[np.int64]
    embedded: NDArray[np.int64]
    segment_rows: NDArray[np.int32]
    segment_wanted: NDArray[np.int32]
    tables: list[NDArray[np.int32]]

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    @classmethod
    def build(cls, segments: Sequence[Segment], tables: list[NDArray[np.int32]]) -> Batch:
        """Concatenate segments. A step of nothing but single decodes takes the short way."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        table_row: list[int] = []
        base: list[int] = []
        wanted: list[int] = []
        embedded: list[int] = []
        segment_rows = [0]
        segment_wanted = [0]
        masked: list[tuple[int, int]] = []  # (row, bits)
        words = 0
        for segment in segments:
            row, start, known = len(tokens), segment.start, len(segment.tokens)
            tokens.extend(segment.tokens)
            if known == 1:
                positions.append(start)
                base.append(start + 1)
            else:
                positions.extend(range(start, start + known))
                base.extend(range(start + 1, start + known + 1))
            tree = segment.tree
            candidates = 0
            if tree is not None and len(tree) > 1:
                candidates = len(tree) - 1
                root = start + known - 1
                tokens.extend(tree.token[1:])
                positions.extend(root + depth for depth in tree.depth[1:])
                if tree.is_chain:
                    base.extend(range(root + 2, root + 2 + candidates))
                else:
                    base.extend([root + 1] * candidates)
                    words = max(words, -(-candidates // WORD))
                    bits = tree.ancestors()
                    masked.extend(
                        (row + known + node - 1, bits[node] >> 1) for node in range(1, len(tree))
                    )
            rows = known + candidates
            slots.extend(range(start, start + rows))
            table_row.extend([segment.table_row] * rows)
            if segment.wanted == "last":
                wanted.extend(range(row + known - 1, row + rows))
            elif segment.wanted == "all":
                wanted.extend(range(row, row + rows))
            elif segment.wanted == "embedding":
                embedded.append(row + known - 1)
            segment_rows.append(len(tokens))
            segment_wanted.append(len(wanted))
        mask = np.zeros((len(tokens), words), np.uint64)
        for row, bits_ in masked:
            for word in range(words):
                mask[row, word] = bits_ >> (WORD * word) & (2**WORD - 1)
        return cls(
            tokens=np.array(tokens, np.int64),
            positions=np.array(positions, np.int32),
            slots=np.array(slots, np.int32),
            table_row=np.array(table_row, np.int32),
            base=np.array(base, np.int32),
            mask=mask,
            wanted=np.array(wanted, np.int64),
            embedded=np.array(embedded, np.int64),
            segment_rows=np.array(segment_rows, np.int32),
            segment_wanted=np.array(segment_wanted, np.int32),
            tables=tables,
        )

    def take(self, rows: NDArray[np.int64]) -> Batch:
        """The batch of some rows, ascending, for a pass of some layers: none is wanted."""
        return Batch(
            tokens=self.tokens[rows],
            positions=self.positions[rows],
            slots=self.slots[rows],
            table_row=self.table_row[rows],
            base=self.base[rows],
            mask=self.mask[rows],
            wanted=np.empty(0, np.int64),
            embedded=np.empty(0, np.int64),
            segment_rows=np.array([0, len(rows)], np.int32),
            segment_wanted=np.zeros(2, np.int32),
            tables=self.tables,
        )
