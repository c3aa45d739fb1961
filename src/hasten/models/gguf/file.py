"""Reading the header of a GGUF file: its metadata and where each tensor lies.

The file is untrusted. It is mapped into memory, every count and length is compared with the bytes
that are left before it is used, and strings and arrays are left in the file until asked for, so
that what is allocated here is bounded by a constant. Torch is not needed.
"""

from __future__ import annotations

import mmap
import re
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hasten.models.facts import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 has counts of 32 bits; no file of it is in use

# Bounds above what any real file has, on what is held for each entry.
MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_TENSOR_NAME = 256  # bytes; ggml itself allows 64
MAX_TEXT = 16 << 20  # bytes of one string, such as a chat template
MAX_STRINGS = 2 << 20  # of all arrays together; vocabularies with their merges have under one
MAX_NESTING = 4
MAX_PARTS = 1024

STRING, ARRAY, BOOL, FLOAT32 = 8, 9, 7, 6
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
"""Metadata types of a fixed size and their ``struct`` codes."""

PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
AGAIN = "Download the file again; it is damaged or not what it says."


class Kind(NamedTuple):
    """A tensor type: rows are stored as blocks of ``values`` values in ``bytes`` bytes."""

    name: str
    values: int
    bytes: int


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
    9: Kind("Q8_1", 32, 40),
    10: Kind("Q2_K", 256, 84),
    11: Kind("Q3_K", 256, 110),
    12: Kind("Q4_K", 256, 144),
    13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210),
    15: Kind("Q8_K", 256, 292),
    16: Kind("IQ2_XXS", 256, 66),
    17: Kind("IQ2_XS", 256, 74),
    18: Kind("IQ3_XXS", 256, 98),
    19: Kind("IQ1_S", 256, 50),
    20: Kind("IQ4_NL", 32, 18),
    21: Kind("IQ3_S", 256, 110),
    22: Kind("IQ2_S", 256, 82),
    23: Kind("IQ4_XS", 256, 136),
    24: Kind("I8", 1, 1),
    25: Kind("I16", 1, 2),
    26: Kind("I32", 1, 4),
    27: Kind("I64", 1, 8),
    28: Kind("F64", 1, 8),
    29: Kind("IQ1_M", 256, 56),
    30: Kind("BF16", 1, 2),
    34: Kind("TQ1_0", 256, 54),
    35: Kind("TQ2_0", 256, 66),
    39: Kind("MXFP4", 32, 17),
}
"""Tensor types by their number in the file. `hasten.models.gguf.blocks` says which can be read."""


class Part:
    """One mapped file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise CheckpointError(f"cannot read the file ({error})", path, AGAIN) from error
        self.size = len(self.map)

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(what, self.path, AGAIN)


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies. ``shape`` has the rows' length last, unlike the file."""

    part: Part
    name: str
    kind: Kind
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Value(NamedTuple):
    """A metadata value in the file: a scalar, a string of ``size`` bytes, an array of ``size``."""

    kind: int
    offset: int
    size: int
    items: int = -1  # the type of an array's items


