"""The benchmarks: what a step, a forward pass and all around them take."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench import history
from bench.curves import curves_text
from bench.markdown import compared, curve, grid, memory_cell, ratio_cell, time_text
from bench.profiles import Profile
from bench.ratios import Spread
from bench.tables import Row as TableRow
from bench.tables import Table
from bench.unmeasured import NOT_MEASURED

from .sources import BENCHMARKS, benchmark

AXES = ("tokens", "rank", "length", "layers")
PAIR = ("minilora", "PEFT")
SITES = {"query + value": "qv", "every linear layer": "all-linear"}
"""What is adapted, and how titles call it."""
SETUPS = {
    f"{sites}, {words}": (targets, precision)
    for precision, words in (("fp32", "fp32"), ("bf16-autocast", "bf16 autocast"))
    for sites, targets in SITES.items()
}
"""The parts of their titles by which tables of a training step are found."""


@dataclass(frozen=True)
class Row:
    """Where a figure stands: a row of one of the tables of a benchmark's newest result."""

    benchmark: str
    title: tuple[str, ...]
    """Parts of the table's title, between its commas."""
    name: str
    point: str | None = None

    def ratio(self) -> Spread:
        """The row's time, in units of its table's reference."""
        values = self._values()["ratio"]
        return Spread(values["median"], values["q1"], values["q3"])

    def memory(self) -> float:
        """The row's memory, in units of PEFT's."""
        value: float = self._values()["memory_ratio"]
        return value

    def _values(self) -> dict[str, Any]:
        for table in benchmark(self.benchmark)["tables"]:
            if is_titled(table, self.title):
                for row in table["rows"]:
                    if (row["name"], row["point"]) == (self.name, self.point):
                        return row  # type: ignore[no-any-return]
        raise SystemExit(
            f"{self.benchmark}: no row {self.name!r}, {self.point!r}, in a table of {self.title}"
        )


def is_titled(values: dict[str, Any], parts: Sequence[str]) -> bool:
    """Whether a table's title, or a profile's, has all these parts between its commas."""
    return set(parts) <= set(values["title"].split(", "))


def step(setup: str, name: str) -> Row:
    """A training step in one of `SETUPS`."""
    return Row("train_speed-cpu", SETUPS[setup], name)


def recipe_step(sites: str, name: str, *, dropout: bool) -> Row:
    """A training step on the sentences of SST-2."""
    return Row(f"train_speed-minilm{'-dropout' if dropout else ''}-cpu", (SITES[sites],), name)


def forward(name: str) -> Row:
    """A forward pass."""
    return Row("merge_speed-cpu", ("one forward pass",), name)


def operation(point: str) -> Row:
    """One of the operations around a step, on every linear layer, in units of PEFT's."""
    return Row("overhead-cpu", ("all-linear",), "minilora", point)


def importing(library: str) -> Row:
    """An import, in units of that of torch and safetensors alone."""
    return Row("overhead-cpu", ("import",), f"+ {library}")


def median(row: Row) -> str:
    """The median of a row's ratio."""
    return f"{row.ratio().median:.2f}"


def range_of(values: Iterable[float]) -> str:
    """The least and the most of some numbers."""
    least, *_, most = sorted(values)
    return f"{least:.2f} to {most:.2f}"


def head() -> list[str]:
    """The header over minilora's and PEFT's figures, with the release of PEFT's."""
    return ["minilora", f"PEFT {benchmark('train_speed-cpu')['environment']['versions']['peft']}"]


def operations(*points: str) -> str:
    """Some operations around a step, one after the other."""
    return " / ".join(median(operation(point)) for point in points)


def speeds() -> str:
    """README: time against the bound, beside PEFT."""
    lines = [
        [f"training step, {setup}; x frozen base", *(median(step(setup, name)) for name in PAIR)]
        for setup in SETUPS
    ]
    lines += [
        [f"inference, {form}; x bare model", *(median(forward(f"{name} {form}")) for name in PAIR)]
        for form in ("unmerged", "merged")
    ]
    lines += [
        ["inference, fused to bf16; x bare float32 model", median(forward("minilora fused to bf16")), "-"],
        ["import; x torch and safetensors alone", *(median(importing(name)) for name in PAIR)],
        ["inject / load / merge, every linear layer; x PEFT", operations("inject", "load", "merge"), "1"],
        ["GPU", NOT_MEASURED, NOT_MEASURED],
    ]
    threads = benchmark("train_speed-cpu")["environment"]["threads"]
    return grid([f"speed, {threads} CPU cores", *head()], lines)


