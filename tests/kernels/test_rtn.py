"""Rounding to nearest: the kernel against its definition, on every instruction set."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from hasten import _native
from hasten.kernels.rtn import rtn_int4, rtn_int8
from tests.kernels.common import ISAS

CLIPS = (1.0, 0.9, 0.8)
KINDS = {
    "int8": lambda x, impl=None: rtn_int8(x, CLIPS, impl=impl),
    "int4": lambda x, impl=None: rtn_int4(x, 32, False, CLIPS, impl=impl),
    "int4-128": lambda x, impl=None: rtn_int4(x, 128, False, CLIPS, impl=impl),
    "asymmetric": lambda x, impl=None: rtn_int4(x, 32, True, CLIPS, impl=impl),
}


def read(rows, group: int) -> torch.Tensor:
    """What codes stand for, in float64."""
    if rows.codes.dtype is torch.int8:
        return rows.codes.double() * rows.scale[:, None].double()
    zero = 8.0 if rows.zero is None else rows.zero[..., None].double()
    parts = rows.codes.view(*rows.scale.shape, group).double()
    return ((parts - zero) * rows.scale[..., None].double()).flatten(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_its_definition(kind: str, dtype: torch.dtype) -> None:
    x = (torch.randn(37, 384) ** 3 * 0.02).to(dtype)
    x[3] = 0
    got, expected = KINDS[kind](x, "cpu"), KINDS[kind](x, "ref")
    group = 128 if kind == "int4-128" else 32
    errors = [(read(rows, group) - x.double()).square().sum() for rows in (got, expected)]
    assert errors[0] <= errors[1] * 1.00001  # equally good clips may be told apart differently
    assert (got.codes == expected.codes).float().mean() > 0.99
    assert not read(got, group)[3].any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_machine_gives_the_same_bits(kind: str) -> None:
    x = torch.randn(70, 384) ** 3
    expected = KINDS[kind](x)
    for isa in ISAS:
        _native.set_isa(isa)
        for threads in (1, 2):
            _native.set_num_threads(threads)
            got = KINDS[kind](x)
            assert torch.equal(got.codes, expected.codes)
            assert torch.equal(got.scale, expected.scale)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_rounded_alone(kind: str) -> None:
    x = torch.randn(200, 256)
    whole, one = KINDS[kind](x), KINDS[kind](x[77:78])
    assert torch.equal(whole.codes[77], one.codes[0])
    assert torch.equal(whole.scale[77], one.scale[0])


def test_the_best_clip_wins() -> None:
    x = torch.randn(64, 256)
    for kind in (
        lambda clips: rtn_int8(x, clips),
        lambda clips: rtn_int4(x, 32, False, clips),
        lambda clips: rtn_int4(x, 32, True, clips),
    ):
        errors = [(read(kind(CLIPS[:n]), 32) - x.double()).square().sum() for n in (1, 2, 3)]
        assert all(later <= earlier * 1.000001 for earlier, later in pairwise(errors))


def test_the_largest_magnitude_is_met() -> None:
    x = torch.randn(8, 64)
    rows = rtn_int4(x, 32, False, (1.0,))
    parts = x.view(8, 2, 32)
    largest = parts.abs().argmax(-1, keepdim=True)
    assert (rows.codes.view(8, 2, 32).gather(-1, largest) == 0).all()
    assert (rtn_int8(x, (1.0,)).codes.abs().amax(1) == 127).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("impl", ["cpu", "ref"])
def test_what_has_no_code_is_refused(value: float, impl: str) -> None:
    x = torch.randn(4, 64)
    x[2, 5] = value
    with pytest.raises(ValueError, match="infinite, not a number"):
        rtn_int4(x, 32, False, CLIPS, impl=impl)
