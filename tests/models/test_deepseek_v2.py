"""DeepSeek-V2 beside what all architectures are tested for: its cache, its settings, refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as published_code

from hasten import _native
from hasten.cache.layout import PAGE_SIZE
from hasten.engine.engine import Engine, EngineConfig
from hasten.models.deepseek_v2 import Config, configure
from hasten.models.facts import CheckpointError, Facts
from hasten.models.loading import load_model
from hasten.stack import Stack
from tests.cache.codecs.test_native import logprobs
from tests.kernels.common import machines
from tests.models.drive import chunked, whole
from tests.models.tiny import YARN, edit

Checkpoint = Callable[[str], tuple[Path, Any]]

# config.json of DeepSeek-V2-Lite, without what does not concern the function computed
LITE = {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "eos_token_id": 100001,
    "bos_token_id": 100000,
}
# what is different in DeepSeek-V2
LARGE = {
    **LITE,
    "hidden_size": 5120,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 160,
    "topk_method": "group_limited_greedy",
    "n_group": 8,
    "topk_group": 3,
    "routed_scaling_factor": 16.0,
}


def configured(stated: dict[str, Any], **changes: Any) -> Config:
    return configure(Facts({**stated, **changes}, "config.json"), torch.bfloat16)


@pytest.fixture
def default_machine() -> Iterator[None]:
    isa, threads = _native.get_isa(), _native.get_num_threads()
    yield
    _native.set_isa(isa)
    _native.set_num_threads(threads)


@pytest.mark.parametrize(("stated", "ratio"), [(LITE, 80 / 9), (LARGE, 640 / 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_position_costs_its_latent_and_its_rotated_key(
    stated: dict[str, Any], ratio: float, dtype: torch.dtype
) -> None:
    """576 numbers a layer: 8.9 times less than keys and values of 16 heads, 71 of 128 heads."""
    config = configured(stated)
    layout = config.kv_layout(dtype)
    position = layout.block_bytes() / PAGE_SIZE / config.num_layers
    assert position == (512 + 64) * dtype.itemsize
    plain = config.num_heads * (128 + 64 + 128) * dtype.itemsize
    assert plain / position == pytest.approx(ratio)


def test_an_engine_allocates_no_more_than_that(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint("deepseek_v2")
    engine = Engine(
        load_model(folder),
        Stack.parse("codec=native(dtype=bfloat16)"),
        EngineConfig(max_sequences=2, max_length=64, kv_bytes=1 << 30),
    )
    storage = engine.executor.runner.storage  # type: ignore[attr-defined]
    held = sum(pages.nbytes for pages in [*storage.k, *storage.v])
    positions = storage.num_pages[0] * PAGE_SIZE
    assert held == positions * 3 * (20 + 6) * 2


def test_latents_in_every_form_of_page(checkpoint: Checkpoint) -> None:
    """Keys before the rotation give the same bits, int8 pages close ones, whatever the chunks."""
    model = load_model(checkpoint("deepseek_v2-groups")[0])
    model.sampling_defaults = {"temperature": 0.0}
    exact = logprobs(model, "codec=native", 64)
    assert logprobs(model, "codec=native(keys=pre-rope)", 64) == exact
    for stack in ("codec=int8", "codec=int8(keys=pre-rope)"):
        coded = logprobs(model, stack, 64)
        assert coded != exact and logprobs(model, stack, 7) == coded
        off = [abs(a - b) for a, b in zip(exact[:44], coded[:44], strict=True)]
        assert sum(off) / 44 < 0.1  # one alone may be off by more, where experts change


@pytest.mark.parametrize("stated", [LITE, LARGE])
def test_published_settings(stated: dict[str, Any]) -> None:
    """Frequencies, temperatures, experts as the code of transformers reads them."""
    config, reference = configured(stated), DeepseekV2Config(**stated)
    rotary = published_code.DeepseekV2RotaryEmbedding(reference)
    torch.testing.assert_close(
        torch.tensor(config.rope.frequencies), rotary.inv_freq, rtol=1e-6, atol=0
    )
    assert config.rope.magnitude == pytest.approx(rotary.attention_scaling)
    scale = published_code.yarn_apply_mscale(reference.rope_parameters, 192**-0.5)
    assert config.scale == pytest.approx(scale) and scale > 192**-0.5
    assert (config.q_rank, config.shared_experts) == (reference.q_lora_rank, 2)
    assert config.routed_scale == reference.routed_scaling_factor
    limited = reference.topk_method == "group_limited_greedy"
    assert (config.groups, config.top_groups) == ((8, 3) if limited else (1, 1))
    plain = configured(stated, rope_scaling=None)
    assert (plain.scale, plain.rope.magnitude) == (192**-0.5, 1.0)


def test_yarn_in_the_spelling_of_transformers_4(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, _ = checkpoint("deepseek_v2-groups")
    shutil.copytree(folder, tmp_path / "copy")
    yarn = {"type": "yarn", "mscale": 0.9, "mscale_all_dim": 0.707}
    yarn |= {key: YARN[key] for key in ("factor", "original_max_position_embeddings")}
    edit(
        tmp_path / "copy" / "config.json",
        rope_parameters=None,
        rope_theta=YARN["rope_theta"],
        rope_scaling=yarn,
        head_dim=None,
        qk_head_dim=None,
    )
    text = list(range(90))
    assert torch.equal(whole(load_model(tmp_path / "copy"), text), whole(load_model(folder), text))


def test_the_same_bits_on_every_machine(checkpoint: Checkpoint, default_machine: None) -> None:
    model = load_model(checkpoint("deepseek_v2-groups")[0])
    text = [i * 7 % 97 for i in range(75)]
    expected = whole(model, text)
    for machine in machines():
        assert torch.equal(whole(model, text), expected), machine
        assert torch.equal(chunked(model, text, [40, 1, 3]), expected), machine


def test_every_matrix_is_counted_once(checkpoint: Checkpoint) -> None:
    """The up-projection of the latents is held as two grouped weights."""
    folder, reference = checkpoint("deepseek_v2-groups")
    model = load_model(folder)
    matrices = sum(p.numel() for p in reference.parameters() if p.ndim > 1)
    assert model.parameters == matrices


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"topk_method": "noaux_tc"}, "'topk_method' is 'noaux_tc'.*'group_limited_greedy' only"),
        ({"scoring_func": "sigmoid"}, "'scoring_func' is 'sigmoid'"),
        ({"norm_topk_prob": True}, "'norm_topk_prob' is True"),
        ({"rope_interleave": False}, "'rope_interleave' is False"),
        ({"moe_layer_freq": 2}, "'moe_layer_freq' is 2"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ({"n_group": 7}, "'n_group' 7 does not divide 160 experts"),
        ({"topk_group": 9}, "'topk_group' must lie in"),
        ({"topk_group": None}, "'topk_group' is missing"),
        ({"num_experts_per_tok": 61}, "'num_experts_per_tok' must lie in .1, 60."),
        ({"num_experts_per_tok": None}, "'num_experts_per_tok' is missing"),
        ({"qk_rope_head_dim": 63}, "an even head_dim"),
        ({"kv_lora_rank": 0}, "'kv_lora_rank' must lie in"),
        ({"q_lora_rank": "none"}, "'q_lora_rank' must be an integer"),
        ({"v_head_dim": 10**9}, "'v_head_dim' must lie in"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "'factor' must be a positive"),
    ],
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        configured(LARGE, **changes)