def costs() -> str:
    """What LoRA costs, and what PEFT takes for it: all that a user asks first."""
    lines = [
        [f"training step, {setup}", "frozen base", *(median(step(setup, name)) for name in PAIR)]
        for setup in SETUPS
    ]
    lines += [
        [
            f"training step with dropout, {sites}, SST-2's batches",
            "frozen base",
            *(median(recipe_step(sites, name, dropout=True)) for name in PAIR),
        ]
        for sites in SITES
    ]
    full = range_of(step(setup, "full fine-tuning").ratio().median for setup in SETUPS)
    lines += [
        ["full fine-tuning instead, without either", "frozen base", full, full],
        [
            "peak memory of the step, the first four",
            "PEFT",
            range_of(step(setup, "minilora").memory() for setup in SETUPS),
            "1",
        ],
    ]
    lines += [
        [f"inference, {form}", "bare model", *(median(forward(f"{name} {form}")) for name in PAIR)]
        for form in ("unmerged", "merged")
    ]
    lines += [
        ["inference, fused to bf16", "bare float32 model", median(forward("minilora fused to bf16")), ""],
        ["inject / load / merge, every linear layer", "PEFT", operations("inject", "load", "merge"), "1"],
        ["save / unmerge, every linear layer", "PEFT", operations("save", "unmerge"), "1"],
        ["import", "torch and safetensors", *(median(importing(name)) for name in PAIR)],
    ]
    return grid(["", "against", *head()], lines)


def machine(name: str) -> str:
    """What a benchmark ran on."""
    environment = benchmark(name)["environment"]
    versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
    return f"{environment['device']}; {environment['threads']} threads; {environment['system']}; {versions}"


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


def sites() -> str:
    """What an operation takes for each site, of few sites and of many, and in units of PEFT's time."""
    found = list(tables("overhead-sites-cpu").values())
    lines = []
    for table in found:
        rows = {point: table.at(point, "minilora") for point in table.points()}
        per_site = [
            f"{time_text(Spread.of(row.samples).median / int(point or 1))}, {median_text(table, row)}"
            for point, row in rows.items()
        ]
        lines.append([table.title.partition(",")[0], *per_site])
    return grid(["time for each site, x PEFT's", *(f"{point:,} sites" for point in found[0].points())], lines)


def median_text(table: Table, row: TableRow) -> str:
    """The median of a row's ratio, or why there is none."""
    ratio = table.ratio(row)
    return f"{ratio.median:.2f}" if ratio else NOT_MEASURED


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
            shown = [median_text(table, table.at(point, name)) for name in names]
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


def forms(name: str, part: str) -> str:
    """Inference in every form, and how far its outputs are from the unmerged ones."""
    (values,) = (each for each in benchmark(name)["tables"] if is_titled(each, (part,)))
    table = Table.from_dict(values)
    lines = [
        [row.name, ratio_cell(table, row), f"{value['difference_to_unmerged']:.1e}"]
        for row, value in zip(table.rows, values["rows"], strict=True)
        if row.samples
    ]
    return grid(["", "x base", "largest difference to the unmerged outputs"], lines)


def under_titles(name: str) -> str:
    """Every table of a benchmark, under its title."""
    return "\n\n".join(f"{table.title}:\n\n{curve(table)}" for table in tables(name).values())


def memory_of_kinds() -> str:
    """What steps with layers that are not linear hold at the peak, in units of PEFT's."""
    found = list(tables("train_speed-kinds-cpu").values())
    names = found[0].names()
    lines = [
        [
            f"{point}, {table.title.rsplit(', ', 1)[1]}",
            *(memory_cell(table, table.at(point, n)) for n in names),
        ]
        for table in found
        for point in table.points()
    ]
    return grid(["", *names], lines)


def profile_totals() -> str:
    """The sums over all operations of every profile, and the part of it that is narrow products."""
    lines = []
    known = set(itertools.chain(*SETUPS.values()))
    for values in benchmark("profile_step-cpu")["profiles"]:
        bound, own = values["total"]
        narrow = sum(ms for name, shapes, none, ms in values["operations"] if name == "mm" and not none)
        setup = ", ".join(part for part in values["title"].split(", ") if part in known)
        figures = (
            f"{bound:.0f}",
            f"{own:.0f}",
            f"{own / bound:.3f}",
            f"{narrow:.0f}",
            f"{narrow / bound:.3f}",
        )
        lines.append([setup, *figures])
    columns = ("frozen-bound", "minilora", "ratio", "narrow products", "of frozen-bound")
    return grid(["milliseconds of a step", *columns], lines)


def profile(*parts: str) -> str:
    """Where frozen-bound's step and minilora's differ, in the profile whose title has all these parts."""
    profiles = benchmark("profile_step-cpu")["profiles"]
    (values,) = (each for each in profiles if is_titled(each, parts))
    return Profile.from_dict(values).text()


BLOCKS: dict[str, Callable[[], str]] = {
    "speeds": speeds,
    "costs": costs,
    "machine": lambda: machine("train_speed-cpu"),
    "forms": lambda: forms("merge_speed-cpu", "one forward pass"),
    "forms-decode": lambda: forms("merge_speed-llama-135m-decode-cpu", "16 tokens decoded one by one"),
    "profile-fp32": lambda: profile("all-linear", "fp32"),
    "profile-totals": profile_totals,
    "profile-autocast": lambda: profile("all-linear", "bf16-autocast"),
    "kinds-steps": lambda: under_titles("train_speed-kinds-cpu"),
    "kinds-memory": memory_of_kinds,
    "skinny-products": lambda: under_titles("skinny_products-cpu"),
    "loss-curves": lambda: curves_text(benchmark("loss_curves-cpu")["curves"]),
    "loss-curves-sample": lambda: curves_text(benchmark("loss_curves-sample-cpu")["curves"]),
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
    "sites": sites,
    "over-time": over_time,
    "bank": bank,
    "coming-and-going": coming_and_going,
}
