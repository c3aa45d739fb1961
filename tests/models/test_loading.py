"""What is wrong with a checkpoint is told once, clearly; nothing in it is ever executed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import save_file

from hasten.models import checkpoint as reading
from hasten.models.chat_template import ChatTemplateError
from hasten.models.checkpoint import SafetensorsWeights
from hasten.models.loading import (
    CheckpointError,
    architectures,
    load_config,
    load_model,
    locate,
    sampling_defaults,
)
from hasten.models.tokenizer import Tokenizer
from tests.models.drive import whole
from tests.models.tiny import CONFIGS, edit, randomized


@pytest.fixture
def folder(checkpoint: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> Path:
    """A copy of a good Llama checkpoint, to be spoiled."""
    return Path(shutil.copytree(checkpoint("llama")[0], tmp_path / "model"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    for word in words:
        assert word in str(error.value), f"{word!r} not in: {error.value}"


def test_architectures_are_the_files() -> None:
    expected = [
        "deepseek_v2",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi3",
    ]
    assert architectures() == [*expected, "qwen2", "qwen3", "qwen3_moe"]


def test_sharded_checkpoint_equals_the_single_file(
    checkpoint: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    single, reference = checkpoint("llama")
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    text = list(range(30))
    assert torch.equal(whole(load_model(tmp_path), text), whole(load_model(single), text))


def test_memory_map_is_renewed_while_reading(folder: Path, monkeypatch: Any) -> None:
    """With a budget of one tensor every read reopens the file; the model is the same."""
    text = list(range(20))
    before = whole(load_model(folder), text)
    monkeypatch.setattr(reading, "REOPEN_BYTES", 1)
    assert torch.equal(whole(load_model(folder), text), before)


def test_peak_memory_is_the_packed_model_and_little_more(tmp_path: Path) -> None:
    """160 MB of bfloat16: the file's pages must not stay resident beside the packed weights."""
    config = CONFIGS["llama"]()
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8}
    config.update({**sizes, "vocab_size": 1000, "num_attention_heads": 12, "head_dim": 64})
    config.save_pretrained(tmp_path)
    hidden, ffn, kv = 768, 3072, 2 * 64
    shapes = {"model.embed_tokens": (1000, hidden), "lm_head": (1000, hidden)}
    norms = ["model.norm"]
    for i in range(8):
        at = f"model.layers.{i}"
        norms += [f"{at}.input_layernorm", f"{at}.post_attention_layernorm"]
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }.items():
            shapes[f"{at}.{name}"] = shape
    weights = {f"{name}.weight": torch.ones(s, dtype=torch.bfloat16) for name, s in shapes.items()}
    weights |= {f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms}
    save_file(weights, tmp_path / "model.safetensors")
    size = sum(t.nbytes for t in weights.values())
    assert size > 130e6
    script = (
        "import resource, sys\n"
        "from hasten.models import checkpoint, loading\n"
        "import hasten.models.llama\n"
        "checkpoint.REOPEN_BYTES = 20 << 20\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\n"
        "model = loading.load_model(sys.argv[1], progress=False)\n"
        "print(peak() - before)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < size + 60e6


def test_unknown_tensors_are_mentioned(folder: Path, caplog: Any) -> None:
    extra = {**tensors(folder), "model.layers.0.self_attn.q_proj.bias": torch.zeros(72)}
    save_file(extra, folder / "model.safetensors")
    load_model(folder)
    assert "self_attn.q_proj.bias" in caplog.text


class TestRefusals:
    def test_missing_folder(self, tmp_path: Path) -> None:
        refused(tmp_path / "nowhere", "no such folder", "config.json", "org/name")

    def test_a_file_instead_of_a_folder(self, folder: Path) -> None:
        refused(folder / "config.json", "not a folder")

    def test_no_config(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        refused(folder, "no config.json", str(folder))

    @pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 100_000, "", '"x"'])
    def test_invalid_json(self, folder: Path, text: str) -> None:
        (folder / "config.json").write_bytes(text.encode("latin-1"))
        refused(folder, "JSON", "config.json")

    def test_unknown_architecture(self, folder: Path) -> None:
        for name in ("mamba", "os", "base", "../llama", "llama.Model", "", 7, ["llama"]):
            edit(folder / "config.json", model_type=name)
            refused(folder, "unknown architecture", "gemma2, gemma3, gemma3_text")
        edit(folder / "config.json", model_type=None)
        refused(folder, "unknown architecture None")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("hidden_size", "66"),
            ("hidden_size", -1),
            ("num_hidden_layers", 10**9),
            ("num_hidden_layers", True),
            ("head_dim", 10**9),
            ("head_dim", 13),
            ("num_key_value_heads", 5),
            ("rms_norm_eps", 0),
            ("rms_norm_eps", 10**400),
            ("vocab_size", 1.5),
            ("hidden_act", "gelu"),
            ("eos_token_id", "</s>"),
            ("tie_word_embeddings", "yes"),
            ("rope_parameters", [1]),
        ],
    )
    def test_senseless_values(self, folder: Path, key: str, value: Any) -> None:
        edit(folder / "config.json", **{key: value})
        (folder / "generation_config.json").unlink()
        refused(folder, key.removesuffix("_parameters"), "config.json")

    def test_a_required_value_is_missing(self, folder: Path) -> None:
        edit(folder / "config.json", vocab_size=None)
        refused(folder, "'vocab_size' is missing")

    def test_dynamic_rope_is_refused_with_the_reason(self, folder: Path) -> None:
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        edit(folder / "config.json", rope_parameters=rope)
        refused(folder, "dynamic", "current length", "yarn")
        edit(folder / "config.json", rope_parameters={"rope_type": "proportional"})
        refused(folder, "proportional", "llama3")
        edit(folder / "config.json", rope_parameters={"partial_rotary_factor": 0.5})
        refused(folder, "partial_rotary_factor", "1.0 only")

    @pytest.mark.parametrize("keep", [4, 40, 5000, -1])
    def test_truncated_weights(self, folder: Path, keep: int) -> None:
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:keep])
        refused(folder, "safetensors", "Download")

    @pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 10**8 + 1])
    def test_hostile_header_length(self, folder: Path, length: int) -> None:
        """Refused by comparing with the file's size: nothing of that length is allocated."""
        path = folder / "model.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
        refused(folder, "truncated")

    def test_hostile_offsets(self, folder: Path) -> None:
        for offsets in ([0, 2**60], [2**60, 2**60 + 4], [8, 4], [-4, 0]):
            header = {"model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}
            text = json.dumps(header).encode()
            data = len(text).to_bytes(8, "little") + text + bytes(16)
            (folder / "model.safetensors").write_bytes(data)
            refused(folder, "safetensors")

    def test_missing_shard(self, folder: Path, checkpoint: Any) -> None:
        checkpoint("llama")[1].save_pretrained(folder / "parts", max_shard_size="60KB")
        shard = sorted((folder / "parts").glob("*.safetensors"))[1]
        shard.unlink()
        refused(folder / "parts", shard.name, "missing")

    @pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "pytorch_model.bin"])
    def test_index_that_leaves_the_folder(self, folder: Path, name: str) -> None:
        index = {"weight_map": {"model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(folder, name, "not a .safetensors file of this folder")

    @pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
    def test_senseless_index(self, folder: Path, index: Any) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(folder, "weight_map")

    def test_index_that_names_the_wrong_shard(self, folder: Path) -> None:
        names = {**dict.fromkeys(tensors(folder), "model.safetensors"), "extra": "b.safetensors"}
        save_file({"extra": torch.zeros(1)}, folder / "b.safetensors")
        names["model.norm.weight"] = "b.safetensors"
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": names}))
        refused(folder, "model.norm.weight", "index")

    def test_missing_tensor(self, folder: Path) -> None:
        left = tensors(folder)
        del left["model.layers.1.mlp.up_proj.weight"]
        save_file(left, folder / "model.safetensors")
        refused(folder, "model.layers.1.mlp.up_proj.weight", "missing")

    def test_wrong_shape(self, folder: Path) -> None:
        spoiled = tensors(folder)
        name = "model.layers.2.self_attn.o_proj.weight"
        spoiled[name] = spoiled[name][:, 1:].contiguous()
        save_file(spoiled, folder / "model.safetensors")
        refused(folder, name, "[66, 71]", "[66, 72]")

    def test_wrong_dtype(self, folder: Path) -> None:
        spoiled = tensors(folder)
        spoiled["model.norm.weight"] = spoiled["model.norm.weight"].to(torch.int8)
        save_file(spoiled, folder / "model.safetensors")
        refused(folder, "model.norm.weight", "I8", "BF16")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
    def test_pickles_only(self, folder: Path, name: str) -> None:
        (folder / "model.safetensors").rename(folder / name)
        refused(folder, name, "pickle", "safetensors")

    def test_no_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        refused(folder, "no model.safetensors")

    def test_quantized(self, folder: Path) -> None:
        edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
        refused(folder, "quantized", "not supported as yet")

    def test_unloadable_dtype_argument(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="float32 or bfloat16"):
            load_model(folder, dtype=torch.float16)

    def test_hub_id_without_network(self) -> None:
        for name in ("no-such-org/no-such-model", "no-such-org/no-such-model@main"):
            with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE") as error:
                locate(name)
            assert name in str(error.value)

    def test_hub_ids_download_data_only(self, folder: Path, monkeypatch: Any) -> None:
        """Neither Python files nor pickles are asked for, nor second copies of the weights."""
        asked: dict[str, Any] = {}

        def snapshot_download(name: str, **options: Any) -> str:
            asked.update(options, name=name)
            return str(folder)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        assert locate("org/name@v1.0") == folder
        assert (asked["name"], asked["revision"]) == ("org/name", "v1.0")
        files = ["config.json", "model-00001-of-2.safetensors", "tokenizer.json", "a.jinja"]
        files += [
            "modeling.py",
            "pytorch_model.bin",
            "x.pth",
            "consolidated.safetensors",
            "o/a.json",
        ]
        kept = filter_repo_objects(
            files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
        )
        assert list(kept) == files[:4]

    def test_names_that_are_no_hub_ids(self) -> None:
        for name in ("", "a/b/c", "../../x", "org/name@", "org/na me"):
            with pytest.raises(CheckpointError):
                locate(name) if name else load_model(Path("no-such-folder"))


def test_config_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    config = load_config(folder, torch.bfloat16)
    assert (config.architecture, config.num_layers, config.head_dim) == ("llama", 3, 12)
    assert config.kv_layout(torch.bfloat16).block_bytes() > 0


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "runs False only"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "runs None only"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "'full_attention'"),
        ("gemma3_text", {"hidden_activation": "silu"}, "gelu_pytorch_tanh"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "must list 3 layers"),
        ("phi3", {"num_key_value_heads": 2}, "does not divide 3 heads"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "'short_factor' must list 15"),
        ("phi3", {"rope_parameters": {"type": "yarn"}}, "runs 'default' or 'longrope' or 'su'"),
        ("olmo2", {"hidden_act": "gelu"}, "runs 'silu' only"),
        ("olmo2", {"num_key_value_heads": 1}, "self_attn.k_norm.weight' has shape"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "must list layers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "'decoder_sparse_step' must lie in"),
        ("qwen3_moe", {"num_experts_per_tok": 8}, "'num_experts_per_tok' must lie in"),
        ("qwen3_moe", {"num_local_experts": 8}, "mlp.gate.weight' has shape"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "'moe_intermediate_size' is missing"),
    ],
)
def test_architectures_refuse_what_they_do_not_compute(
    checkpoint: Any, tmp_path: Path, name: str, changes: dict[str, Any], words: str
) -> None:
    folder = Path(shutil.copytree(checkpoint(name)[0], tmp_path / "model"))
    edit(folder / "config.json", **changes)
    refused(folder, words)


