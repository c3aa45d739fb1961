"""The facts that a checkpoint states in JSON, and the error for whatever is wrong with one.

A checkpoint is untrusted input. Nothing in it is executed, every length is checked against the
size of the file before anything of that length is allocated, and whatever is wrong is told once,
as a `CheckpointError` that names the file and what to do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 256 << 20  # the largest tokenizer files have some tens of megabytes


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: what is wrong, where, and what to do."""

    def __init__(self, what: str, where: str | Path, remedy: str) -> None:
        super().__init__(f"{what} [{where}]. {remedy}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    again = "Download the file again or correct it."
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"more than {MAX_JSON_BYTES >> 20} MiB of JSON", path, again)
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"cannot read the file ({error.strerror})", path, "Check the path and its permissions."
        ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"invalid JSON ({error})", path, again) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"a JSON object expected, found {type(value).__name__}", path, again)
    return value


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


class Facts:
    """Typed access to config.json: a wrong or missing value is named, never guessed around.

    ``longest`` is the longest sequence that is to run, None = what the checkpoint was made for.
    """

    def __init__(
        self, values: dict[str, Any], path: str | Path, longest: int | None = None
    ) -> None:
        self.values = values
        self.path = path
        self.longest = longest

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(what, self.path, "Correct the file, or use another checkpoint.")

    def _get(self, key: str, kinds: tuple[type, ...], wanted: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.wrong(f"{key!r} is missing")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.wrong(f"{key!r} must be {wanted}, found {value!r}")
        return value

    def count(
        self, key: str, default: int | None = None, least: int = 1, most: int = 2**31 - 1
    ) -> int:
        """An integer in [least, most]."""
        value: int = self._get(key, (int,), "an integer", default)
        if not least <= value <= most:
            raise self.wrong(f"{key!r} must lie in [{least}, {most}], found {value}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self._get(key, (int, float), "a number", default)
        if not 0 < value <= sys.float_info.max:  # an integer in JSON may be larger than any float
            raise self.wrong(f"{key!r} must be a positive number, found {value!r:.20}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._get(key, (bool,), "true or false", default))

    def states(self, key: str) -> bool:
        """Whether the key has a value other than null."""
        return self.values.get(key) is not None

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse a value that changes the function computed; a missing key is the first one."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            names = " or ".join(repr(one) for one in allowed)
            raise CheckpointError(
                f"{key!r} is {value!r}; this architecture runs {names} only",
                self.path,
                "Use a checkpoint without it.",
            )

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id, a list of them, or none."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise self.wrong(f"{key!r} must be a token id or a list of them, found {value!r}")
        return tuple(i for i in ids if i >= 0)
