"""Write the measured figures of README.md and of the pages of results: make results.

    python scripts/make_results.py --check

A page says where a block of figures stands, between `<!-- figures: NAME -->` and `<!-- end -->`; what stands
there comes from the files under docs/results/ and benchmarks/results/ that the examples and the benchmarks
wrote. With `--check` nothing is written, and the exit code says whether anything would be.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # whose tables some of these are,
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # and whose others,
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # and whose the rest

import matrix
from figures import fine_tunes, speed, targets
from figures.sources import ROOT, RUNS

PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "results.md",
    ROOT / "docs" / "performance.md",
    ROOT / "docs" / "many-adapters.md",
    ROOT / "docs" / "compatibility.md",
)
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


BLOCKS: dict[str, Callable[[], str]] = {
    **fine_tunes.BLOCKS,
    **speed.BLOCKS,
    **targets.BLOCKS,
    "matrix": lambda: matrix.table(matrix.recorded(RUNS / "matrix.json")),
}


def filled(page: str) -> str:
    """The page with every block of figures written anew.

    Raises:
        SystemExit: There is no such block.
    """

    def block(found: re.Match[str]) -> str:
        if found[2] not in BLOCKS:
            raise SystemExit(f"no block {found[2]!r}; there are: {', '.join(BLOCKS)}")
        return f"{found[1]}\n{BLOCKS[found[2]]()}\n\n{found[3]}"

    return BLOCK.sub(block, page)


def main(argv: Sequence[str]) -> int:
    """Write the pages, or say which are out of date. Returns the exit code."""
    stale = 0
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after == before:
            continue
        stale += 1
        if argv == ["--check"]:
            print(f"{path.relative_to(ROOT)} has other figures than the files it names; run make results")
        else:
            path.write_text(after, encoding="utf-8")
            print(f"Written: {path.relative_to(ROOT)}")
    return int(argv == ["--check"] and stale > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
