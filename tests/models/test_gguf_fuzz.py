"""Damaged and hostile GGUF files: a `CheckpointError` or a model, within time and memory."""

from __future__ import annotations

import math
import os
import random
import resource
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.models.facts import CheckpointError
from hasten.models.gguf.architectures import ARCHITECTURES
from hasten.models.gguf.file import GGUF
from hasten.models.loading import load_config, load_model
from hasten.models.tokenizer import Tokenizer

SLACK = 4 << 20  # bytes beside four times the file: interpreter objects, regular expressions
ROOM = 96 << 20  # address space beside: torch's own buffers, rotary tables, a thread's arena


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def item(value: Any) -> tuple[int, bytes]:
    """Metadata type and bytes of a value; a tuple gives both itself."""
    if isinstance(value, tuple):
        return value
    if isinstance(value, bool):
        return 7, bytes([value])
    if isinstance(value, int):
        return 11, struct.pack("<q", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, text(value)
    parts = [item(one) for one in value]
    kind = parts[0][0] if parts else 4
    return 9, struct.pack("<IQ", kind, len(parts)) + b"".join(raw for _, raw in parts)


def container(
    metadata: dict[str, Any], tensors: dict[str, tuple[tuple[int, ...], int, int]]
) -> bytes:
    """A GGUF file; tensors are shape (row length first), type and size in bytes."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, raw = item(value)
        out += text(key) + struct.pack("<I", kind) + raw
    offset = 0
    for name, (shape, kind, size) in tensors.items():
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        offset += -(-size // 32) * 32
    out += bytes(-len(out) % 32)
    return out + random.Random(0).randbytes(offset)


BYTES = [chr(c) for c in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]]
BYTES += [chr(0x100 + i) for i in range(68)]
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "small",
    "llama.block_count": 1,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [*BYTES, "ab", "abc", "<s>", "</s>"],
    "tokenizer.ggml.token_type": [*[1] * 258, 3, 3],
    "tokenizer.ggml.merges": ["a b", "ab c"],
    "tokenizer.ggml.scores": [-1.0] * 260,
    "tokenizer.ggml.bos_token_id": 258,
    "tokenizer.ggml.eos_token_id": 259,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}
Q4_0, Q8_0, F32 = 2, 8, 0
TENSORS = {
    "token_embd.weight": ((32, 260), Q8_0, 260 * 34),
    "output_norm.weight": ((32,), F32, 128),
    "blk.0.attn_norm.weight": ((32,), F32, 128),
    "blk.0.attn_q.weight": ((32, 32), Q4_0, 32 * 18),
    "blk.0.attn_k.weight": ((32, 16), Q4_0, 16 * 18),
    "blk.0.attn_v.weight": ((32, 16), Q4_0, 16 * 18),
    "blk.0.attn_output.weight": ((32, 32), Q4_0, 32 * 18),
    "blk.0.ffn_norm.weight": ((32,), F32, 128),
    "blk.0.ffn_gate.weight": ((32, 64), Q4_0, 64 * 18),
    "blk.0.ffn_up.weight": ((32, 64), Q4_0, 64 * 18),
    "blk.0.ffn_down.weight": ((64, 32), Q4_0, 32 * 36),
}


def changed(data: bytes, rng: random.Random, header: int) -> bytes:
    """One to four random damages, most of them in the header."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(header if rng.random() < 0.9 else len(out))
        match rng.randrange(7):
            case 0:
                out[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                out[at : at + 1] = (
                    bytes([out[at] ^ 1 << rng.randrange(8)]) if at < len(out) else b""
                )
            case 2:  # a count, a length, an offset
                big = rng.choice(
                    [0, 1, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
                )
                out[at : at + 8] = struct.pack("<Q", big)
            case 3:
                kind = rng.choice([*range(42), 2**31, 2**32 - 1])
                out[at : at + 4] = struct.pack("<I", kind)
            case 4:
                del out[at : at + rng.randint(1, 64)]
            case 5:
                out[at:at] = out[at : at + rng.randint(1, 64)]
            case 6:
                out = out[: rng.randrange(len(out) + 1)]
        if not out:
            break
    return bytes(out)


def try_file(path: Path) -> bool:
    """Whether it loads. Anything but a model or a `CheckpointError` is an error, and so are more
    than a second and more than four times the file."""
    size = path.stat().st_size
    start = time.process_time()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    loads = 0
    for load in (GGUF, Tokenizer.load, lambda file: load_model(file, progress=False)):
        try:
            load(path)
            loads += 1
        except CheckpointError as error:
            assert str(path) in str(error)
    taken = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1] - before
    assert taken <= 1.0, f"{taken:.2f} s for {size} bytes"
    assert peak <= 4 * size + SLACK, f"{peak} bytes for {size}"
    return loads == 3


def run(seed: int, count: int, folder: Path) -> None:
    """Try so many damaged files under a bound on the address space."""
    data = container(METADATA, TENSORS)
    header = data.index(b"blk.0.ffn_down.weight") + 60
    path = folder / "m.gguf"
    path.write_bytes(data)
    torch.set_num_threads(1)
    tracemalloc.start()
    assert try_file(path), "the file is fine before it is damaged"
    assert try_file(path)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, -1))
    rng = random.Random(seed)
    loaded = 0
    for number in range(count):
        path.write_bytes(changed(data, rng, header))
        try:
            loaded += try_file(path)
        except BaseException as error:
            kept = Path(os.environ.get("TMPDIR", "/tmp")) / f"gguf-{seed}-{number}.gguf"
            kept.write_bytes(path.read_bytes())
            raise AssertionError(f"{kept}: {type(error).__name__}: {error}") from error
    print(f"{count} files, {loaded} loaded")
    assert 0 < loaded < 0.9 * count


