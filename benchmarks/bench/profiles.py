"""Profiles of two training steps side by side: in a table, in a file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

from .machine import describe_environment
from .markdown import grid
from .reports import enter, output_of

Times = Mapping[tuple[str, str], float]
"""Milliseconds per step of each operation, by its name and the shapes of its inputs."""


@dataclass(frozen=True)
class Profile:
    """The operations in which two steps differ most, and the sums over all."""

    title: str
    operations: Sequence[tuple[str, str, float, float]]
    """Name, input shapes, milliseconds in the bound's step, milliseconds in minilora's."""
    total: tuple[float, float]

    @classmethod
    def of(cls, title: str, bound: Times, own: Times, *, rows: int) -> Profile:
        """Return the profile of two steps, as far as they differ most."""
        keys = sorted(bound.keys() | own.keys(), key=lambda key: -abs(own.get(key, 0) - bound.get(key, 0)))
        kept = [(*key, bound.get(key, 0.0), own.get(key, 0.0)) for key in keys[:rows]]
        return cls(title, kept, (sum(bound.values()), sum(own.values())))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Profile:
        """Return a profile of a result's JSON."""
        return cls(values["title"], [tuple(each) for each in values["operations"]], tuple(values["total"]))

    def text(self) -> str:
        """Return it as a table in Markdown, milliseconds per step."""
        lines = [*self.operations, ("all", "", *self.total)]
        return grid(
            ["operation", "input shapes", "frozen-bound", "minilora", "difference"],
            [[name, shapes, f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}"] for name, shapes, a, b in lines],
        )


def write_profiles(profiles: Sequence[Profile], args: argparse.Namespace) -> None:
    """Print profiles, and write them where the command line says."""
    text = "\n\n".join(f"{each.title}; milliseconds per step\n\n{each.text()}" for each in profiles)
    print(text)
    today = date.today().isoformat()
    output = output_of("profile_step", args)
    report = {
        "benchmark": "profile_step",
        "date": today,
        "environment": describe_environment(args.device),
        "profiles": [asdict(each) for each in profiles],
    }
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(f"# profile_step, {today}\n\n{text}\n", encoding="utf-8")
    enter(output)
