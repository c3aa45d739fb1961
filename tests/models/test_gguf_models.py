"""Models read from GGUF files compute what the same checkpoints in the Hugging Face layout do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from hasten.kernels.linear import BlockWeight
from hasten.models.facts import CheckpointError
from hasten.models.gguf.architectures import facts_of
from hasten.models.gguf.blocks import EXPAND, expand
from hasten.models.gguf.file import GGUF, KINDS
from hasten.models.gguf.weights import GGUFWeights
from hasten.models.loading import load_config, load_model, locate, sampling_defaults
from tests.models.drive import chunked, whole
from tests.models.gguf_files import bfloat, blocks, convert, halved, plain
from tests.models.tiny import CONFIGS, LLAMA3, YARN, edit, randomized, sizes

TEXT = [int(token) for token in np.random.default_rng(0).integers(0, 97, 60)]

# What GGUF cannot say is left out: windows of some Qwen layers, Gemma's own scale of scores.
STATED: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": CONFIGS["llama"],
    "llama-linear": CONFIGS["llama-linear"],
    "llama-yarn": CONFIGS["llama-yarn"],
    "mistral": CONFIGS["mistral"],
    "mixtral": CONFIGS["mixtral"],
    "qwen2": lambda: Qwen2Config(
        **{k: v for k, v in sizes(hidden_size=60).items() if k != "head_dim"}
    ),
    "qwen3": CONFIGS["qwen3"],
    "qwen3_moe": CONFIGS["qwen3_moe"],
    "gemma2": lambda: Gemma2Config(
        **sizes(hidden_size=72, num_hidden_layers=4, vocab_size=300, sliding_window=8),
        query_pre_attn_scalar=12,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=1.0,
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **sizes(hidden_size=72, vocab_size=300, num_hidden_layers=7),
        sliding_window=8,
        query_pre_attn_scalar=12,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "phi3": CONFIGS["phi3"],
    "phi3-longrope": CONFIGS["phi3-longrope"],
    "olmo2": CONFIGS["olmo2"],
}


def wide(**changes: Any) -> dict[str, Any]:
    """Sizes that blocks of 256 divide."""
    return sizes(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        head_dim=32,
        **changes,
    )


def saved(config: PretrainedConfig, folder: Path) -> Path:
    randomized(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", STATED)
def test_float32_file_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    folder = saved(STATED[name](), tmp_path / "hf")
    model = load_model(convert(folder, tmp_path / "m.gguf"))
    assert model.config.dtype is torch.float32
    expected = load_model(folder)
    assert torch.equal(whole(model, TEXT), whole(expected, TEXT))
    assert model.config.windows == expected.config.windows
    assert model.config.eos_ids == expected.config.eos_ids


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("deepseek_v2")])
def test_latent_attention(name: str, absorbed: bool, tmp_path: Path) -> None:
    config = CONFIGS[name]()
    config.attention_bias = config.mlp_bias = False  # GGUF has no names for these
    if "mscale" in config.rope_parameters:  # nor for one that is not mscale_all_dim
        config.rope_parameters["mscale"] = config.rope_parameters["mscale_all_dim"]
    folder = saved(config, tmp_path / "hf")
    model = load_model(convert(folder, tmp_path / "m.gguf", absorbed=absorbed))
    assert torch.equal(whole(model, TEXT), whole(load_model(folder), TEXT))


def test_llama3_scaling_is_read_from_its_divisors(tmp_path: Path) -> None:
    """The file holds them rounded to float32, so frequencies may differ in the last bit."""
    config = LlamaConfig(**sizes(rope_parameters=LLAMA3, tie_word_embeddings=True))
    folder = saved(config, tmp_path / "hf")
    model, expected = load_model(convert(folder, tmp_path / "m.gguf")), load_model(folder)
    torch.testing.assert_close(
        torch.tensor(model.config.rope.frequencies),
        torch.tensor(expected.config.rope.frequencies),
        rtol=3e-7,
        atol=0,
    )
    torch.testing.assert_close(whole(model, TEXT), whole(expected, TEXT), atol=1e-4, rtol=0)
    unscaled = load_model(folder).config
    edit(folder / "config.json", rope_parameters={**LLAMA3, "rope_type": "default"})
    assert not torch.allclose(whole(load_model(folder), TEXT), whole(expected, TEXT), atol=1e-2)
    assert unscaled.rope == expected.config.rope


def twin_of(folder: Path, twin: dict[str, torch.Tensor], to: Path) -> Path:
    """A checkpoint in the Hugging Face layout that holds the values as the file stores them."""
    shutil.copytree(folder, to)
    save_file({name: t.contiguous() for name, t in twin.items()}, to / "model.safetensors")
    return to


QUANTIZED = {
    "Q8_0": blocks(Type.Q8_0),
    "Q4_0": blocks(Type.Q4_0),
    "Q5_0-Q4_1-Q5_1": blocks(Type.Q5_0, Type.Q4_1, Type.Q5_1),
    "Q4_K-Q6_K-Q5_K": blocks(Type.Q4_K, Type.Q6_K, Type.Q5_K, Type.Q8_0),
    "F16": halved,
    "BF16": bfloat,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", QUANTIZED)
def test_blocks_give_the_bits_of_their_values(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Llama, whose rows are reordered, expanded, against a checkpoint of the values that the
    `gguf` package reads from the same blocks."""
    folder = saved(LlamaConfig(**wide()), tmp_path / "hf")
    twin: dict[str, torch.Tensor] = {}
    file = convert(folder, tmp_path / "m.gguf", QUANTIZED[name], twin=twin)
    model = load_model(file, dtype=dtype)
    assert model.config.dtype is dtype
    expected = load_model(twin_of(folder, twin, tmp_path / "twin"), dtype=dtype)
    logits = whole(model, TEXT)
    assert logits.isfinite().all() and torch.equal(logits, whole(expected, TEXT))