def child(seed: int, count: int, folder: Path) -> None:
    command = [sys.executable, __file__, str(seed), str(count), str(folder)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(sys.platform != "linux", reason="bounds memory by /proc and RLIMIT_AS")
def test_damaged_files(tmp_path: Path) -> None:
    child(0, 1_500, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 21))
def test_many_damaged_files(seed: int, tmp_path: Path) -> None:
    child(seed, 10_000, tmp_path)


SCALAR = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-2, 300),
    st.floats(width=32),
    st.booleans(),
    st.text(max_size=20),
    st.sampled_from([*METADATA.values()]).filter(lambda value: not isinstance(value, list)),
    st.binary(max_size=8).map(lambda raw: (8, text(raw))),
)
VALUE = st.one_of(
    SCALAR, *(st.lists(kind, max_size=5) for kind in (st.integers(-3, 270), st.text()))
)
KEYS = st.sampled_from(
    [
        *METADATA,
        "general.alignment",
        "split.count",
        "llama.rope.scaling.type",
        "llama.rope.scaling.factor",
        "llama.rope.dimension_count",
        "llama.expert_count",
        "llama.attention.key_length",
        "llama.attention.sliding_window",
        "tokenizer.ggml.unknown_token_id",
        "tokenizer.chat_templates",
        "general.sampling.top_k",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, VALUE, min_size=1, max_size=3), st.sampled_from(["gpt2", "llama"]))
def test_hostile_values_in_a_sound_file(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], model: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "values.gguf"
    metadata = {**METADATA, "tokenizer.ggml.model": model, **changes}
    try:
        path.write_bytes(container(metadata, TENSORS))
    except (struct.error, UnicodeEncodeError):  # mixed lists, halves of surrogate pairs
        return
    for load in (Tokenizer.load, lambda file: load_model(file, progress=False)):
        try:
            load(path)
        except CheckpointError as error:
            assert str(path) in str(error)


def of_architecture(name: str, **more: Any) -> dict[str, Any]:
    """`METADATA` with the keys of another architecture; in ``more`` two underscores are a dot."""
    values = {key.replace("llama.", f"{name}."): value for key, value in METADATA.items()}
    values["general.architecture"] = name
    return values | {f"{name}.{key.replace('__', '.')}": value for key, value in more.items()}


