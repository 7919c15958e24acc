"""The benchmarks: what a step, a forward pass and all around them take."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from bench import history
from bench.markdown import compared, curve, grid, memory_cell, ratio_cell
from bench.tables import Table
from bench.unmeasured import NOT_MEASURED

from .sources import BENCHMARKS, benchmark

AXES = ("tokens", "rank", "length", "layers")


def ratio(content: dict[str, Any], name: str, *, title: Sequence[str], point: str | None = None) -> str:
    """The median ratio of one row, in the table whose title has all these parts."""
    for table in content["tables"]:
        if all(part in table["title"] for part in title):
            for row in table["rows"]:
                if row["name"] == name and row["point"] == point:
                    return f"{row['ratio']['median']:.2f}"
    raise SystemExit(f"{content['benchmark']}: no row {name!r}, {point!r}, in a table of {title}")


def speeds() -> str:
    """README: time against the bound, beside PEFT."""
    lines = []
    training, inference = benchmark("train_speed-cpu"), benchmark("merge_speed-cpu")
    overhead = benchmark("overhead-cpu")
    for precision, words in (("fp32", "fp32"), ("bf16-autocast", "bf16 autocast")):
        for targets, sites in (("all-linear", "every linear layer"), ("qv", "query + value")):
            title = (f", {targets},", precision)
            pair = (ratio(training, name, title=title) for name in ("minilora", "PEFT"))
            lines.append([f"training step, {sites}, {words}; x frozen base", *pair])
    for form, words in (("unmerged", "unmerged"), ("merged", "merged")):
        pair = (ratio(inference, f"{name} {form}", title=("forward",)) for name in ("minilora", "PEFT"))
        lines.append([f"inference, {words}; x bare model", *pair])
    fused = ratio(inference, "minilora fused to bf16", title=("forward",))
    lines.append(["inference, fused to bf16; x bare float32 model", fused, "-"])
    imports = {row["name"]: row.get("added") for row in overhead["tables"][0]["rows"]}
    lines.append(
        [
            "import, on top of torch, seconds",
            *(f"{imports[f'+ {name}']:+.2f}" for name in ("minilora", "PEFT")),
        ]
    )
    operations = ("inject", "load", "merge")
    ours = (ratio(overhead, "minilora", title=("all-linear",), point=operation) for operation in operations)
    lines.append([f"{' / '.join(operations)}, every linear layer; x PEFT", " / ".join(ours), "1"])
    lines.append(["GPU", NOT_MEASURED, NOT_MEASURED])
    threads = training["environment"]["threads"]
    peft = training["environment"]["versions"]["peft"]
    return grid([f"speed, {threads} CPU cores", "minilora", f"PEFT {peft}"], lines)


def tables(name: str, *columns: str) -> dict[str, Table]:
    """The tables of the newest result of a benchmark, by the given names, in their order."""
    found = [Table.from_dict(values) for values in benchmark(name)["tables"]]
    for table in found:
        table.memory_reference = "PEFT"
    return dict(zip(columns or map(str, range(len(found))), found, strict=True))


def steps() -> dict[str, Table]:
    """A training step in four set-ups."""
    setups = [f"{sites}, {words}" for words in ("fp32", "bf16 autocast") for sites in ("q+v", "all linear")]
    return tables("train_speed-cpu", *setups)


def recipe() -> dict[str, Table]:
    """A training step on the sentences of SST-2, with dropout and without."""
    with_dropout = tables("train_speed-minilm-dropout-cpu", "q+v, dropout 0.1", "all linear, dropout 0.1")
    return with_dropout | tables("train_speed-minilm-cpu", "q+v, no dropout", "all linear, no dropout")


def sixteen_bits() -> dict[str, Table]:
    """A training step on a base stored in 16 bits, and under autocast."""
    return tables("train_speed-llama-135m-bf16-cpu", "stored in bfloat16", "bf16 autocast")


def dora() -> dict[str, Table]:
    """A training step with DoRA, in units of one without."""
    return tables("train_speed-dora-cpu", "q+v", "every linear layer")


def around() -> str:
    """What surrounds a step, in units of PEFT's time."""
    columns = list(tables("overhead-cpu").values())[1:]
    lines = [
        [str(point), *(ratio_cell(table, table.at(point, "minilora")) for table in columns)]
        for point in columns[0].points()
    ]
    return grid(["operation", "q+v", "every linear layer"], lines)


def bank() -> str:
    """Many adapters in one batch; the larger batch from the run that was its own."""
    small = list(tables("many_adapters-llama-135m-cpu").values())
    large = list(tables("many_adapters-llama-135m-64-cpu").values())
    names = ("minilora merged", "minilora bank", "PEFT")
    lines = []
    for table in (*small[:2], *large[:2]):
        rows = re.search(r"\d+ rows", table.title)
        assert rows is not None
        work = "one pass" if "one forward pass" in table.title else "token by token"
        for point in table.points():
            cells = (table.at(point, name) for name in names)
            ratios = [table.ratio(cell) for cell in cells]
            shown = [f"{ratio.median:.2f}" if ratio else NOT_MEASURED for ratio in ratios]
            lines.append([f"{rows[0]}, {work}", str(point), *shown])
    return grid(["batch", "adapters in the bank", "one merged", "bank", "PEFT, `adapter_names`"], lines)


def coming_and_going() -> str:
    """What loading and switching an adapter takes."""
    table = list(tables("many_adapters-llama-135m-cpu").values())[-1]
    return curve(table)


def over_time() -> str:
    """What was measured more than once: its ratios, the oldest first."""
    measured: dict[tuple[str, str, str], list[history.Entry]] = {}
    for entry in history.read(BENCHMARKS):
        measured.setdefault((entry.benchmark, entry.table, entry.row), []).append(entry)
    lines = [
        [
            benchmark.removesuffix("-cpu"),
            f"{table}: {row}",
            ", ".join(
                f"{entry.ratio} ({entry.date}, {entry.commit}, {entry.machine.partition('(')[0].split()[0]})"
                for entry in entries
            ),
        ]
        for (benchmark, table, row), entries in measured.items()
        if len(entries) > 1
    ]
    return grid(["benchmark", "what", "ratio (date, commit, processor)"], lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "speeds": speeds,
    "train-steps": lambda: compared(steps(), ratio_cell),
    "train-memory": lambda: compared(steps(), memory_cell),
    "recipe-steps": lambda: compared(recipe(), ratio_cell),
    "recipe-memory": lambda: compared(recipe(), memory_cell),
    "sixteen-bit-steps": lambda: compared(sixteen_bits(), ratio_cell),
    "sixteen-bit-memory": lambda: compared(sixteen_bits(), memory_cell),
    "dora-steps": lambda: compared(dora(), ratio_cell),
    **{
        f"sweep-{axis}": lambda axis=axis: curve(*tables(f"train_speed-{axis}-cpu").values()) for axis in AXES
    },
    "around": around,
    "over-time": over_time,
    "bank": bank,
    "coming-and-going": coming_and_going,
}
