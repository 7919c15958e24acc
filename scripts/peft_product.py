"""Write docs/peft-settings.md, which says what holds of PEFT's settings: python scripts/peft_product.py.

It takes a minute or more. What should hold and does not is printed, and the exit code is 1.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import peft
from peft_product import CHECKS, KINDS, VARIANTS, Kind, Outcome, settings, tried

PAGE = Path(__file__).parent.parent / "docs" / "peft-settings.md"


def outcomes(of: Sequence[Kind] = KINDS) -> list[Outcome]:
    """Return what comes of each setting of some kinds of layer."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, setting in enumerate(settings()):
            if setting.kind in of:
                found.append(tried(setting, Path(folder) / str(number)))
    return found


def row(name: str, of: Iterable[Outcome]) -> str:
    """Return a line of the table."""
    there = [outcome for outcome in of if not outcome.none]
    refused = [outcome for outcome in there if outcome.refused]
    whole = sum(outcome.holding == len(CHECKS) for outcome in there)
    holding, checks = sum(outcome.holding for outcome in there), len(CHECKS) * len(there)
    return f"| {name} | {len(there)} | {whole} | {len(refused)} | {holding:,} of {checks:,} |"


def table(found: Sequence[Outcome]) -> str:
    """Return the table, by kinds of layers, with the sum."""
    lines = [
        "| layers | settings | hold in every check | refused | checks that hold |",
        "|---|---|---|---|---|",
        *(row(kind.name, [o for o in found if o.setting.kind is kind]) for kind in KINDS),
        row("all", found),
    ]
    return "\n".join(lines)


def reasons(told: Iterable[tuple[str, Kind]]) -> str:
    """Return reasons with how often each is given, and for what."""
    counts: dict[str, Counter[str]] = {}
    for reason, kind in told:
        counts.setdefault(reason, Counter())[kind.name] += 1
    return "\n".join(
        f"- {sum(kinds.values())} ({'; '.join(kinds)}): {reason}" for reason, kinds in counts.items()
    )


def page(found: Sequence[Outcome]) -> str:
    """Return the page."""
    refused = reasons((o.refused, o.setting.kind) for o in found if o.refused)
    differing = reasons((why, o.setting.kind) for o in found for why in o.differs.values())
    none = reasons((o.none, o.setting.kind) for o in found if o.none)
    checks = "\n".join(f"- *{name}.* {check.__doc__}" for name, check in CHECKS.items())
    variants = "; ".join(VARIANTS)
    return f"""# PEFT's settings, one by one

Written by `python scripts/peft_product.py`, against PEFT {peft.__version__}. {len(KINDS)} small models,
each with layers of one kind, are crossed with {len(VARIANTS)} variants of the config: {variants}.

In PEFT each is filled with random values, as if it had been trained, and saved. The file is read here, and of
each setting {len(CHECKS)} things are checked:

{checks}

"The same" is to 1e-11 in float64, 1e-5 in float32 and 4e-2 in bfloat16, relative to the largest output if
that is above 1; and it has to differ from the base's, or from what was before the steps, by twice as much.
Dropout is drawn from one seed on both sides. A refused setting counts with none of its checks.

{table(found)}

Refused, by name, before anything has changed:

{refused}

Checks that do not hold, and are known not to:

{differing}

Settings that PEFT has none of, and what it says of them; they are not counted above:

{none}
"""


def main() -> int:
    """Write the page, and say what should hold and does not."""
    found = outcomes()
    failed = [
        f"{outcome.setting.name}: {check}: {how}"
        for outcome in found
        for check, how in outcome.failed.items()
    ]
    print(*failed, row("all", found), sep="\n")
    PAGE.write_text(page(found), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
