"""S2D's claim: one sorted draft does for every target what drafts trained one by one do.

A draft with three exits, trained with the mean of their losses, beside a draft of its own for each
depth and beside the deepest of these cut short without having been taught to answer there. All see
the same text once; two targets of different size judge them.

    python -m benchmarks.speculation.claims.s2d --tokens 1000000
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hasten.training import corpus
from hasten.training.draft import DraftRecipe, Target, acceptance, export_draft, pretrain
from hasten.training.draft_data import Division, Prompts
from hasten.training.model import Llama

NEAR = 0.95
"""Of the tau of a separate draft, as "within a few per cent"."""


def cut(model: Llama, layers: int) -> Llama:
    """The first layers with the last norm and the head."""
    part = Llama(replace(model.shape, num_hidden_layers=layers))
    part.load_state_dict(model.state_dict(), strict=False)
    return part


def because(
    tau: dict[str, dict[str, float]], near: dict[str, dict[str, float]], shape: dict[str, bool]
) -> str:
    """What the figures say of the parts that did not come out."""
    said = []
    if not shape["near_the_separate_ones"]:
        shares = (
            f"{share:.1%} at {n} layers ({name})"
            for name, each in near.items()
            for n, share in each.items()
            if share < NEAR
        )
        said.append(f"of the separate drafts' tau it has {', '.join(shares)}")
    if not shape["above_the_one_cut_short"]:
        pairs = (
            f"{row[f'sorted, {n}']:.2f} against {row[f'cut short, {n}']:.2f} at {n} ({name})"
            for name, row in tau.items()
            for n in (1, 2)
            if row[f"sorted, {n}"] <= row[f"cut short, {n}"]
        )
        said.append(f"its tau beside the one cut short: {', '.join(pairs)} layers")
    return "; ".join(said)


def measure(
    targets: Sequence[str] = ("reference", "reference-draft"),
    tokens: int = 1_000_000,
    hidden: int = 128,
    prompts: int = 48,
    compile: bool = True,
) -> dict[str, Any]:
    """Tau of every draft for every target, greedy, and what of the claim it shows."""
    exits = (1, 2, 3)
    single = DraftRecipe(
        layers=exits[-1], hidden=hidden, tokens=tokens, prompts=prompts, compile=compile
    )
    nested = replace(single, exits=exits)
    judges = [Target(name) for name in targets]
    first = judges[0]
    division = Division.of(corpus.standard_library())
    source = Prompts(first.speech, division.held_out, single.shortest, single.longest, "claim")
    held_out = [source[number] for number in range(prompts)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def trained(recipe: DraftRecipe, run: str) -> Llama:
            model, finished = pretrain(first, division.pretraining, recipe, folder / run)
            if not finished:
                raise KeyboardInterrupt
            return model

        sorted_draft = trained(nested, "sorted")
        separate = {n: trained(replace(single, layers=n), f"separate{n}") for n in exits}
        models = {f"sorted, {n}": cut(sorted_draft, n) for n in exits}
        models |= {f"separate, {n}": separate[n] for n in exits}
        models |= {f"cut short, {n}": cut(separate[exits[-1]], n) for n in exits[:-1]}
        for arm, model in models.items():
            export_draft(model, first, (), folder / arm)
        export_draft(sorted_draft, first, exits, folder / "s2d")

        found: dict[str, dict[str, float]] = {}
        for target in judges:
            rows = {
                arm: acceptance(target, folder / arm, held_out, single)["greedy"]["tau"]
                for arm in models
            }
            rows["s2d"] = acceptance(target, folder / "s2d", held_out, nested)["greedy"]["tau"]
            found[target.model] = rows
    near = {
        name: {str(n): tau[f"sorted, {n}"] / tau[f"separate, {n}"] for n in exits}
        for name, tau in found.items()
    }
    shape = {
        "near_the_separate_ones": all(
            share >= NEAR for each in near.values() for share in each.values()
        ),
        "above_the_one_cut_short": all(
            tau[f"sorted, {n}"] > tau[f"cut short, {n}"]
            for tau in found.values()
            for n in exits[:-1]
        ),
    }
    weights = {n: model.num_parameters() for n, model in separate.items()}
    return {
        "claim": "one sorted draft is within a few per cent of separately trained ones for every "
        "target, with a part of the training and memory, and far above an unsorted one cut short",
        "experiment": f"{' and '.join(targets)}, drafts of hidden size {hidden} trained on "
        f"{tokens:,} tokens each, {prompts} held-out prompts of code",
        "tau": found,
        "sorted_over_separate": near,
        "parameters": {"sorted": weights[exits[-1]], "separate": sum(weights.values())},
        "shape": shape,
        "because": because(found, near, shape),
        "shape_reproduced": all(shape.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=["reference", "reference-draft"])
    parser.add_argument("--tokens", type=int, default=1_000_000, help="to train each draft on")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
