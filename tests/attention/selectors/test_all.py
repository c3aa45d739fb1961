"""Reading everything leaves the model's own view as it is."""

from __future__ import annotations

import pytest

from hasten.attention.selectors.all import All
from hasten.cache.layout import LayerGroup


@pytest.mark.parametrize(
    "group", [LayerGroup((0, 2)), LayerGroup((1,), window=7), LayerGroup((1,), 7, 3, 2)]
)
def test_the_view_is_the_group(group: LayerGroup) -> None:
    assert All().view(group) is group
