"""Where the figures come from: the records of runs and the results of benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "docs" / "results"
BENCHMARKS = ROOT / "benchmarks" / "results"


def run(name: str) -> dict[str, Any]:
    """The record of one run, as an example script wrote it: `docs/results/<name>.json`."""
    return _read(RUNS / f"{name}.json")


def benchmark(name: str) -> dict[str, Any]:
    """The newest result of one benchmark."""
    return _read(newest(name))


def newest(name: str) -> Path:
    """Where it stands: `benchmarks/results/<date>-<name>.json`."""
    found = sorted(BENCHMARKS.glob(f"????-??-??-{name}.json"))
    if not found:
        raise SystemExit(f"no {name} in {BENCHMARKS}")
    return found[-1]


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