KEPT = {
    "Q8_0": blocks(Type.Q8_0),
    "Q4_0": blocks(Type.Q4_0),
    # query, key and value of different types, one of which is expanded
    "Q4_K-Q6_K-Q5_K-Q8_0": blocks(Type.Q4_K, Type.Q6_K, Type.Q5_K, Type.Q8_0),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", KEPT)
def test_a_file_keeps_its_blocks(name: str, tied: bool, tmp_path: Path) -> None:
    """By default: about the bytes of the file, logits near those of the expanded values, and the
    same bits whole, token by token and in chunks."""
    folder = saved(LlamaConfig(**wide(tie_word_embeddings=tied)), tmp_path / "hf")
    file = convert(folder, tmp_path / "m.gguf", KEPT[name])
    model = load_model(file)
    held = [layer.attention.qkv.weight for layer in model.layers]
    held += [layer.mlp.down.weight for layer in model.layers] + [model.output.weight]
    parts = [part for w in held for part in getattr(w, "parts", (w,))]
    kinds = {part.kind for part in parts if isinstance(part, BlockWeight)}
    assert kinds and kinds <= set(name.split("-"))
    assert (model.output.weight is model.embedding) == tied
    logits, expected = whole(model, TEXT), whole(load_model(file, dtype=torch.float32), TEXT)
    assert logits.isfinite().all() and not torch.equal(logits, expected)
    spread = (logits - expected).norm() / expected.norm()
    assert spread < 0.1, spread  # random weights; what is unrelated differs by more than 1
    for width in (1, 7):
        assert torch.equal(chunked(model, TEXT, [width]), logits)


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**wide(num_local_experts=3)),
        Qwen3MoeConfig(
            **wide(num_experts=3, num_experts_per_tok=2),
            moe_intermediate_size=256,
            norm_topk_prob=True,
        ),
        Gemma2Config(**wide(), query_pre_attn_scalar=32, sliding_window=8),
    ],
    ids=lambda config: config.model_type,
)
def test_blocks_of_experts_and_of_gemma(config: PretrainedConfig, tmp_path: Path) -> None:
    folder = saved(config, tmp_path / "hf")
    twin: dict[str, torch.Tensor] = {}
    file = convert(folder, tmp_path / "m.gguf", blocks(Type.Q8_0), twin=twin)
    expected = load_model(twin_of(folder, twin, tmp_path / "twin"), dtype=torch.bfloat16)
    model = load_model(file, dtype=torch.bfloat16)
    assert torch.equal(whole(model, TEXT), whole(expected, TEXT))
    kept, exact = whole(load_model(file), TEXT), whole(load_model(file, dtype=torch.float32), TEXT)
    assert (kept - exact).norm() / exact.norm() < 0.1  # a router may choose another expert


@pytest.mark.parametrize("kind", EXPAND)
def test_values_of_blocks_bit_for_bit(kind: str) -> None:
    """Random bytes, infinite and undefined scales among them, against the `gguf` package."""
    number = Type[kind]
    rng = np.random.default_rng(5)
    raw = rng.integers(0, 256, (6, 501, KINDS[number].bytes), np.uint8)
    with np.errstate(invalid="ignore"):
        expected = gguf.quants.dequantize(raw.reshape(6, -1), number)
    found = expand(KINDS[number], torch.from_numpy(raw.reshape(6, -1)), torch.float32).numpy()
    undefined = np.isnan(expected)
    assert np.array_equal(undefined, np.isnan(found)) and undefined.mean() < 0.1
    assert np.array_equal(expected.view(np.uint32)[~undefined], found.view(np.uint32)[~undefined])


