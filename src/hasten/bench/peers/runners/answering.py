"""What all runners share: a line of JSON in, a line of JSON out.

Runners are run by the interpreter of the engine that they drive, which has no hasten: these
files import nothing of it. Messages:

- ``{"do": "load", "model": PATH, "weights": NAME, "threads": N, "length": TOKENS, "sequences": N}``
  -> ``{"engine": NAME, "version": TEXT, ...}`` and the engine's other ``facts``. ``"speculation":
  NAME`` and ``"draft": PATH`` come along where the engine is to draft (``Peer.speculation``).
- ``{"do": "generate", "prompts": [[id, ...], ...], "new": N}`` -> ``{"times": [s, ...],
  "tokens": [[id, ...], ...]}``: greedy, exactly N tokens each, all prompts as one batch;
  ``times`` holds the seconds from the start to each of the N tokens; those of one step share it.
- ``{"do": "verify", "context": N, "rows": [R, ...], "repeats": N}`` -> ``{"seconds":
  {R: [s, ...]}}``: a step of R rows behind a context with the logits of all of them; the R take
  turns.
- anything that fails -> ``{"error": TEXT}``.

Every answer also has ``peak_bytes``, the most memory that the process has had so far.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, Protocol


class Engine(Protocol):
    """A loaded model."""

    @property
    def engine(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def facts(self) -> dict[str, Any]: ...

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        """Seconds to each token of a prompt, and the new tokens of each prompt."""
        ...


def answer(load: Callable[[dict[str, Any]], Engine]) -> None:
    """Serve standard input until it ends. ``load`` gets the first message."""
    _die_with_parent()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not look like an answer
    loaded: Any = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if message["do"] == "load":
                loaded = load(message)
                reply: dict[str, Any] = {"engine": loaded.engine, "version": loaded.version}
                reply |= loaded.facts
            elif message["do"] == "generate":
                times, tokens = loaded.generate(message["prompts"], message["new"])
                reply = {"times": times, "tokens": tokens}
            elif not hasattr(loaded, "verify"):
                reply = {"error": "cannot compute the logits of several rows in one step"}
            else:
                seconds = loaded.verify(message["context"], message["rows"], message["repeats"])
                reply = {"seconds": seconds}
        except Exception as error:  # of any engine, of any kind: the parent decides
            reply = {"error": f"{type(error).__name__}: {error}"}
        reply["peak_bytes"] = _peak_bytes()
        print(json.dumps(reply), file=out, flush=True)


def padded(prompts: list[list[int]], pad: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts padded on the left to one length, and the mask that tells padding (0) from text."""
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(p)) + p for p in prompts]
    return ids, [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]


def _peak_bytes() -> int:
    """The most memory that was resident. Not rusage's: that begins with the parent's own peak."""
    try:
        with open("/proc/self/status") as status:
            (line,) = (line for line in status if line.startswith("VmHWM:"))
    except OSError:  # no Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(line.split()[1]) * 1024


def _die_with_parent() -> None:
    """A paused process would never see that its standard input has ended."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1  # prctl(2)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
