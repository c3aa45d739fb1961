"""Pages and their ledger: every page has exactly one state and, when held, known owners."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class LedgerReport:
    """Differences between what the pool believes and what the owners hold; empty when sound."""

    leaked: list[int]
    """Pages whose reference count is above the number of owners."""
    stolen: list[int]
    """Pages that owners use more often than the count says: two writers could meet there."""
    misfiled: list[int]
    """Pages that are free and held at once, or in no list at all."""

    def __bool__(self) -> bool:
        return bool(self.leaked or self.stolen or self.misfiled)


class PagePool:
    """Page ids of one layer group. A page is *free*, *cached* or *held*, never two of them.

    Free: content meaningless. Cached: nobody refers to it, but the prefix index can still find
    its content; taken back in least-recently-used order when free pages run out. Held: referred
    to by ``references[page]`` page-table entries. free + cached + held = total, always.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, bytes] = OrderedDict()  # page -> key, oldest first
        self._key: dict[int, bytes] = {}  # page -> key under which it is indexed (held or cached)
        self._index: dict[bytes, int] = {}  # key -> page
        self.evictions = 0

    @property
    def num_available(self) -> int:
        """Pages that ``take`` can hand out: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_available

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds but the prefix index can still find."""
        return len(self._cached)

    def take(self) -> int:
        """A page with one reference and no content. Raises ``IndexError`` if none is left."""
        if self._free:
            page = self._free.pop()
        elif self._cached:
            page, key = self._cached.popitem(last=False)
            del self._key[page], self._index[key]
            self.evictions += 1
        else:
            raise IndexError("page pool is empty")
        self.references[page] = 1
        return page

    def share(self, page: int) -> int:
        """One more reference to a held or cached page."""
        if self.references[page] == 0:
            del self._cached[page]  # KeyError here = somebody shares a free page
        self.references[page] += 1
        return page

    def drop(self, page: int) -> None:
        """One reference less; the last one turns the page cached (if indexed) or free."""
        count = self.references[page] - 1
        if count < 0:
            raise RuntimeError(f"page {page} is dropped more often than it was taken")
        self.references[page] = count
        if count == 0:
            key = self._key.get(page)
            if key is None:
                self._free.append(page)
            else:
                self._cached[page] = key

    def publish(self, page: int, key: bytes) -> None:
        """Index a held page by its content. A key that is taken keeps its first page."""
        if key not in self._index and page not in self._key:
            self._index[key] = page
            self._key[page] = key

    def lookup(self, key: bytes) -> int | None:
        """The page with this content, if one is held or cached."""
        return self._index.get(key)

    def forget(self) -> None:
        """Drop the whole index: cached pages become free, held ones private."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._key.clear()
        self._index.clear()

    def audit(self, owned: Iterable[int]) -> LedgerReport:
        """Compare reference counts with ``owned``: every page-table entry of every owner."""
        owners = Counter(owned)
        report = LedgerReport([], [], [])
        free = Counter(self._free)
        for page in range(self.num_pages):
            count = self.references[page]
            lists = free[page] + (page in self._cached) + (count > 0)
            if lists != 1:
                report.misfiled.append(page)
            if count > owners[page]:
                report.leaked.append(page)
            elif count < owners[page]:
                report.stolen.append(page)
        return report

    def heal(self, owned: Iterable[int]) -> int:
        """Make the books agree with what the owners hold; returns the pages given back."""
        owners = Counter(owned)
        healed = sum(count > owners[page] == 0 for page, count in enumerate(self.references))
        self.references = [owners[page] for page in range(self.num_pages)]
        for page in owners:
            self._cached.pop(page, None)
        # what is lost joins the free pages, or the cached ones (as the youngest) if it is indexed
        free = set(self._free)
        for page, count in enumerate(self.references):
            if count == 0 and page not in free and page not in self._cached and page in self._key:
                self._cached[page] = self._key[page]
        kept = self._cached.keys() | owners.keys()
        self._free = [page for page in dict.fromkeys(self._free) if page not in kept]
        known = kept | set(self._free)
        self._free.extend(page for page in range(self.num_pages) if page not in known)
        return healed