def test_types_have_the_sizes_of_the_package() -> None:
    for number, kind in KINDS.items():
        assert gguf.GGML_QUANT_SIZES[Type(number)] == (kind.values, kind.bytes)
        assert Type(number).name == kind.name


def test_raw_blocks_are_the_stored_rows_in_the_order_of_the_layout(tmp_path: Path) -> None:
    folder = saved(LlamaConfig(**wide()), tmp_path / "hf")
    twin: dict[str, torch.Tensor] = {}
    file = GGUF(convert(folder, tmp_path / "m.gguf", blocks(Type.Q4_0), twin=twin))
    weights = GGUFWeights(file, facts_of(file), torch.float32)
    for part, rows in {"q_proj": 8 * 32, "k_proj": 2 * 32, "v_proj": 2 * 32}.items():
        name = f"model.layers.1.self_attn.{part}.weight"
        kind, stored = weights.blocks(name, (rows, 256))
        assert kind.name == "Q4_0" and stored.shape == (rows, 256 // 32 * 18)
        values = gguf.quants.dequantize(stored.numpy(), Type.Q4_0)
        assert np.array_equal(values, twin[name].numpy())
        assert torch.equal(weights.get(name, (rows, 256)), twin[name])
    with pytest.raises(CheckpointError, match=r"'blk\.1\.attn_v\.weight' has shape"):
        weights.get(name, (rows, 128))
    with pytest.raises(CheckpointError, match=r"'blk\.7\.attn_v\.weight'\) is missing"):
        weights.get("model.layers.7.self_attn.v_proj.weight", (rows, 256))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_close_to_what_transformers_reads_from_the_file(name: str, tmp_path: Path) -> None:
    configs = {"llama": LlamaConfig(**wide()), "qwen2": Qwen2Config(**wide())}
    folder = saved(configs[name], tmp_path / "hf")
    file = convert(folder, tmp_path / "m.gguf", blocks(Type.Q8_0))
    reference = AutoModelForCausalLM.from_config(configs[name]).eval()
    read = load_gguf_checkpoint(file, return_tensors=True, model_to_load=reference)["tensors"]
    missing, unexpected = reference.load_state_dict(read, strict=False)
    assert not missing and not unexpected
    with torch.inference_mode():
        expected = reference(torch.tensor([TEXT])).logits[0]
    found = whole(load_model(file, dtype=torch.float32), TEXT)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_split_file(tmp_path: Path) -> None:
    folder = saved(LlamaConfig(**sizes()), tmp_path / "hf")
    single = load_model(convert(folder, tmp_path / "m.gguf"))
    parts = tmp_path / "parts"
    parts.mkdir()
    convert(folder, parts / "m.gguf", split_max_tensors=9)
    files = sorted(parts.iterdir())
    assert len(files) == 4
    assert locate(parts) == files[0]
    assert torch.equal(whole(load_model(parts), TEXT), whole(single, TEXT))
    with pytest.raises(CheckpointError, match="a later part"):
        load_model(files[1])
    files[2].rename(files[2].with_name("elsewhere"))
    with pytest.raises(CheckpointError, match=r"-00003-of-00004\.gguf is missing"):
        load_model(files[0])


def test_metadata_that_would_change_the_result_are_refused(tmp_path: Path) -> None:
    folder = saved(LlamaConfig(**sizes(num_hidden_layers=1)), tmp_path / "hf")

    def refused(what: str, change: Callable[[gguf.GGUFWriter], None]) -> None:
        file = convert(folder, tmp_path / "m.gguf", edit=change)
        with pytest.raises(CheckpointError, match=what):
            load_config(file, torch.float32)

    refused("logit_scale", lambda writer: writer.add_logit_scale(0.5))
    refused("attention.scale", lambda writer: writer.add_attention_scale(0.1))
    refused("attn_factor", lambda writer: writer.add_rope_scaling_attn_factors(1.2))
    refused("clamp_kqv", lambda writer: writer.add_clamp_kqv(8.0))
    refused(
        "rope.dimension_count",
        lambda w: w.kv_data[0].pop("llama.rope.dimension_count") and w.add_rope_dimension_count(6),
    )
    refused("rope.scaling.type", lambda w: w.add_string("llama.rope.scaling.type", "odd"))

    def other(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0]["general.architecture"].value = "mamba"

    refused("'mamba', which cannot be loaded", other)


def test_longrope_belongs_to_no_one_architecture(tmp_path: Path) -> None:
    folder = saved(LlamaConfig(**sizes(num_hidden_layers=1)), tmp_path / "hf")

    def change(writer: gguf.GGUFWriter) -> None:
        for name, first in (("long", 2.0), ("short", 1.0)):
            half = writer.kv_data[0]["llama.rope.dimension_count"].value // 2
            values = first + np.arange(half, dtype=np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", values)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(16)

    plain_rope = load_config(convert(folder, tmp_path / "a.gguf"), torch.float32).rope
    rope = load_config(convert(folder, tmp_path / "b.gguf", edit=change), torch.float32).rope
    ratio = torch.tensor(plain_rope.frequencies) / torch.tensor(rope.frequencies)
    torch.testing.assert_close(ratio, 2.0 + torch.arange(len(ratio)))
    assert rope.magnitude == 1.0

    def bare(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)

    with pytest.raises(CheckpointError, match=r"'rope_factors_long\.weight', for LongRoPE"):
        load_config(convert(folder, tmp_path / "c.gguf", edit=bare), torch.float32)


def test_the_header_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = convert(saved(LlamaConfig(**sizes()), tmp_path / "hf"), tmp_path / "m.gguf")
    opened: list[Path] = []
    start = GGUF.__init__

    def counted(self: GGUF, path: Path) -> None:
        opened.append(path)
        start(self, path)

    monkeypatch.setattr(GGUF, "__init__", counted)
    load_model(file)
    assert opened == [file]


def test_unloadable_type_is_named(tmp_path: Path) -> None:
    folder = saved(LlamaConfig(**wide()), tmp_path / "hf")

    def store(name: str, values: Any) -> Any:
        if "down_proj" not in name:
            return plain(name, values)
        return np.zeros((values.shape[0], values.shape[1] // 256 * 84), np.uint8), Type.Q2_K

    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_down\.weight' has type Q2_K"):
        load_model(convert(folder, tmp_path / "m.gguf", store))


def test_recommended_sampling_and_endings(tmp_path: Path) -> None:
    folder = saved(LlamaConfig(**sizes(num_hidden_layers=1)), tmp_path / "hf")

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_float32("general.sampling.temp", 0.6)
        writer.add_int32("general.sampling.top_k", 20)
        writer.add_eot_token_id(5)
        writer.add_token_list(["a", "<|im_end|>", "</s>"])
        writer.add_token_types([1, 3, 1])

    file = convert(folder, tmp_path / "m.gguf", edit=change)
    assert sampling_defaults(file) == {"temperature": 0.6, "top_k": 20}
    config = load_model(file).config
    assert config.eos_ids == (2, 5, 1)  # eos, eot, a control token; not the text of a plain one
    assert config.bos_id == 1


def test_where_a_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a-Q8_0.gguf"
    file.touch()
    (tmp_path / "mmproj-a.gguf").touch()
    assert locate(tmp_path) == locate(file) == file
    (tmp_path / "a-Q4_0.gguf").touch()
    with pytest.raises(CheckpointError, match="2 GGUF models here: a-Q4_0, a-Q8_0"):
        locate(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert locate(tmp_path) == tmp_path

    names = ["README.md", "x-Q4_K_M.gguf", "x-Q4_K_S.gguf", "mmproj-x-Q4_K_M.gguf"]
    names += ["big/x-Q8_0-00001-of-00002.gguf", "big/x-Q8_0-00002-of-00002.gguf", "x-IQ4_K_M.gguf"]
    asked: list[Any] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: names)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("org/x:q4_k_m@main") == tmp_path / "x-Q4_K_M.gguf"
    assert locate("org/x:Q8_0") == tmp_path / names[4]
    assert locate("org/x:x-Q4_K_S.gguf") == tmp_path / "x-Q4_K_S.gguf"
    assert asked == [
        ("org/x", "main", ["x-Q4_K_M.gguf"]),
        ("org/x", None, names[4:6]),
        ("org/x", None, ["x-Q4_K_S.gguf"]),
    ]
    with pytest.raises(CheckpointError, match="0 GGUF models of the repository are named 'Q6_K'"):
        locate("org/x:Q6_K")


def test_yarn_without_its_context_is_an_error(tmp_path: Path) -> None:
    folder = saved(LlamaConfig(**sizes(rope_parameters=YARN)), tmp_path / "hf")

    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0]["llama.rope.scaling.factor"].value = -1.0

    with pytest.raises(CheckpointError, match="'factor' must be a positive number"):
        load_model(convert(folder, tmp_path / "m.gguf", edit=change))