LATENT = {"attention__kv_lora_rank": 8, "expert_count": 2, "expert_used_count": 1}
LATENT |= {"expert_feed_forward_length": 8, "rope__dimension_count": 4}
ARCHITECTURE_KEYS = [
    *(key.removeprefix("llama.") for key in METADATA if key.startswith("llama.")),
    *(f"attention.{of}_length{kind}" for of in ("key", "value") for kind in ("", "_mla")),
    *("attention.sliding_window", "attention.sliding_window_pattern"),
    *("attention.q_lora_rank", "attention.kv_lora_rank", "attn_logit_softcapping"),
    *("expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count"),
    *("expert_shared_count", "expert_weights_norm", "expert_weights_scale", "expert_gating_func"),
    *("leading_dense_block_count", "rope.dimension_count", "rope.freq_base_swa"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.yarn_log_multiplier"),
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_wrong_values_in_each_architecture(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    good = of_architecture(name, **(LATENT if name == "deepseek2" else {}))
    if name.startswith("gemma"):
        good[f"{name}.attention.sliding_window"] = 8
    for key in ARCHITECTURE_KEYS:
        for value in ("x", -1, 2**62, float("nan"), True, [1, 2]):
            path.write_bytes(container({**good, f"{name}.{key}": value}, TENSORS))
            try:
                load_config(path, torch.float32)
            except CheckpointError as error:
                assert str(path) in str(error)


def test_sizes_that_no_tensor_accounts_for_are_bounded(tmp_path: Path) -> None:
    """A table of angles has as many columns as the metadata say."""
    path = tmp_path / "m.gguf"
    wide = {**LATENT, "rope__dimension_count": 32_768}
    path.write_bytes(container(of_architecture("deepseek2", **wide), TENSORS))
    with pytest.raises(CheckpointError, match="'rotated' must lie in"):
        load_config(path, torch.float32)


@pytest.mark.parametrize("key", ["feed_forward_length", "attention.head_count"])
def test_no_memory_before_shapes_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Metadata may state any size; the tensors say what there is."""
    path = tmp_path / "m.gguf"
    many = 20_000_000 if key == "feed_forward_length" else 65_536
    sizes = {f"llama.{key}": many, "llama.attention.key_length": 8}
    path.write_bytes(container(METADATA | sizes, TENSORS))
    largest, empty = [0], torch.empty

    def watched(*shape: Any, **options: Any) -> torch.Tensor:
        numbers = shape[0] if isinstance(shape[0], tuple) else shape
        largest.append(math.prod(numbers))
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", watched)
    with pytest.raises(CheckpointError, match="shape"):
        load_model(path, torch.float32, progress=False)
    assert max(largest) < 1 << 20


def test_rotated_dimensions_are_kept_exactly(tmp_path: Path) -> None:
    """30 / 44 * 44 is less than 30 in floats."""
    path = tmp_path / "m.gguf"
    sizes = {"attention__key_length": 44, "rope__dimension_count": 30}
    path.write_bytes(container(of_architecture("phi3", **sizes), TENSORS))
    assert len(load_config(path, torch.float32).rope.frequencies) == 15


def test_lists_are_counted_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    many = (9, struct.pack("<IQ", 0, 4 << 20) + bytes(4 << 20))
    window = {"attention__sliding_window": 8, "attention__sliding_window_pattern": many}
    cases = [
        (METADATA | {"tokenizer.ggml.token_type": many}, Tokenizer.load, "of 260 tokens"),
        (
            of_architecture("gemma3", **window),
            lambda file: load_config(file, torch.float32),
            "must list 1 layers",
        ),
    ]
    for metadata, load, what in cases:
        path.write_bytes(container(metadata, TENSORS))
        tracemalloc.start()
        with pytest.raises(CheckpointError, match=what):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="reads anonymous memory from /proc")
@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("None", 1.0, 1.2), ("torch.bfloat16", 3.4, 4.0)]
)
def test_memory_at_load_is_bounded_by_the_file(
    dtype: str, least: float, most: float, tmp_path: Path
) -> None:
    """The worst case: nearly all of the file is one matrix of the type that grows most; kept as
    blocks it does not grow."""
    path = tmp_path / "m.gguf"
    path.write_bytes(container(METADATA, TENSORS))
    small = tmp_path / "small.gguf"
    path.rename(small)
    rows, width = 300_000, 256
    changes = {"llama.embedding_length": width, "llama.feed_forward_length": 32}
    sizes = {"token_embd": rows, "blk.0.attn_q": width, "blk.0.attn_k": 128, "blk.0.attn_v": 128}
    sizes |= {"blk.0.ffn_gate": 32, "blk.0.ffn_up": 32}
    matrices = {f"{name}.weight": (width, count) for name, count in sizes.items()}
    matrices |= {"blk.0.attn_output.weight": (width, width), "blk.0.ffn_down.weight": (32, width)}
    tensors = {name: (shape, Q4_0, math.prod(shape) // 32 * 18) for name, shape in matrices.items()}
    norms = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    tensors |= {f"{name}.weight": ((width,), F32, 4 * width) for name in norms}
    path.write_bytes(container(METADATA | changes, tensors))
    script = (
        "import sys, threading, time\n"
        "import torch\n"
        "from hasten.models.loading import load_model\n"
        "def held():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return 1024 * next(int(i.split()[1]) for i in lines if i.startswith('RssAnon'))\n"
        "load_model(sys.argv[1], progress=False)\n"
        "before, peak, done = held(), 0, threading.Event()\n"
        "def watch():\n"
        "    global peak\n"
        "    while not done.wait(0.001): peak = max(peak, held())\n"
        "watcher = threading.Thread(target=watch)\n"
        "watcher.start()\n"
        f"model = load_model(sys.argv[2], {dtype}, False)\n"
        "done.set()\n"
        "watcher.join()\n"
        "print(max(peak, held()) - before)\n"
    )
    command = [sys.executable, "-c", script, str(small), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    size = path.stat().st_size
    assert least * size < int(run.stdout) < most * size + SLACK


def test_an_endless_piece_is_refused(tmp_path: Path) -> None:
    """All ways to cut a piece in two are tried: megabytes of one would take hours."""
    path = tmp_path / "m.gguf"
    tokens = [*METADATA["tokenizer.ggml.tokens"][:-3], "x" * (1 << 20), "<s>", "</s>"]
    changes = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens}
    path.write_bytes(container(METADATA | changes, TENSORS))
    with pytest.raises(CheckpointError, match="token 257 has 1048576 characters"):
        Tokenizer.load(path)


def refused(tmp_path: Path, data: bytes, what: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=what) as caught:
            GGUF(path)
        assert str(path) in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(data) + (1 << 20)
    finally:
        tracemalloc.stop()


def test_each_kind_of_damage_is_named(tmp_path: Path) -> None:
    good = container(METADATA, TENSORS)

    def case(what: str, data: bytes) -> None:
        refused(tmp_path, data, what)

    def head(version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)

    def layout(what: str, tensors: dict[str, Any], **more: Any) -> None:
        case(what, container({"general.architecture": "llama", **more}, tensors))

    case("cannot read the file", b"")
    case("not a GGUF file", b"GGML" + good[4:])
    case("big-endian", b"GGUF" + struct.pack(">I", 3) + good[8:])
    case("version 1", head(1))
    case("the version needs 4 bytes", b"GGUF\x03")
    case("list of 60000 tensors needs", head(tensors=60_000))
    case("18446744073709551615 metadata keys", head(keys=2**64 - 1))
    key = head(keys=1) + text("k")
    case("unknown metadata type 13", key + struct.pack("<I", 13))
    case("'k' needs 1099511627776 bytes", key + struct.pack("<IQ", 8, 2**40))
    case("'k' needs", key + struct.pack("<IIQ", 9, 4, 2**61) + bytes(99))
    case("'k' needs", key + struct.pack("<IIQ", 9, 8, 2**60) + bytes(99))
    case("a string of 'k' ends after", key + struct.pack("<IIQQQ", 9, 8, 2, 0, 99))
    case("a string of 'k' ends after", key + struct.pack("<IIQQQ", 9, 8, 2, 2**63, 0))
    case("nests arrays more than 4", key + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9)
    case("unknown metadata type 77", key + struct.pack("<IIQ", 9, 77, 0))
    case("is not UTF-8", head(keys=1) + text(b"\xff") + bytes(99))
    case("a metadata key of 70000 bytes", head(keys=1) + text("k" * 70_000) + bytes(99))
    twice = text("k") + struct.pack("<IB", 0, 1)
    case("'k' occurs twice", head(keys=2) + twice * 2)

    one = (F32, 128)
    layout("'t' has 5 dimensions", {"t": ((1,) * 5, *one)})
    layout("would have 0 bytes", {"t": ((0, 4), *one)})
    layout("'t' of shape .* would have", {"t": ((2**32, 2**32, 2**32), *one)})
    layout("unknown type 40", {"t": ((32,), 40, 128)})
    layout("rows of 33, not a multiple of 32", {"t": ((33, 2), Q4_0, 128)})
    layout("'u' ends 96 bytes after the file", {"t": ((32,), *one), "u": ((32,), F32, 32)})
    layout("'t' and 'u' overlap", {"t": ((32,), F32, 32), "u": ((32,), *one)})
    layout("not a power of two", {}, **{"general.alignment": (4, struct.pack("<I", 24))})
    layout("not a power of two from 8 on", {}, **{"general.alignment": (4, b"\4\0\0\0")})
    layout("must be a uint32", {}, **{"general.alignment": 32})
    layout("a tensor name of 300 bytes", {"t" * 300: ((32,), *one)})
    info = text("t") + struct.pack("<IQIQ", 1, 32, F32, 0)
    case("'t' occurs twice", head(tensors=2) + info * 2 + bytes(300))
    odd = text("t") + struct.pack("<IQIQ", 1, 32, F32, 8)
    case("offset 8, not a multiple of 32", head(tensors=1) + odd + bytes(300))


def test_big_lists_cost_nothing_until_they_are_read(tmp_path: Path) -> None:
    """Strings are small in the file and large as objects: they stay in the file."""
    path = tmp_path / "m.gguf"
    tokens = (9, struct.pack("<IQ", 8, 400_000) + text("ab") * 400_000)
    path.write_bytes(container({**METADATA, "tokenizer.ggml.tokens": tokens}, TENSORS))
    tracemalloc.start()
    file = GGUF(path)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 1 << 20 and file.length("tokenizer.ggml.tokens") == 400_000
    with pytest.raises(CheckpointError, match=r"400000 tokens, but 'token_embd\.weight' has 260"):
        Tokenizer.load(path)
    many: Callable[[int], bytes] = lambda n: struct.pack("<IQ", 8, n) + bytes(8 * n)  # noqa: E731
    path.write_bytes(container({"k": (9, many((2 << 20) + 1))}, {}))
    with pytest.raises(CheckpointError, match="more than 2097152 items"):
        GGUF(path)


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
