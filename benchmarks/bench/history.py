"""How the ratios went over time: one line for each of minilora's rows, at every run that was kept."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

HISTORY = "history.csv"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A ratio that was measured once."""

    date: str
    """When, as YYYY-MM-DD."""
    commit: str
    """Of what: the commit that was checked out, with a + where the files differed from it."""
    machine: str
    """On what."""
    benchmark: str
    """Name and device, as the files of the result have them."""
    table: str
    """The table's title: what was measured, with every setting that matters."""
    row: str
    """The contestant, and where on the table's axis, if it has one."""
    ratio: str
    """Its time in units of the reference's: the median of pairs."""


def entries(report: dict[str, Any], *, benchmark: str, commit: str) -> Iterator[Entry]:
    """Yield the entries of a result's JSON."""
    for table in report.get("tables", ()):
        for row in table["rows"]:
            if row["ratio"] and "minilora" in row["name"] and row["name"] != table["reference"]:
                yield Entry(
                    date=report["date"],
                    commit=commit,
                    machine=report["environment"]["device"],
                    benchmark=benchmark,
                    table=table["title"],
                    row=row["name"] if row["point"] is None else f"{row['name']}, {row['point']}",
                    ratio=f"{row['ratio']['median']:.3f}",
                )


def read(folder: Path) -> list[Entry]:
    """Return the history of a folder of results, oldest first, or nothing. Inverse: `write`."""
    path = folder / HISTORY
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [Entry(**line) for line in csv.DictReader(file)]


def write(folder: Path, history: Iterable[Entry]) -> None:
    """Write the history of a folder of results anew. Inverse: `read`."""
    with (folder / HISTORY).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Entry)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(entry) for entry in history)


def keep(path: Path) -> None:
    """Enter a dated result into its folder's history, and delete the older results of the same benchmark.

    A run that is repeated on one day replaces what the day had.

    Args:
        path: `<date>-<benchmark>.json`.
    """
    report = json.loads(path.read_text(encoding="utf-8"))
    benchmark = path.stem.removeprefix(f"{report['date']}-")
    before = [
        entry for entry in read(path.parent) if (entry.date, entry.benchmark) != (report["date"], benchmark)
    ]
    write(path.parent, [*before, *entries(report, benchmark=benchmark, commit=commit())])
    for older in path.parent.glob(f"????-??-??-{benchmark}.*"):
        if older.stem < path.stem:
            older.unlink()


def commit() -> str:
    """Return the commit that is checked out, shortened, with a + where the files are not its own."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short=7", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "--untracked-files=no"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # not a checkout
    return f"{head}+" if changed.strip() else head
