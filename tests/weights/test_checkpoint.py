"""Weights as the checkpoint has them: the choice of type."""

from __future__ import annotations

import pytest
import torch

from hasten.stack import Stack
from hasten.weights.checkpoint import Checkpoint


def test_types() -> None:
    assert Checkpoint().torch_dtype is None
    assert Checkpoint("float32").torch_dtype is torch.float32
    assert Stack.parse("weights=checkpoint(dtype=bfloat16)")["weights"].torch_dtype == (
        torch.bfloat16
    )
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of auto, float32"):
        Checkpoint("int8")


def test_another_type_is_another_function() -> None:
    """It belongs to the baseline, and so into the keys of cached prefixes."""
    stack = Stack.parse("weights=checkpoint(dtype=bfloat16),draft=prompt-lookup")
    assert str(stack.baseline()) == "weights=checkpoint(dtype=bfloat16)"
