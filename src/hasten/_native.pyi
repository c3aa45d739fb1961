"""The C++ kernels. Use them through ``hasten.kernels``; shapes and types are checked here."""

from torch import Tensor

class TensorList:
    """Tensors of one shape and type, kept alive."""

    def __init__(self, tensors: list[Tensor]) -> None: ...

class Matrix:
    """A weight of any kind, checked and kept alive."""

def matrix(w: Tensor, n: int, k: int) -> Matrix: ...
def matrix_blocks(w: Tensor, kind: str, n: int, k: int) -> Matrix: ...
def matrix_quantized(w: Tensor, n: int, k: int, group: int, asymmetric: bool) -> Matrix: ...
def linear(
    x: Tensor, w: Tensor, n: int, k: int, bias: Tensor | None, add: Tensor | None, out: Tensor
) -> None: ...
def linear_gated(
    x: Tensor, w: Tensor, n: int, k: int, bias: Tensor | None, kind: str, out: Tensor
) -> None: ...
def linear_grouped(x: Tensor, w: Tensor, n: int, k: int, out: Tensor) -> None: ...
def linear_experts(
    x: Tensor,
    weights: TensorList,
    n: int,
    k: int,
    kind: str | None,
    offsets: Tensor,
    out: Tensor,
) -> None: ...
def pack(rows: Tensor, first: int, n: int, gated: bool, out: Tensor) -> None: ...
def unpack(w: Tensor, n: int, k: int, gated: bool, out: Tensor) -> None: ...
def embed(ids: Tensor, w: Tensor, n: int, k: int, out: Tensor) -> None: ...
def linear_blocks(
    x: Tensor,
    w: Tensor,
    kind: str,
    n: int,
    k: int,
    bias: Tensor | None,
    add: Tensor | None,
    out: Tensor,
) -> None: ...
def linear_blocks_gated(
    x: Tensor, w: Tensor, kind: str, n: int, k: int, bias: Tensor | None, gate: str, out: Tensor
) -> None: ...
def linear_blocks_experts(
    x: Tensor,
    weights: TensorList,
    kind: str,
    n: int,
    k: int,
    gate: str | None,
    offsets: Tensor,
    out: Tensor,
) -> None: ...
def put_blocks(
    rows: Tensor, kind: str, n: int, k: int, gated: bool, first: int, w: Tensor
) -> None: ...
def embed_blocks(
    ids: Tensor, w: Tensor, kind: str, n: int, k: int, gated: bool, out: Tensor
) -> None: ...
def linear_quantized(
    x: Tensor,
    w: Tensor,
    n: int,
    k: int,
    group: int,
    asymmetric: bool,
    bias: Tensor | None,
    add: Tensor | None,
    out: Tensor,
) -> None: ...
def linear_quantized_gated(
    x: Tensor,
    w: Tensor,
    n: int,
    k: int,
    group: int,
    asymmetric: bool,
    bias: Tensor | None,
    kind: str,
    out: Tensor,
) -> None: ...
def linear_quantized_experts(
    x: Tensor,
    weights: TensorList,
    n: int,
    k: int,
    group: int,
    asymmetric: bool,
    kind: str | None,
    offsets: Tensor,
    out: Tensor,
) -> None: ...
def put_int8(
    w: Tensor, n: int, k: int, gated: bool, first: int, codes: Tensor, scale: Tensor
) -> None: ...
def put_int4(
    w: Tensor,
    n: int,
    k: int,
    group: int,
    gated: bool,
    first: int,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
) -> None: ...
def unpack_quantized(
    w: Tensor, n: int, k: int, group: int, asymmetric: bool, gated: bool, out: Tensor
) -> None: ...
def embed_quantized(
    ids: Tensor, w: Tensor, n: int, k: int, group: int, asymmetric: bool, out: Tensor
) -> None: ...
def group_rows(
    ids: Tensor, experts: int, offsets: Tensor, order: Tensor, slots: Tensor
) -> None: ...
def gather(x: Tensor, index: Tensor, out: Tensor) -> None: ...
def combine(y: Tensor, slots: Tensor, shares: Tensor, add: Tensor | None, out: Tensor) -> None: ...
def rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    add: Tensor | None,
    out: Tensor,
    sum: Tensor | None,
) -> None: ...
def add(x: Tensor, factor: float, y: Tensor | None, out: Tensor) -> None:
    """``x * factor + y``"""

