"""Page tables of all sequences of one runner: reserve, share, commit, give back.

A sequence's cache is a ``Stream``: positions that are known (tokens), a prefix of them that is
computed (keys and values stored), and per layer group the pages of its logical blocks:

    block      0        1        2        3        4
             [hit    ][hit    ][own    ][own    ][own    ]
    slots    ------- computed ----------->|known|<- candidates of this step
             shared, read only   private    reserved before the step, given back if rejected

Blocks below the window of a layer group are given back as soon as no later row can see them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hasten.cache.layout import PAGE_SIZE, KVLayout
from hasten.cache.pool import LedgerReport, PagePool
from hasten.cache.prefix import block_key

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Stream:
    """One runner's view of a sequence.

    Attributes:
        tokens: known tokens (shared with the sequence that owns the stream).
        root: first key of its prefix chain; None keeps it out of the prefix index.
        computed: leading positions whose keys and values are stored and committed.
        table_row: its row in the page tables, -1 while it holds no pages.
        blocks: logical blocks reserved so far.
        published: leading blocks that were offered to the prefix index.
        keys: chain of keys of its leading blocks; tokens never change, so it outlives preemption.
        first_block: per layer group, the first block behind the sinks that is still held.
    """

    tokens: list[int]
    root: bytes | None = None
    computed: int = 0
    table_row: int = -1
    blocks: int = 0
    published: int = 0
    keys: list[bytes] = field(default_factory=list)
    first_block: list[int] = field(default_factory=list)

    @property
    def behind(self) -> int:
        """Known positions that are not computed yet."""
        return len(self.tokens) - self.computed


@dataclass(slots=True)
class CacheStats:
    """Counters since start."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    leaked_pages: int = 0


