"""Layer groups, sizes of pages, and the tensors that hold them."""

from __future__ import annotations

import pytest
import torch

from hasten.cache.layout import PAGE_SIZE, KVLayout, KVStorage, LayerGroup, uniform_layout


def test_layers_with_equal_windows_share_a_group() -> None:
    layout = uniform_layout(5, 3, 20, [None, 8, None, 9, 8])
    assert layout.groups == (
        LayerGroup((0, 2), None),
        LayerGroup((1, 4), 8),
        LayerGroup((3,), 9),
    )
    with pytest.raises(ValueError, match="5 layers need as many windows, got 4"):
        uniform_layout(5, 3, 20, [None] * 4)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_are_those_of_the_tensors(dtype: torch.dtype, size: int) -> None:
    groups = (LayerGroup((0, 2, 3)), LayerGroup((1,), window=9, sinks=2, head_groups=3))
    layout = KVLayout(6, 20, 20, groups, dtype)
    assert layout.stored_value_dim == 32
    assert layout.page_bytes(0) == 3 * 6 * PAGE_SIZE * (20 + 32) * size
    assert layout.page_bytes(1) == 1 * 2 * PAGE_SIZE * (20 + 32) * size
    assert layout.block_bytes() == layout.page_bytes(0) + 3 * layout.page_bytes(1)
    storage = KVStorage(layout, [5, 7])
    for group, pages in enumerate((5, 7)):
        held = sum(t.numel() * t.element_size() for t in (storage.k[group], storage.v[group]))
        assert held == pages * layout.page_bytes(group)


def test_storage_of_a_layer_is_a_view_into_its_group() -> None:
    layout = KVLayout(6, 20, 20, (LayerGroup((0, 2)), LayerGroup((1,), head_groups=3)))
    storage = KVStorage(layout, [5, 7])
    k, v, group = storage.layer(2)
    assert group == 0 and k.shape == (5, 6, 20, PAGE_SIZE) and v.shape == (5, 6, PAGE_SIZE, 32)
    k[3, 1, 4, 5] = 7.0
    assert storage.k[0][1, 3, 1, 4, 5] == 7 and storage.k[0].sum() == 7
    k, v, group = storage.layer(1)
    assert group == 1 and k.shape == (7, 2, 20, PAGE_SIZE) and v.shape == (7, 2, PAGE_SIZE, 32)
    with pytest.raises(KeyError):
        storage.layer(3)


def test_page_multiples_need_no_padding() -> None:
    assert [KVLayout(1, 4, d, ()).stored_value_dim for d in (1, 16, 17, 64)] == [16, 16, 32, 64]


def test_keys_and_values_may_differ_in_size() -> None:
    layout = KVLayout(3, 20, 33, (LayerGroup((0, 1)),))
    assert layout.block_bytes() == 2 * 3 * PAGE_SIZE * (20 + 48) * 4
    k, v, _ = KVStorage(layout, [5]).layer(1)
    assert k.shape == (5, 3, 20, PAGE_SIZE) and v.shape == (5, 3, PAGE_SIZE, 48)


def test_values_in_keys_take_no_memory() -> None:
    layout = KVLayout(1, 20, 15, (LayerGroup((0, 1)),), torch.bfloat16, values_in_keys=True)
    assert layout.block_bytes() == 2 * PAGE_SIZE * 20 * 2
    storage = KVStorage(layout, [5])
    assert storage.k[0].nbytes == 5 * layout.block_bytes() and storage.v[0].nbytes == 0
    assert storage.layer(1)[1].shape == (5, 1, PAGE_SIZE, 0)


@pytest.mark.parametrize(("in_keys", "scales"), [(False, 2), (True, 1)])
def test_int8_pages_hold_scales_behind_the_keys(in_keys: bool, scales: int) -> None:
    layout = KVLayout(3, 20, 15, (LayerGroup((0, 1)),), torch.int8, values_in_keys=in_keys)
    assert layout.key_rows == 20 + 4 * scales
    assert layout.block_bytes() == 2 * 3 * PAGE_SIZE * (20 + 4 * scales + (not in_keys) * 16)
    k, v, _ = KVStorage(layout, [5]).layer(1)
    assert k.shape == (5, 3, 20 + 4 * scales, PAGE_SIZE) and k.dtype == v.dtype == torch.int8


def test_refusals() -> None:
    with pytest.raises(ValueError, match="key_space is 'raw', expected rotated or pre-rope"):
        KVLayout(2, 8, 8, (), key_space="raw")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"float32, bfloat16 or int8, not torch\.float16"):
        KVLayout(2, 8, 8, (), torch.float16)
    with pytest.raises(ValueError, match="4 KV heads cannot be split into 3 equal head groups"):
        KVLayout(4, 8, 8, (LayerGroup((0,), head_groups=3),))
    with pytest.raises(ValueError, match="keys of 8 dimensions cannot hold values of 9"):
        KVLayout(1, 8, 9, (), values_in_keys=True)
