"""Tables of tenants: apart from each other, and no more than the limit."""

from __future__ import annotations

from hasten.speculation.tenants import TenantTables


def test_each_tenant_has_its_own() -> None:
    tables = TenantTables[list[int]](list, 2)
    tables["a"].append(1)
    assert tables["b"] == [] and tables["a"] == [1]


def test_the_longest_unused_is_given_up() -> None:
    tables = TenantTables[list[int]](list, 2)
    for tenant in "ab":
        tables[tenant].append(1)
    assert tables["a"] == [1]
    assert tables["c"] == [] and len(tables) == 2
    assert tables["a"] == [1]
    assert tables["b"] == []