def test_windows_of_layers(checkpoint: Callable[[str], tuple[Path, Any]]) -> None:
    windows = {
        name: load_config(checkpoint(name)[0], torch.float32).windows
        for name in ("qwen2", "mistral", "gemma2", "gemma3_text", "phi3", "phi3-longrope")
    }
    assert windows == {
        "qwen2": (None, 8, 8),
        "mistral": (8, 8, 8),
        "gemma2": (8, None, 8, None),
        "gemma3_text": (8, 8, None),
        "phi3": (8, 8, 8),
        "phi3-longrope": (None, None, None),  # stated, but as long as the longest text
    }
    edited = load_config(checkpoint("gemma2")[0], torch.float32)
    assert [group.window for group in edited.kv_layout().groups] == [8, None]


def test_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [7, 9]})
    )
    expected = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert sampling_defaults(folder) == expected
    model = load_model(folder)
    assert model.sampling_defaults == expected
    assert model.config.eos_ids == (7, 9)
    edit(folder / "generation_config.json", do_sample=False, min_p=0.1, repetition_penalty=1.1)
    assert sampling_defaults(folder) == {
        **expected,
        "temperature": 0.0,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
    }
    edit(folder / "generation_config.json", top_k=-1)
    assert sampling_defaults(folder)["top_k"] == 0
    bad: dict[str, tuple[Any, ...]] = {
        "top_p": ("high", 0, 1.5),
        "top_k": (-2, 2.5, True),
        "temperature": (-0.1, float("nan")),
        "min_p": (2,),
        "repetition_penalty": (0, -1.0),
    }
    before = json.loads((folder / "generation_config.json").read_text())
    for name, values in bad.items():
        for value in values:
            edit(folder / "generation_config.json", **{**before, name: value})
            with pytest.raises(CheckpointError, match=rf"{name}.*generation_config\.json"):
                load_model(folder)
    (folder / "generation_config.json").unlink()
    assert sampling_defaults(folder) == {}
    assert load_model(folder).config.eos_ids == (2,)


