"""What a run leaves behind: its tables on the terminal, and a .json, a .md and a .png."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from . import history, plots
from .machine import describe_environment
from .markdown import table_text
from .tables import Table

RESULTS = Path(__file__).resolve().parents[1] / "results"
QUICK_RESULTS = Path("runs") / "benchmarks"  # not kept: a quick run proves that a script works, no more


def finish(benchmark: str, args: argparse.Namespace, tables: list[Table], *, variant: str = "") -> None:
    """Report the tables of a run: print them, and write them where the command line says.

    Args:
        benchmark: its name.
        args: the command line, with a model if there is one.
        tables: what was measured.
        variant: what sets this run apart, for its name; a model other than BERT is named anyway.
    """
    model = getattr(args, "model", "")
    model = "" if model.startswith("bert") else model
    benchmark = "-".join(part for part in (benchmark, model, variant) if part)
    output = output_of(benchmark, args)
    # A path says something of the machine, and nothing of the measurement.
    options = {
        name: str(value) if isinstance(value, torch.device) else value
        for name, value in vars(args).items()
        if name != "output"
    }
    if options.get("data"):
        options["data"] = Path(str(options["data"])).name
    report = Report(
        benchmark=benchmark, options=options, environment=describe_environment(args.device), tables=tables
    )
    report.write(output)
    enter(output)
    print(report.markdown())
    print(f"Written: {output.with_suffix('.json')}, .md, .png")


def output_of(benchmark: str, args: argparse.Namespace) -> Path:
    """Return where the results of a run go, if its command line names no place; the folder is made."""
    folder = QUICK_RESULTS if args.quick else RESULTS
    named = f"{date.today().isoformat()}-{benchmark}-{args.device.type}.json"
    output = Path(args.output or folder / named)
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def enter(output: Path) -> None:
    """Enter what was written into the history, if it stands among the results that are kept."""
    if output.resolve().parent == RESULTS:
        history.keep(output.with_suffix(".json"))


@dataclass(kw_only=True)
class Report:
    """The outcome of one run of one benchmark."""

    benchmark: str
    """Name, for the heading and the files."""
    options: dict[str, object]
    """What the command line said, defaults filled in."""
    environment: dict[str, object]
    """Machine and versions."""
    tables: list[Table]

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON values."""
        return {
            "benchmark": self.benchmark,
            "date": date.today().isoformat(),
            "options": self.options,
            "environment": self.environment,
            "tables": [table.to_dict() for table in self.tables],
        }

    def markdown(self) -> str:
        """Return the whole report as Markdown: what ran where, then the tables."""
        facts = "\n".join(f"- {name}: {_fact(value)}" for name, value in self.environment.items())
        head = [f"# {self.benchmark}, {date.today().isoformat()}", facts]
        if self.options.get("quick"):
            head.append("**A quick run on tiny models: it shows that the script works, and nothing else.**")
        head.append(f"Options: {_fact({k: v for k, v in self.options.items() if v is not None})}")
        return "\n\n".join([*head, *map(table_text, self.tables)]) + "\n"

    def write(self, output: Path) -> None:
        """Write the report as `.json`, `.md` and `.png`, whatever the given path ends in."""
        content = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        # Samples, one line for each row: they are for programs, the rest is for people too.
        content = re.sub(r"\[[\d\s.,e-]+\]", lambda found: re.sub(r"\s+", "", found[0]), content)
        output.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")
        figure = plots.draw(self.tables)
        if self.options.get("quick"):
            figure.suptitle("A quick run on tiny models: the figures mean nothing", fontsize=9)
        figure.savefig(output.with_suffix(".png"))


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_fact(item)}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