class CacheManager:
    """Owns the page tables and pools of one runner. Streams own the pages in their table row."""

    def __init__(
        self, layout: KVLayout, num_blocks: int, max_streams: int, max_positions: int
    ) -> None:
        """
        Args:
            layout: shape of the cache.
            num_blocks: blocks of ``PAGE_SIZE`` positions that the pools hold.
            max_streams: table rows, that is streams with pages at the same time.
            max_positions: longest stream, candidates included.
        """
        self.layout = layout
        self.num_blocks = num_blocks
        self.max_blocks = -(-max_positions // PAGE_SIZE)
        self.pools = [PagePool(num_blocks * g.head_groups) for g in layout.groups]
        self.tables: list[NDArray[np.int32]] = [
            np.full((max_streams, g.head_groups, self.max_blocks), -1, np.int32)
            for g in layout.groups
        ]
        self._free_rows = list(range(max_streams - 1, -1, -1))
        self._streams: dict[int, Stream] = {}  # table row -> stream
        self.pending_copies: list[tuple[int, int, int]] = []  # (group, from page, to page)
        self.stats = CacheStats()

    # ---- life of a stream -------------------------------------------------------------------

    def attach(self, stream: Stream, headroom: int = 0) -> bool:
        """Give a stream a table row and the longest cached prefix.

        False, and nothing changed, if no row is free or if its known positions, one more, and
        ``headroom`` blocks would not fit beside what is held. At least one known position stays
        uncomputed, so that the next step has a row to run.
        """
        if not self._free_rows:
            return False
        found, length = self._find_prefix(stream) if stream.root is not None else ([], 0)
        # a prompt as long as the pool has no place for one more: it can only be scored
        blocks = min(-(-(len(stream.tokens) + 1) // PAGE_SIZE), self.num_blocks)
        needed = blocks - length + headroom
        adopted: list[list[tuple[int, int, int]]] = []  # per group (block, head group, page)
        for group, (pool, table) in enumerate(zip(self.pools, self.tables, strict=True)):
            entries = [
                (block, head_group, page)
                for block in range(length)
                if self._needed(group, block, length)
                for head_group, page in enumerate(found[group][block] or ())
            ]
            adopted.append(entries)
            revived = sum(pool.references[page] == 0 for _, _, page in entries)
            if pool.num_available - revived < needed * table.shape[1]:
                return False
        row = self._free_rows.pop()
        for pool, table, entries in zip(self.pools, self.tables, adopted, strict=True):
            for block, head_group, page in entries:
                table[row, head_group, block] = pool.share(page)
        self._streams[row] = stream
        stream.table_row = row
        stream.blocks = stream.published = length
        stream.computed = length * PAGE_SIZE
        stream.first_block = [0] * len(self.pools)
        if stream.root is not None:
            self.stats.prefix_queries += 1
            self.stats.prefix_hits += length > 0
        return True

    def release(self, stream: Stream) -> None:
        """Give back all pages and the table row. Harmless on a stream that holds none."""
        if stream.table_row < 0:
            return
        for group in range(len(self.pools)):
            # Last block first: the index then loses the ends of chains before their beginnings.
            for block in range(stream.blocks - 1, -1, -1):
                self._drop_block(group, stream.table_row, block)
        del self._streams[stream.table_row]
        self._free_rows.append(stream.table_row)
        stream.table_row = -1
        stream.computed = stream.blocks = stream.published = 0

    def fork(self, stream: Stream, twin: Stream) -> bool:
        """Let ``twin``, whose tokens begin with the computed ones, share every page of ``stream``.

        The first write into a shared, half-filled page copies it. False if no table row is free.
        """
        if not self._free_rows:
            return False
        row = self._free_rows.pop()
        twin.table_row = row
        twin.computed = stream.computed
        twin.blocks = blocks = -(-stream.computed // PAGE_SIZE)  # candidates are not shared
        twin.published = stream.published
        twin.keys = stream.keys[: stream.published]
        twin.first_block = list(stream.first_block)
        self._streams[row] = twin
        for pool, table in zip(self.pools, self.tables, strict=True):
            table[row, :, :blocks] = table[stream.table_row, :, :blocks]
            for page in table[row][table[row] >= 0].tolist():
                pool.share(page)
        return True

    # ---- one step ---------------------------------------------------------------------------

    def reserve(self, stream: Stream, slots: int) -> bool:
        """Make the slots ``[computed, slots)`` writable. False, and nothing changed, if pages lack.

        Takes pages for new blocks and, where the first slot falls into a page that others share,
        a private copy (queued in ``pending_copies`` for the runner to do before the step).
        """
        blocks = -(-slots // PAGE_SIZE)
        if blocks > self.max_blocks:
            return False
        fresh = blocks - stream.blocks
        first = stream.computed // PAGE_SIZE
        open_block = stream.computed % PAGE_SIZE != 0
        if fresh <= 0 and not open_block:
            return True
        row = stream.table_row
        copies: list[list[int]] = []
        for pool, table in zip(self.pools, self.tables, strict=True):
            shared = []
            if open_block:
                pages = table[row, :, first].tolist()
                shared = [h for h, page in enumerate(pages) if pool.references[page] > 1]
            copies.append(shared)
            if pool.num_available < len(shared) + max(fresh, 0) * table.shape[1]:
                return False
        for group, (pool, table) in enumerate(zip(self.pools, self.tables, strict=True)):
            for head_group in copies[group]:
                old = int(table[row, head_group, first])
                new = pool.take()
                self.pending_copies.append((group, old, new))
                pool.drop(old)
                table[row, head_group, first] = new
            for block in range(stream.blocks, blocks):
                for head_group in range(table.shape[1]):
                    table[row, head_group, block] = pool.take()
        stream.blocks = max(stream.blocks, blocks)
        return True

    def take_copies(self) -> list[tuple[int, int, int]]:
        """The queued copies, for the runner; the queue is empty afterwards."""
        copies, self.pending_copies = self.pending_copies, []
        return copies

    def commit(self, stream: Stream, computed: int) -> None:
        """The first ``computed`` positions hold. Publishes full blocks, returns spare pages."""
        full = computed // PAGE_SIZE
        crossed = full > stream.computed // PAGE_SIZE
        stream.computed = computed
        needed = -(-computed // PAGE_SIZE)
        if needed < stream.blocks:
            self._truncate(stream, needed)
        if crossed:
            if stream.root is not None:
                self._publish(stream, full)
            self._drop_unseen(stream)

    # ---- the ledger -------------------------------------------------------------------------

    def audit(self) -> list[LedgerReport]:
        """One report per layer group; all empty when every page has its owner."""
        return [pool.audit(self._owned(g)) for g, pool in enumerate(self.pools)]

    @property
    def streams(self) -> list[Stream]:
        """The streams that hold a table row."""
        return list(self._streams.values())

    def heal(self, live: Sequence[Stream]) -> int:
        """Give back what no stream in ``live`` owns; counts and logs it instead of failing."""
        owners = {id(stream) for stream in live}
        healed = 0
        for stream in self.streams:
            if id(stream) not in owners:
                healed += stream.blocks
                self.release(stream)
        healed += sum(pool.heal(self._owned(g)) for g, pool in enumerate(self.pools))
        if healed:
            self.stats.leaked_pages += healed
            logger.warning("page ledger: %d leaked pages found and given back", healed)
        return healed

    @property
    def usage(self) -> float:
        """Share of pages that are held, the fullest layer group counting."""
        return max(pool.num_held / pool.num_pages for pool in self.pools)

    def forget_prefixes(self) -> None:
        """Empty the prefix index (for example between benchmark runs)."""
        for pool in self.pools:
            pool.forget()

    # ---- inside -----------------------------------------------------------------------------

    def _owned(self, group: int) -> Iterator[int]:
        table = self.tables[group]
        for row in self._streams:
            entries = table[row]
            yield from entries[entries >= 0].tolist()

    def _drop_block(self, group: int, row: int, block: int) -> None:
        table, pool = self.tables[group], self.pools[group]
        for head_group in range(table.shape[1]):
            page = int(table[row, head_group, block])
            if page >= 0:
                pool.drop(page)
                table[row, head_group, block] = -1

    def _truncate(self, stream: Stream, blocks: int) -> None:
        for group in range(len(self.pools)):
            for block in range(stream.blocks - 1, blocks - 1, -1):
                self._drop_block(group, stream.table_row, block)
        stream.blocks = blocks

    def _key(self, stream: Stream, block: int) -> bytes:
        keys = stream.keys
        while len(keys) <= block:
            start = len(keys) * PAGE_SIZE
            parent = keys[-1] if keys else stream.root
            assert parent is not None
            keys.append(block_key(parent, stream.tokens[start : start + PAGE_SIZE]))
        return keys[block]

    def _publish(self, stream: Stream, full: int) -> None:
        for block in range(stream.published, full):
            key = self._key(stream, block)
            for pool, table in zip(self.pools, self.tables, strict=True):
                for head_group in range(table.shape[1]):
                    page = int(table[stream.table_row, head_group, block])
                    if page >= 0:
                        pool.publish(page, _with_head(key, head_group))
        stream.published = full

    def _drop_unseen(self, stream: Stream) -> None:
        """Give back blocks that lie wholly between the sinks and every later row's window."""
        for group, spec in enumerate(self.layout.groups):
            if spec.window is None:
                continue
            start = max(stream.first_block[group], -(-spec.sinks // PAGE_SIZE))
            end = (stream.computed - spec.window + 1) // PAGE_SIZE
            for block in range(start, end):
                self._drop_block(group, stream.table_row, block)
            stream.first_block[group] = max(start, end)

    def _find_prefix(self, stream: Stream) -> tuple[list[list[list[int] | None]], int]:
        """Per layer group the pages of each leading block, and the blocks at which all resume."""
        found: list[list[list[int] | None]] = [[] for _ in self.pools]
        length = 0
        for block in range((len(stream.tokens) - 1) // PAGE_SIZE):
            key = self._key(stream, block)
            for group, pool in enumerate(self.pools):
                found[group].append(self._find_block(pool, group, key))
            if any(
                spec.window is None and blocks[block] is None
                for spec, blocks in zip(self.layout.groups, found, strict=True)
            ):
                break
            length = block + 1
        points = [self._resume_points(group, blocks) for group, blocks in enumerate(found)]
        while not all(can_resume[length] for can_resume in points):
            length -= 1
        return found, length

    def _find_block(self, pool: PagePool, group: int, key: bytes) -> list[int] | None:
        pages = []
        for head_group in range(self.layout.groups[group].head_groups):
            page = pool.lookup(_with_head(key, head_group))
            if page is None:
                return None
            pages.append(page)
        return pages

    def _needed(self, group: int, block: int, length: int) -> bool:
        """Whether a row at position ``length * PAGE_SIZE`` or later can see into the block."""
        spec = self.layout.groups[group]
        if spec.window is None or block * PAGE_SIZE < spec.sinks:
            return True
        return (block + 1) * PAGE_SIZE > length * PAGE_SIZE - spec.window + 1

    def _resume_points(self, group: int, found: list[list[int] | None]) -> list[bool]:
        """For each number of leading blocks whether all that is needed behind them was found."""
        spec = self.layout.groups[group]
        tail = len(found) if spec.window is None else -(-(spec.window - 1) // PAGE_SIZE)
        points, run, sinks_found = [True], 0, True
        for block, pages in enumerate(found):
            run = 0 if pages is None else run + 1
            sinks_found &= pages is not None or block * PAGE_SIZE >= spec.sinks
            points.append(sinks_found and run >= min(tail, block + 1))
        return points


def _with_head(key: bytes, head_group: int) -> bytes:
    return key if head_group == 0 else key + head_group.to_bytes(2, "little")