def test_code_of_a_checkpoint_never_runs(
    folder: Path, tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    """A hostile repository: custom model, tokenizer and template, each trying to leave a file."""
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').write('ran')\n"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "llama", "setup"):
        (folder / f"{name}.py").write_text(code)
    edit(
        folder / "config.json",
        auto_map={
            "AutoConfig": "configuration_evil.Config",
            "AutoModelForCausalLM": "modeling_evil.Model",
        },
    )
    escapes = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ raise_exception.__globals__['json'].codecs.open('CANARY', 'w') }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ ('%s'|format)(raise_exception.__code__) }}",
        "{% set ns = namespace(__class__=1) %}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__self__ }}{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    )
    tokenizer_config = {
        "tokenizer_class": "EvilTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]},
        "chat_template": [
            {"name": f"t{i}", "template": text.replace("CANARY", str(canary))}
            for i, text in enumerate(escapes)
        ],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    monkeypatch.chdir(folder)  # so that a plain ``import llama`` would find the wrong file

    load_model(folder)
    assert "auto_map" in caplog.text
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(folder)
    from hasten.models.chat_template import ChatTemplate

    for entry in tokenizer_config["chat_template"]:
        with pytest.raises(ChatTemplateError):
            text = ChatTemplate(entry["template"]).render([{"role": "user", "content": "x"}])
            assert text == "", f"{entry['template']} gave {text}"
            raise ChatTemplateError("rendered to nothing")
    edit(folder / "config.json", model_type="evil")
    refused(folder, "never runs", "unknown architecture 'evil'")
    assert not canary.exists()


def test_weights_report_their_size(folder: Path) -> None:
    weights = SafetensorsWeights(folder, None)
    assert weights.total_bytes() == (folder / "model.safetensors").stat().st_size


def test_progress_bar_only_on_a_terminal(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    load_model(folder)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    model = load_model(folder)
    assert capsys.readouterr().out == ""
    assert torch.equal(
        whole(model, [1, 2, 3]), whole(load_model(folder, progress=False), [1, 2, 3])
    )


def test_a_saved_model_of_another_seed_differs(folder: Path) -> None:
    """Guards the comparisons above: logits do depend on the weights read."""
    randomized(CONFIGS["llama"](), seed=1).save_pretrained(folder / "other")
    text = list(range(20))
    assert not torch.allclose(
        whole(load_model(folder), text), whole(load_model(folder / "other"), text)
    )
