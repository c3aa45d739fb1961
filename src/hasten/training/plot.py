"""Loss curves as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

WINDOW = 50


def plot_losses(logs: Mapping[str, Path], picture: Path) -> None:
    """Draw one smoothed curve for each ``loss.jsonl`` over tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    for name, log in logs.items():
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        tokens = [entry["tokens"] / 1e6 for entry in entries]
        losses = [entry["loss"] for entry in entries]
        smooth = [
            sum(losses[max(0, i - WINDOW + 1) : i + 1]) / (i + 1 - max(0, i - WINDOW + 1))
            for i in range(len(losses))
        ]
        (line,) = axes.plot(tokens, smooth, label=name)
        axes.plot(tokens, losses, color=line.get_color(), alpha=0.15, linewidth=0.5)
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss per scored token (nats)")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Software": None})
    plt.close(figure)
