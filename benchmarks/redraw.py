"""Draw the plots of results anew from their samples; nothing is measured.

python benchmarks/redraw.py                      # all of benchmarks/results/
python benchmarks/redraw.py FILE.json ...
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bench.curves import draw_curves
from bench.parity import Parity, draw_parity
from bench.plots import draw
from bench.reports import RESULTS
from bench.tables import Table


def redraw(path: Path) -> Path:
    """Write the .png beside a result's .json, and return its path."""
    report = json.loads(path.read_text(encoding="utf-8"))
    if report["benchmark"] == "parity":
        figure = draw_parity(Parity.read(path))
    elif "curves" in report:
        figure = draw_curves(report["curves"], report["title"])
    else:
        figure = draw([Table.from_dict(table) for table in report["tables"]])
    figure.savefig(path.with_suffix(".png"))
    return path.with_suffix(".png")


def main(argv: Sequence[str] | None = None) -> None:
    """Redraw what the command line names, or all results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="results' .json files")
    drawn = (path.with_suffix(".json") for path in RESULTS.glob("*.png"))  # a profile is not
    for path in parser.parse_args(argv).files or sorted(drawn):
        print(redraw(path))


if __name__ == "__main__":
    main()
