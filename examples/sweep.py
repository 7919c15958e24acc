"""Choose a recipe on the held-out examples: one of the fine-tunes with every combination of some options.

Every run is an ordinary run of the script, in a folder of its own under --output; a complete one is not run
again, an interrupted one is resumed. The table is ordered by the held-out accuracy. The split that the script
reports is neither shown nor read: a recipe that was chosen on it could not be reported on it.

    python examples/sweep.py sst2 --vary lr 5e-4 1e-3 2e-3 -- --model minilm --limit 6000
    python examples/sweep.py imdb --vary method lora adapter both --vary lr 3e-4 1e-3 -- --limit 1500
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.folders import METRICS, STATE

SCRIPTS = ("sst2", "imdb")
RESULTS = "sweep.json"
PLACES = ("model", "data", "output")  # arguments that are paths; the names are beside them


def combinations(varied: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Every combination of the values, as option and value; `varied` has an option and its values in each."""
    names = [name for name, *_ in varied]
    return [
        dict(zip(names, values, strict=True)) for values in itertools.product(*(rest for _, *rest in varied))
    ]


def run(script: str, options: dict[str, str], fixed: Sequence[str], folder: Path) -> None:
    """Runs the script once, or goes on with it, or leaves it as it is if it is complete.

    Raises:
        SystemExit: The script failed; its exit code goes on.
    """
    if (folder / METRICS).exists() and json.loads((folder / METRICS).read_text())["completed"]:
        return
    command = [sys.executable, str(Path(__file__).parent / f"{script}.py")]
    if (folder / STATE).exists():
        command += ["--resume", str(folder)]
    else:
        command += [*fixed, *(part for name, value in options.items() for part in (f"--{name}", value))]
        command += ["--output", str(folder), "--overwrite"]
    print(f"\n$ {' '.join(command[1:])}", flush=True)
    if code := subprocess.run(command, check=False).returncode:
        raise SystemExit(code)


def outcome(options: dict[str, str], folder: Path) -> dict[str, Any]:
    """What a complete run came to on its held-out examples, after each epoch."""
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    held_out = [epoch["held_out"] for epoch in metrics["epochs"]]
    return {
        "options": options,
        "model": metrics["model"],
        "data": metrics["data"]["name"],
        "examples": {name: metrics["data"]["examples"][name] for name in ("train", "held_out")},
        "arguments": {name: value for name, value in metrics["arguments"].items() if name not in PLACES},
        "train_loss": [epoch["train_loss"] for epoch in metrics["epochs"]],
        "held_out_loss": [each["loss"] for each in held_out],
        "held_out_accuracy": [each["accuracy"] for each in held_out],
    }


def table(outcomes: Sequence[dict[str, Any]]) -> str:
    """The outcomes, best first, as Markdown."""
    names = list(outcomes[0]["options"])
    header = [*names, "training loss", "held-out loss", "held-out accuracy", "by epoch"]
    lines = [header, ["---"] * len(header)]
    for each in sorted(outcomes, key=lambda each: -each["held_out_accuracy"][-1]):
        by_epoch = ", ".join(f"{value:.4f}" for value in each["held_out_accuracy"])
        figures = (each["train_loss"][-1], each["held_out_loss"][-1], each["held_out_accuracy"][-1])
        lines.append([*each["options"].values(), *(f"{value:.4f}" for value in figures), by_epoch])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not there yet and prints the table. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    own, fixed = argv[:at], argv[at + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What follows -- goes to every run as it is.",
    )
    parser.add_argument("script", choices=SCRIPTS)
    vary = "an option of the script, without its dashes, and the values to try; may be given several times"
    parser.add_argument(
        "--vary", nargs="+", action="append", required=True, metavar=("OPTION", "VALUE"), help=vary
    )
    output = "where the runs and sweep.json go (default: runs/sweep-<script>)"
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=output)
    args = parser.parse_args(own)
    if short := [name for name, *values in args.vary if not values]:
        parser.error(f"--vary {short[0]}: no values to try")
    folder = args.output or Path("runs") / f"sweep-{args.script}"

    outcomes = []
    for options in combinations(args.vary):
        each = folder / "-".join(f"{name}={value}" for name, value in options.items())
        run(args.script, options, fixed, each)
        outcomes.append(outcome(options, each))
    content = {"script": args.script, "runs": outcomes}
    (folder / RESULTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table(outcomes)}\n\nWritten: {folder / RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
