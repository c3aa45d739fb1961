"""Training text: the running interpreter's standard library, split by a hash of each file's name.

Everybody who has Python has this text, so a reference model can be trained again anywhere. The
split depends on the file's path alone: it stays the same when files are added or removed.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PER_MILLE = 30
# Generated tables and vendored bundles: long, repetitive, and not what code looks like.
SKIPPED_PARTS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "_bundled"}
)
MAX_BYTES = 200_000


@dataclass(frozen=True)
class SourceFile:
    """One file: its path relative to the library and its text."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        return is_held_out(self.path)


def per_mille(path: str) -> int:
    """A file's place in every split: 0 to 999, by a hash of its name."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 1000


def is_held_out(path: str) -> bool:
    """Whether a relative path belongs to the part that is never trained on (about 3 %)."""
    return per_mille(path) < HELD_OUT_PER_MILLE


def standard_library() -> list[SourceFile]:
    """All readable ``.py`` files of the running interpreter's standard library, by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_PARTS.intersection(relative.parts) or path.stat().st_size > MAX_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            files.append(SourceFile(relative.as_posix(), text))
    return files


def split(files: list[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """``(training files, held-out files)``."""
    train = [file for file in files if not file.held_out]
    held_out = [file for file in files if file.held_out]
    return train, held_out
