"""Runs the claims of all methods, or some, and writes one page about what came out.

    python benchmarks/speculation/claims_report.py             # all; an hour
    python benchmarks/speculation/claims_report.py aded trees  # these; the page keeps the others

Each claim is a script in claims/ that prints JSON: the paper's claim, the scaled experiment, the
figures, for each part of the claim's shape whether it came out, and because of which figures it
did not. The answers are kept in
``claims/results`` with the conditions under which they were taken.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hasten.bench.conditions import conditions

HERE = Path(__file__).parent
RESULTS = HERE / "claims" / "results"
CLAIMS = {
    "aded": [],
    "token_recycling": [],
    "copyspec": [],
    "aggressive": [],
    "rasd": [],
    "trees": [],
    "easyspec": [],
    "pearl": ["-m", "wide/t05-int8", "--drafts", "wide/d60-int8", "wide/d25-int8"],
    "tree_calibration": [],
    "specdec_plus_plus": [],
    "smartspec": [],
    "fastdraft": ["--tokens", "400000", "--align-tokens", "60000"],
    "s2d": ["--tokens", "500000", "--no-compile"],
    "kangaroo": ["--train-tokens", "800000"],
    "dynamic_exit": ["--train-tokens", "800000", "--prompts", "8"],
}
"""Scripts with their arguments. Those that train have budgets of minutes on one core; ``pearl``
wants models in shapes where a pass is more than its calls, and says how they are made."""


def run(name: str, arguments: list[str]) -> None:
    """Run one claim and keep its answer."""
    module = f"benchmarks.speculation.claims.{name}"
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=HERE.parents[1],
    )
    if done.returncode:
        raise SystemExit(f"{module} ended with {done.returncode}")
    # those that train report progress before the answer
    keep(name, arguments, json.loads(done.stdout[done.stdout.index("{") :]))


def keep(name: str, arguments: list[str], found: dict[str, Any]) -> None:
    """Write an answer with the conditions of now."""
    module = f"benchmarks.speculation.claims.{name}"
    under = conditions()
    kept = {
        "date": under.date,
        "commit": under.commit,
        "machine": f"{under.cpu}, {under.cores} cores",
        "versions": under.versions,
    }
    command = " ".join(["python -m", module, *arguments])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(
        json.dumps({**found, "conditions": {**kept, "command": command}}, indent=1) + "\n"
    )


def page() -> str:
    """The page of all kept answers."""
    lines = [
        "# Claims of speculation methods, at the scale of the bundled models",
        "",
        "One row a claim: what the paper says, the scaled experiment, and which parts of the "
        "claim's shape came out. All figures: `claims/results/*.json`. Where a shape is not "
        "reproduced, the row says which part is not, and which figures say so.",
        "",
        "| script | claim | experiment | shape reproduced | parts | because |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        found: dict[str, Any] = json.loads(path.read_text())
        parts = ", ".join(
            f"{name.replace('_', ' ')}: {'yes' if came else '**no**'}"
            for name, came in found.get("shape", {}).items()
        )
        reproduced = "yes" if found["shape_reproduced"] else "**no**"
        lines.append(
            f"| `{path.stem}` | {found['claim']} | {found['experiment']} | {reproduced} | {parts} "
            f"| {found.get('because', '')} |"
        )
    lines += ["", "## Conditions", ""]
    for path in sorted(RESULTS.glob("*.json")):
        under = json.loads(path.read_text())["conditions"]
        lines.append(
            f"- `{under['command']}`: {under['date']}, commit {under['commit']}, {under['machine']}"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    chosen = sys.argv[1:] or list(CLAIMS)
    for name in chosen:
        if name not in CLAIMS:
            raise SystemExit(f"no claim '{name}'; there are: {', '.join(CLAIMS)}")
        run(name, CLAIMS[name])
        (HERE / "claims.md").write_text(page())
        print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main()
