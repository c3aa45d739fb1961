"""Weights as int8: what a model that was rounded at load computes."""

from __future__ import annotations

import importlib

import pytest
import torch

from hasten.kernels.linear import Int8Weight, PackedWeight, unpack
from hasten.stack import Stack, with_weights
from hasten.weights.base import Matrix
from tests.conftest import RandomWeights, tiny_facts

INT8 = Stack.parse("weights=int8")["weights"]


def test_a_matrix_moves_by_half_a_code_at_most() -> None:
    source = RandomWeights(0, 0.25, INT8)
    wanted = Matrix({"a": 40, "b": 24}, 48)
    weight = INT8.matrix(source, wanted)
    assert isinstance(weight, Int8Weight)
    values = torch.cat(
        [source.get(f"{name}.weight", (n, 48)) for name, n in (("a", 40), ("b", 24))]
    )
    amax = values.abs().amax(1, keepdim=True)
    assert ((unpack(weight) - values).abs() <= 0.09 * amax).all()  # the shortest clip cuts 8 %
    off = (unpack(weight) - values).square().sum(1, keepdim=True)
    assert (off <= 48 * (amax / 127).square() / 4).all()


def test_routers_stay() -> None:
    source = RandomWeights(0, 0.25, INT8)
    weight = INT8.matrix(source, Matrix({"gate": 5}, 48, "router"))
    assert isinstance(weight, PackedWeight)
    assert torch.equal(unpack(weight), source.get("gate.weight", (5, 48)))


def test_another_function_belongs_to_the_baseline() -> None:
    stack = Stack.parse("weights=int8,draft=prompt-lookup")
    assert str(stack.baseline()) == "weights=int8" and stack.exact == "lossy"


def test_the_short_form() -> None:
    assert with_weights(None, None) is None
    assert with_weights("draft=prompt-lookup", "int8") == "draft=prompt-lookup,weights=int8"
    assert with_weights(None, "bf16") == "weights=checkpoint(dtype=bfloat16)"


def test_a_value_that_has_no_code_names_its_tensor() -> None:
    source = RandomWeights(0, float("inf"), INT8)
    with pytest.raises(ValueError, match=r"tensor a\.weight: a weight is infinite"):
        INT8.matrix(source, Matrix({"a": 40}, 48))


def test_a_model_is_built_of_it() -> None:
    module = importlib.import_module("hasten.models.llama")
    config = module.configure(tiny_facts("llama"), torch.float32)
    model = module.Model(config, RandomWeights(0, 0.25, INT8))
    assert isinstance(model.layers[0].attention.qkv.weight, Int8Weight)
    assert isinstance(model.embedding, Int8Weight)
    hidden = model.embed(torch.tensor([3, 5]))
    assert model.head(hidden).shape == (2, 61)
