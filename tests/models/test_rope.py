"""Rotary frequencies against transformers, at the sizes of real checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hasten.models.facts import CheckpointError, Facts
from hasten.models.layers import Rope, RopeFacts, rope_facts

LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}


@pytest.mark.parametrize("head_dim", [64, 128, 20])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        LLAMA31,
        {**LLAMA31, "factor": 32.0},
        YARN,
        {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {**YARN, "attention_factor": 0.7},
        {**YARN, "mscale": 0.8, "mscale_all_dim": 1.0, "factor": 40.0},
        {**YARN, "original_max_position_embeddings": 16},  # the ramp is empty
    ],
)
def test_frequencies(rope: dict[str, Any], head_dim: int) -> None:
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=131072, rope_parameters=rope)
    expected, magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    ours = rope_facts(Facts({"rope_parameters": rope}, "config.json"), head_dim)
    torch.testing.assert_close(torch.tensor(ours.frequencies), expected, rtol=1e-6, atol=0)
    assert ours.magnitude == pytest.approx(magnitude)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 4096,
    "short_factor": [1 + i / 16 for i in range(48)],
    "long_factor": [1 + i for i in range(48)],
}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        LLAMA31,
        YARN,
        LONGROPE,
        {**LONGROPE, "factor": 8.0},
        {**LONGROPE, "factor": 0.5},
        {**LONGROPE, "attention_factor": 1.3},
    ],
)
@pytest.mark.parametrize("longest", [None, 4096, 4097])
def test_partial_rotation_and_factors_for_long_texts(
    rope: dict[str, Any], longest: int | None
) -> None:
    """Three quarters of a head of 128 turn, as in Phi 4 mini."""
    share = {"partial_rotary_factor": 0.75}
    config = LlamaConfig(
        head_dim=128, max_position_embeddings=131072, rope_parameters={**rope, **share}
    )
    expected, magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, seq_len=longest or 131072)
    stated = {"max_position_embeddings": 131072, "rope_scaling": rope, **share}
    ours = rope_facts(Facts(stated, "config.json", longest), 128, partial=True)
    assert len(ours.frequencies) == 48
    torch.testing.assert_close(torch.tensor(ours.frequencies), expected, rtol=1e-6, atol=0)
    assert ours.magnitude == pytest.approx(magnitude)
    outside = {**stated, "original_max_position_embeddings": 4096, "rope_scaling": {**rope}}
    outside["rope_scaling"].pop("original_max_position_embeddings", None)
    if rope["rope_type"] == "longrope":  # where Phi 3 states it; "su" is its older name
        outside["rope_scaling"]["type"] = "su"
        del outside["rope_scaling"]["rope_type"]
        assert rope_facts(Facts(outside, "config.json", longest), 128, partial=True) == ours


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"short_factor": [1.0] * 47}, "'short_factor' must list 48 positive numbers"),
        ({"short_factor": [1.0] * 47 + [0.0]}, "'short_factor'"),
        ({"short_factor": [1.0] * 47 + [float("nan")]}, "'short_factor'"),
        ({"short_factor": [1.0] * 47 + [10**400]}, "'short_factor'"),
        ({"short_factor": None}, "'short_factor'"),
        ({"original_max_position_embeddings": None}, "'original_max_position_embeddings' is"),
        ({"original_max_position_embeddings": 1}, "must lie in"),
        ({"partial_rotary_factor": 1.5}, "must not exceed 1"),
        ({"partial_rotary_factor": 0.001}, "even head_dim"),
    ],
)
def test_senseless_factors_are_refused(changes: dict[str, Any], words: str) -> None:
    stated = {**LONGROPE, "partial_rotary_factor": 0.75, **changes}
    facts = Facts({"rope_parameters": stated}, "config.json", longest=64)
    with pytest.raises(CheckpointError, match=words):
        rope_facts(facts, 128, partial=True)


def test_tables_are_bounded() -> None:
    """A config.json of a few bytes must not ask for gigabytes of angles."""
    with pytest.raises(CheckpointError, match="an even head_dim up to 1024"):
        rope_facts(Facts({}, "config.json"), 65_536)


def test_rows_do_not_change_as_the_tables_grow() -> None:
    facts = RopeFacts(tuple(10000.0 ** (-i / 10) for i in range(10)), 1.1)
    grown, at_once = Rope(facts), Rope(facts)
    first = [table.clone() for table in grown.tables(7)]
    for length in (100, 2049, 3000, 5000):
        cos, sin = grown.tables(length)
        assert len(cos) == len(sin) >= length
        assert torch.equal(cos[: len(first[0])], first[0])
        assert torch.equal(sin[: len(first[1])], first[1])
    for one, other in zip(grown.tables(1), at_once.tables(5000), strict=True):
        assert torch.equal(one, other)
    position, pair = 4999, 3
    angle = torch.tensor(position * facts.frequencies[pair]).double()
    assert grown.tables(5000)[0][position, pair] == pytest.approx(
        float(angle.cos() * 1.1), abs=1e-3
    )