class GGUF:
    """A model file, or the parts of a split one: metadata of the first, tensors of all.

    Attributes:
        path: the (first) file.
        values: metadata as it lies in the file; ``get``, ``texts`` and ``numbers`` read it.
        tensors: by the names of the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._part = Part(self.path)
        self.values, self.tensors = _Header(self._part).read()
        count = self.get("split.count", 0)
        if not isinstance(count, int) or count <= 1:
            return
        for part in _other_parts(self.path, self.get("split.no", 0), count):
            _, tensors = _Header(Part(part)).read()
            if twice := sorted(self.tensors.keys() & tensors.keys()):
                raise self.wrong(f"tensor {twice[0]!r} is also in {part.name}")
            self.tensors |= tensors
        stated = self.get("split.tensors.count", len(self.tensors))
        if stated != len(self.tensors):
            raise self.wrong(
                f"the parts hold {len(self.tensors)} tensors, 'split.tensors.count' is {stated}"
            )

    def wrong(self, what: str) -> CheckpointError:
        return self._part.wrong(what)

    def parts(self) -> list[Part]:
        return list({id(t.part): t.part for t in self.tensors.values()}.values()) or [self._part]

    def get(self, key: str, default: int | float | str | None = None) -> int | float | str | None:
        """A number, truth value or string; ``default`` where the key is missing.

        A float32 reads as the shortest decimal that rounds to it, which is what was written in
        the config.json it came from.
        """
        value = self.values.get(key)
        if value is None:
            return default
        if value.kind == ARRAY:
            raise self.wrong(f"{key!r} is an array, expected one value")
        if value.kind == STRING:
            if value.size > MAX_TEXT:
                raise self.wrong(f"{key!r} has {value.size} bytes, over {MAX_TEXT >> 20} MiB")
            return self._text(key, value.offset, value.size)
        scalar = struct.unpack_from("<" + SCALARS[value.kind], self._part.map, value.offset)[0]
        if value.kind == BOOL:
            return bool(scalar)
        return _shortest(scalar) if value.kind == FLOAT32 else scalar

    def is_array(self, key: str) -> bool:
        return key in self.values and self.values[key].kind == ARRAY

    def length(self, key: str) -> int:
        """Items of an array; 0 where the key is missing."""
        return self.values[key].size if self.is_array(key) else 0

    def texts(self, key: str) -> Iterator[str]:
        """The strings of an array; none where the key is missing."""
        value = self._array(key)
        if value is None:
            return
        if value.items != STRING:
            raise self.wrong(f"{key!r} must be an array of strings")
        at = value.offset
        for _ in range(value.size):
            (size,) = struct.unpack_from("<Q", self._part.map, at)
            yield self._text(key, at + 8, size)
            at += 8 + size

    def numbers(self, key: str) -> array[int] | array[float]:
        """The numbers of an array; empty where the key is missing."""
        value = self._array(key)
        if value is None:
            return array("b")
        if value.items not in SCALARS:
            raise self.wrong(f"{key!r} must be an array of numbers")
        found: array[int] | array[float] = array(SCALARS[value.items])
        found.frombytes(self._part.map[value.offset : value.offset + value.size * found.itemsize])
        return found

    def _array(self, key: str) -> Value | None:
        value = self.values.get(key)
        if value is not None and value.kind != ARRAY:
            raise self.wrong(f"{key!r} must be an array")
        return value

    def _text(self, key: str, offset: int, size: int) -> str:
        try:
            return self._part.map[offset : offset + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"{key!r} holds bytes that are not UTF-8") from error


def is_gguf(path: str | Path) -> bool:
    """Whether the path names a GGUF file (by its suffix) and not a folder."""
    path = Path(path)
    return path.suffix == ".gguf" and not path.is_dir()


def _shortest(value: float) -> float:
    for digits in range(6, 9):
        short = float(f"{value:.{digits}g}")
        try:
            if struct.pack("<f", short) == struct.pack("<f", value):
                return short
        except OverflowError:  # rounded up beyond the largest float32
            continue
    return value


def _other_parts(path: Path, number: object, count: int) -> list[Path]:
    """The files after the first of a split model; all must be beside it."""
    match = PART.fullmatch(path.name)
    if number != 0 or not match or int(match["number"]) != 1:
        raise CheckpointError(
            "a later part of a split model, or a part under another name",
            path,
            "Give the first part, whose name ends in -00001-of-NNNNN.gguf, beside the others.",
        )
    if count != int(match["count"]) or count > MAX_PARTS:
        raise CheckpointError(
            f"the name says {match['count']} parts, 'split.count' {count}", path, AGAIN
        )
    others = [
        path.with_name(f"{match['stem']}-{n:05}-of-{count:05}.gguf") for n in range(2, count + 1)
    ]
    if missing := [other.name for other in others if not other.is_file()]:
        raise CheckpointError(
            f"part {missing[0]} is missing", path, "Download all parts into one folder."
        )
    return others


class _Header:
    """A cursor over the header of one file."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.map = part.map
        self.size = part.size
        self.at = 0
        self.strings = 0

    def read(self) -> tuple[dict[str, Value], dict[str, Stored]]:
        if self.map[:4] != MAGIC:
            raise self.part.wrong("not a GGUF file")
        self.at = 4
        version = self.number("I", "the version")
        if version not in VERSIONS:
            if not version & 0xFFFF:
                raise CheckpointError(
                    "a big-endian GGUF file", self.part.path, "Use the little-endian one."
                )
            raise CheckpointError(
                f"GGUF version {version}; 2 and 3 can be read",
                self.part.path,
                "Use a file converted by a current llama.cpp.",
            )
        tensor_count = self.count("tensors", MAX_TENSORS, 24)
        key_count = self.count("metadata keys", MAX_KEYS, 13)
        values: dict[str, Value] = {}
        for _ in range(key_count):
            key = self.name("a metadata key", 65_535)
            if key in values:
                raise self.part.wrong(f"metadata key {key!r} occurs twice")
            values[key] = self.value(key)
        tensors: dict[str, Stored] = {}
        for _ in range(tensor_count):
            tensor = self.tensor()
            if tensor.name in tensors:
                raise self.part.wrong(f"tensor {tensor.name!r} occurs twice")
            tensors[tensor.name] = tensor
        return values, self.placed(tensors, self.alignment(values))

    def need(self, nbytes: int, what: str) -> None:
        if nbytes > self.size - self.at:
            raise self.part.wrong(
                f"{what} needs {nbytes} bytes at offset {self.at}, {self.size - self.at} are left"
            )

    def number(self, code: str, what: str) -> int:
        size = struct.calcsize("<" + code)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + code, self.map, self.at)
        self.at += size
        return int(value)

    def count(self, what: str, most: int, least_bytes: int) -> int:
        """A count of entries that have at least so many bytes each."""
        count = self.number("Q", f"the number of {what}")
        if count > most:
            raise self.part.wrong(f"{count} {what}; more than {most} are taken for damage")
        self.need(count * least_bytes, f"a list of {count} {what}")
        return count

    def name(self, what: str, most: int) -> str:
        size = self.number("Q", f"the length of {what}")
        if size > most:
            raise self.part.wrong(f"{what} of {size} bytes at offset {self.at}")
        self.need(size, what)
        self.at += size
        try:
            return self.map[self.at - size : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.part.wrong(f"{what} at offset {self.at - size} is not UTF-8") from error

    def value(self, key: str) -> Value:
        kind = self.number("I", f"the type of {key!r}")
        if kind == ARRAY:
            return self.items(key, MAX_NESTING)
        if kind == STRING:
            size = self.number("Q", f"the length of {key!r}")
            self.need(size, repr(key))
            self.at += size
            return Value(kind, self.at - size, size)
        if kind not in SCALARS:
            raise self.part.wrong(f"{key!r} has the unknown metadata type {kind}")
        size = struct.calcsize("<" + SCALARS[kind])
        self.need(size, repr(key))
        self.at += size
        return Value(kind, self.at - size, 1)

    def items(self, key: str, depth: int) -> Value:
        """Pass over an array."""
        if not depth:
            raise self.part.wrong(f"{key!r} nests arrays more than {MAX_NESTING} deep")
        items = self.number("I", f"the item type of {key!r}")
        count = self.number("Q", f"the length of {key!r}")
        start = self.at
        if items in SCALARS:
            nbytes = count * struct.calcsize("<" + SCALARS[items])
            self.need(nbytes, repr(key))
            self.at += nbytes
        elif items in (STRING, ARRAY):
            self.need(count * (8 if items == STRING else 12), repr(key))
            self.strings += count
            if self.strings > MAX_STRINGS:
                raise self.part.wrong(f"more than {MAX_STRINGS} items in arrays, up to {key!r}")
            if items == STRING:
                self.pass_strings(key, count)
            else:
                for _ in range(count):
                    self.items(key, depth - 1)
        else:
            raise self.part.wrong(f"{key!r} has items of the unknown metadata type {items}")
        return Value(ARRAY, start, count, items)

    def pass_strings(self, key: str, count: int) -> None:
        at, last, source = self.at, self.size - 8, self.map
        length = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at > last:
                break
            at += 8 + length(source, at)[0]
        else:
            if at <= self.size:
                self.at = at
                return
        raise self.part.wrong(f"a string of {key!r} ends after the file")

    def tensor(self) -> Stored:
        """One entry of the list of tensors; its offset is still relative."""
        name = self.name("a tensor name", MAX_TENSOR_NAME)
        dims = self.number("I", f"the rank of {name!r}")
        if not 1 <= dims <= 4:
            raise self.part.wrong(f"tensor {name!r} has {dims} dimensions, not 1 to 4")
        shape = tuple(self.number("Q", f"the shape of {name!r}") for _ in range(dims))[::-1]
        number = self.number("I", f"the type of {name!r}")
        offset = self.number("Q", f"the offset of {name!r}")
        kind = KINDS.get(number)
        if kind is None:
            raise self.part.wrong(f"tensor {name!r} has the unknown type {number}")
        if shape[-1] % kind.values:
            raise self.part.wrong(
                f"tensor {name!r} has rows of {shape[-1]}, not a multiple of {kind.values} "
                f"as {kind.name} needs"
            )
        nbytes = kind.bytes
        for size in (*shape[:-1], shape[-1] // kind.values):
            nbytes *= size
        if not 0 < nbytes <= self.size:
            raise self.part.wrong(
                f"tensor {name!r} of shape {list(shape)} in {kind.name} would have {nbytes} bytes "
                f"in a file of {self.size}"
            )
        return Stored(self.part, name, kind, shape, offset, nbytes)

    def alignment(self, values: dict[str, Value]) -> int:
        value = values.get("general.alignment")
        if value is None:
            return 32
        if value.kind != 4:
            raise self.part.wrong("'general.alignment' must be a uint32")
        (alignment,) = struct.unpack_from("<I", self.map, value.offset)
        if alignment < 8 or alignment & (alignment - 1):
            raise self.part.wrong(
                f"'general.alignment' is {alignment}, not a power of two from 8 on"
            )
        return int(alignment)

    def placed(self, tensors: dict[str, Stored], alignment: int) -> dict[str, Stored]:
        """The tensors at their places in the file: aligned, inside it, and apart."""
        start = -(-self.at // alignment) * alignment
        placed: dict[str, Stored] = {}
        end, before = 0, ""
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset % alignment:
                raise self.part.wrong(
                    f"tensor {tensor.name!r} lies at offset {tensor.offset}, "
                    f"not a multiple of {alignment}"
                )
            if tensor.offset < end:
                raise self.part.wrong(f"tensors {before!r} and {tensor.name!r} overlap")
            end, before = tensor.offset + tensor.nbytes, tensor.name
            if start + end > self.size:
                raise self.part.wrong(
                    f"tensor {tensor.name!r} ends {start + end - self.size} bytes after the file"
                )
            placed[tensor.name] = Stored(
                self.part,
                tensor.name,
                tensor.kind,
                tensor.shape,
                start + tensor.offset,
                tensor.nbytes,
            )
        return placed
