"""What drafters learn, kept apart by tenant."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Table = TypeVar("Table")


class TenantTables(Generic[Table]):
    """One table a tenant, made at its first use; nothing that one taught shows in another's.

    Beyond ``limit`` tenants, the one whose table was not used for longest starts anew when it
    comes back, so that memory is bounded by ``limit`` tables.
    """

    def __init__(self, make: Callable[[], Table], limit: int) -> None:
        self._make = make
        self._limit = limit
        self._tables: OrderedDict[str, Table] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tables)

    def __getitem__(self, tenant: str) -> Table:
        table = self._tables.pop(tenant, None)
        if table is None:
            while len(self._tables) >= self._limit:
                self._tables.popitem(last=False)
            table = self._make()
        self._tables[tenant] = table
        return table