def take_rows(x: Tensor, index: Tensor, out: Tensor) -> None: ...
def gated(x: Tensor, kind: str, out: Tensor) -> None: ...
def softcap(x: Tensor, cap: float, out: Tensor) -> None: ...
def row_top(logits: Tensor, argmax: Tensor, max: Tensor, lse: Tensor, ids: Tensor) -> None: ...
def sum_exp(logits: Tensor, shift: Tensor, temperature: float, out: Tensor) -> None: ...
def route(
    router_logits: Tensor,
    k: int,
    normalize: bool,
    ids: Tensor,
    weights: Tensor,
    groups: int = 1,
    top_groups: int = 1,
) -> None: ...
def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    table_row: Tensor,
    table: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rotate_keys: bool = True,
) -> None: ...
def qkv(
    x: Tensor,
    matrices: list[Matrix],
    bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    table_row: Tensor,
    table: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rotate_keys: bool,
    heads: Tensor,
) -> None: ...
def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    table_row: Tensor,
    positions: Tensor,
    base: Tensor,
    mask: Tensor,
    scale: float,
    window: int,
    sinks: int,
    softcap: float,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
) -> None: ...
def copy_pages(k: Tensor, v: Tensor, src: Tensor, dst: Tensor) -> None: ...
def move_slots(
    k: Tensor, v: Tensor, table: Tensor, table_row: Tensor, src_slot: Tensor, dst_slot: Tensor
) -> None: ...
def vector_math(x: Tensor, tanh: bool, out: Tensor) -> None:
    """exp or tanh of the kernels, for tests."""

class Tape:
    """Operations of a forward pass, to be run again. It refers to arrays without owning them."""

    def __len__(self) -> int: ...
    def record(self) -> None:
        """Keep what this thread runs from now on; ValueError if it records already."""

    def stop(self) -> None: ...
    def replay(self) -> None:
        """Run all operations on what their arrays hold now."""

def set_profiling(on: bool) -> None: ...
def take_profile() -> dict[str, tuple[int, float, int]]:
    """By operation: calls, seconds and bytes read, since the last call."""

def set_num_threads(threads: int) -> None: ...
def get_num_threads() -> int: ...
def set_isa(name: str) -> None:
    """Use "avx512", "avx2" or "portable" from now on; ValueError if that cannot be."""

def get_isa() -> str: ...
def isa_supported(name: str) -> bool: ...
def read_bandwidth(bytes: int = ..., repeats: int = ...) -> float:
    """Bytes a second at which the threads read a buffer of this size.

    The best window of 64 MiB in ``repeats`` passes; the buffer should exceed every cache.
    """

def rtn(
    values: Tensor, group: int, clips: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None
) -> None: ...

class TrigramCorpus:
    """The immutable table of a text; see ``hasten.speculation.trigrams`` for its tensors."""

    def __init__(self, pairs: Tensor, offsets: Tensor, tokens: Tensor, weights: Tensor) -> None: ...
    def __len__(self) -> int:
        """Pairs."""

class Trigrams:
    """A table that adapts, over a corpus or over nothing; csrc/trigrams.h has the rules."""

    def __init__(
        self,
        corpus: TrigramCorpus | None,
        *,
        successors: int,
        boost: float,
        cap: float,
        decay: float,
        backoff: float,
        pairs: int,
        iterations: int,
        depth: int,
        prefixes: int,
        c1: float,
        c2: float,
    ) -> None: ...
    def __len__(self) -> int:
        """Pairs that it has changed."""

    @property
    def nbytes(self) -> int: ...
    def absorb(self, tokens: list[int]) -> None:
        """Boost every tri-gram of a text."""

    def add_rows(self, before: list[int], last: list[int], ids: Tensor, amounts: Tensor) -> None:
        """Boost what may follow (before[i], last[i]): ids int64 [n, k] by amounts float32."""

    def successors(self, a: int, b: int) -> list[tuple[int, float]]:
        """What may follow, heaviest first."""

    def search(self, a: int, b: int, budget: int, key: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of a tree below the token b, by Monte-Carlo tree search."""

    def beam(self, a: int, b: int, budget: int) -> tuple[list[int], list[int]]:
        """The same, of the likeliest paths."""

SUFFIX_DEPTH: int

def sort_suffixes(tokens: Tensor, places: Tensor, first: int, last: int) -> None: ...
def continuations(
    tokens: Tensor,
    sorted: Tensor,
    context: list[int],
    shortest: int,
    longest: int,
    length: int,
    nodes: int,
    hits: int,
) -> tuple[int, int, list[int], list[int], list[int]]: ...
