"""Measuring and reporting, the same for every benchmark here; README.md has the protocol and its reasons.

contestants --race()--> samples --Row, Table--> medians and ratios --Report--> .json, .md, .png
one call    --peak_memory()--> bytes
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

NOT_MEASURED = "not measured"
RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path("runs") / "benchmarks"  # not kept: a quick run proves that a script works, no more
PACKAGES = ("minilora", "torch", "safetensors", "transformers", "peft", "loralib", "adapters")
MATRIX_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


# Measuring


class NotMeasured(Exception):
    """A row that cannot be measured here; the message is the reason, and goes into the table."""


Clock = Callable[[Callable[[], object]], float]
"""Calls a function and returns the seconds that it took."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One thing to be timed."""

    name: str
    """Its row in the table."""
    run: Callable[[], object]
    """What is timed."""
    prepare: Callable[[], object] | None = None
    """Called before each `run`, off the clock."""


def wall_clock(device: torch.device) -> Clock:
    """Return a clock for work that keeps the host busy; it waits for the device before and after."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else _nothing

    def clock(run: Callable[[], object]) -> float:
        synchronise()
        start = time.perf_counter()
        run()
        synchronise()
        return time.perf_counter() - start

    return clock


def device_clock(device: torch.device) -> Clock:
    """Return a clock for work on the device: CUDA events there, the wall clock on a CPU."""
    return _event_clock if device.type == "cuda" else wall_clock(device)


def _event_clock(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _nothing() -> None:
    pass


def race(
    contestants: Sequence[Contestant],
    *,
    clock: Clock,
    rounds: int,
    warmup: int = 2,
    shortest: float = 0.0,
) -> dict[str, list[float]]:
    """Time the contestants in turn, round by round, in changing order.

    A round is short, so what slows the machine for a while slows all contestants of that round, and drops
    out of their ratios. Each round starts with another contestant, and every second one runs backwards,
    so that nobody always inherits the same caches.

    Args:
        contestants: what to time; names are unique.
        clock: how to time one call.
        rounds: samples for each contestant.
        warmup: calls of each contestant before the first round.
        shortest: seconds that a sample should last; shorter calls are repeated within it, equally often
            for all contestants, going by the quickest one's last warm-up call. Nothing is repeated where a
            contestant has a `prepare`.

    Returns:
        Seconds per call, by contestant, one for each round.
    """
    quickest = math.inf
    for contestant in contestants:
        for call in range(warmup):
            _prepare(contestant)
            seconds = clock(contestant.run)
            if call == warmup - 1:
                quickest = min(quickest, seconds)
    calls = 1
    if not any(contestant.prepare for contestant in contestants):
        calls = max(1, math.ceil(shortest / max(quickest, 1e-7)))
    samples: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for number in range(rounds):
        shift = number % len(contestants)
        order = [*contestants[shift:], *contestants[:shift]]
        for contestant in reversed(order) if number % 2 else order:
            _prepare(contestant)
            with _no_garbage_collection():
                seconds = clock(partial(_repeat, contestant.run, calls))
            samples[contestant.name].append(seconds / calls)
    return samples


def _prepare(contestant: Contestant) -> None:
    if contestant.prepare is not None:
        contestant.prepare()


def _repeat(run: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        run()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that tensors held during a call, above what they held before it.

    On CUDA, from `torch.cuda.max_memory_allocated`. On a CPU, the same quantity from the allocation events
    of torch's profiler: exact and repeatable, unlike the size of the process. Scratch memory inside
    oneDNN and memory that is not torch's are in neither. The CPU's figure takes no notice of the freeing
    of tensors that are older than the call.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def resident_memory(tensors: Iterable[Tensor]) -> int:
    """Return the bytes behind some tensors, those shared counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep the profiler's start and stop notices, written by its C++ part, off the terminal."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


# Statistics


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the median and the quartiles of one or more values, interpolated between neighbours."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "q1": self.low, "q3": self.high}


def pairwise_ratios(samples: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Return the ratios of samples to the reference's of the same rounds."""
    return [own / other for own, other in zip(samples, reference, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one contestant, or why it was not."""

    name: str
    """The contestant."""
    point: str | int | None = None
    """Where on the table's axis, if it has one."""
    samples: Sequence[float] = ()
    """Seconds per call, one for each round."""
    memory: int | None = None
    """Bytes; the table says of what."""
    extra: dict[str, float] = field(default_factory=dict)
    """Other figures, by column."""
    reason: str = ""
    """Why it was not measured."""


@dataclass(kw_only=True)
class Table:
    """Rows that are compared with one another."""

    title: str
    """What was measured, with every setting that matters."""
    reference: str
    """Name of the row that times are divided by."""
    rows: list[Row]
    """With an axis, the contestants of each point one after the other."""
    axis: str | None = None
    """What `Row.point` is: tokens per step, an operation; None for a table with one row per contestant."""
    memory_reference: str | None = None
    """Name of the row that memory is divided by; None for the reference itself."""
    memory_label: str = "peak memory"
    """What `Row.memory` is."""
    formats: dict[str, Callable[[float], str]] = field(default_factory=dict)
    """How to print the extra columns, in their order."""

    def ratio(self, row: Row) -> Spread | None:
        """Return a row's time in units of the reference's, from pairs of the same round."""
        reference = self._peer(row, self.reference)
        if not row.samples or reference is None or not reference.samples:
            return None
        return Spread.of(pairwise_ratios(row.samples, reference.samples))

    def memory_ratio(self, row: Row) -> float | None:
        """Return a row's memory in units of the memory reference's."""
        reference = self._peer(row, self.memory_reference or self.reference)
        if row.memory is None or reference is None or not reference.memory:
            return None
        return row.memory / reference.memory

    def names(self) -> list[str]:
        """Return the contestants."""
        return list(dict.fromkeys(row.name for row in self.rows))

    def points(self) -> list[str | int | None]:
        """Return the places on the axis."""
        return list(dict.fromkeys(row.point for row in self.rows))

    def at(self, point: str | int | None, name: str) -> Row:
        """Return the row of a contestant at a point."""
        found = [row for row in self.rows if (row.point, row.name) == (point, name)]
        return found[0] if found else Row(name=name, point=point, reason="no such row")

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON values: every sample, and what the tables print."""
        return {
            "title": self.title,
            "reference": self.reference,
            "axis": self.axis,
            "memory": self.memory_label,
            "rows": [self._row_to_dict(row) for row in self.rows],
        }

    def markdown(self) -> str:
        """Return the table as Markdown."""
        parts = [f"## {self.title}", self._times()]
        if self.axis is not None and any(row.memory is not None for row in self.rows):
            parts += [f"{self.memory_label.capitalize()}:", self._memories()]
        if reasons := {row.name: row.reason for row in self.rows if row.reason}:
            parts.append("\n".join(f"- {name}: {NOT_MEASURED}, {why}" for name, why in reasons.items()))
        return "\n\n".join(parts)

    def _peer(self, row: Row, name: str) -> Row | None:
        return next((peer for peer in self.rows if (peer.point, peer.name) == (row.point, name)), None)

    def _row_to_dict(self, row: Row) -> dict[str, object]:
        ratio = self.ratio(row)
        return {
            "name": row.name,
            "point": row.point,
            "seconds": Spread.of(row.samples).to_dict() if row.samples else None,
            "ratio": ratio.to_dict() if ratio else None,
            "memory_bytes": row.memory,
            "memory_ratio": self.memory_ratio(row),
            **{name.replace(" ", "_"): value for name, value in row.extra.items()},
            "not_measured": row.reason or None,
            "samples_seconds": list(row.samples),
        }

    def _times(self) -> str:
        if self.axis is not None:
            header = [self.axis, *self.names()]
            lines = [
                [str(point), *(self._time_and_ratio(self.at(point, name)) for name in self.names())]
                for point in self.points()
            ]
            return _markdown_table(header, lines)
        with_memory = any(row.memory is not None for row in self.rows)
        header = ["", "time", f"× {self.reference} [quartiles]"]
        if with_memory:
            header += [self.memory_label, f"× {self.memory_reference or self.reference}"]
        header += list(self.formats)
        lines = []
        for row in self.rows:
            line = [row.name, _time(row), _ratio(self.ratio(row))]
            if with_memory:
                line += [_memory(row.memory), _plain_ratio(self.memory_ratio(row))]
            line += [
                show(row.extra[name]) if name in row.extra else "" for name, show in self.formats.items()
            ]
            lines.append(line)
        return _markdown_table(header, lines)

    def _memories(self) -> str:
        header = [self.axis or "", *self.names()]
        lines = [
            [str(point), *(_memory(self.at(point, name).memory) for name in self.names())]
            for point in self.points()
        ]
        return _markdown_table(header, lines)

    def _time_and_ratio(self, row: Row) -> str:
        if row.name == self.reference or not row.samples:
            return _time(row)
        return f"{_time(row)}, {_ratio(self.ratio(row))}"


def time_text(seconds: float) -> str:
    """Return a time in the unit that reads best, with three significant digits."""
    units = (("s", 1.0), ("ms", 1e3), ("µs", 1e6))
    unit, factor = next((each for each in units if abs(seconds) * each[1] >= 1), units[-1])
    value = seconds * factor
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(abs(value), 1))))}f} {unit}"


def _time(row: Row) -> str:
    return time_text(Spread.of(row.samples).median) if row.samples else NOT_MEASURED


def _ratio(ratio: Spread | None) -> str:
    return f"{ratio.median:.3f} [{ratio.low:.3f}–{ratio.high:.3f}]" if ratio else ""


def _plain_ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f}"


def _memory(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f} MiB"


def _markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(3, *(len(line[i]) for line in [header, *lines])) for i in range(len(header))]

    def rendered(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return "\n".join([rendered(header), rule, *(rendered(line) for line in lines)])


# Reporting


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
        return "\n\n".join([*head, *(table.markdown() for table in self.tables)]) + "\n"

    def figure(self) -> Figure:
        """Return one plot for each table: bars, or lines along a numeric axis."""
        heights = [1.2 + 0.35 * (len(t.rows) if _drawn_as_bars(t) else 8) for t in self.tables]
        figure = Figure(figsize=(9, sum(heights)), layout="constrained")
        axes = figure.subplots(len(self.tables), squeeze=False, height_ratios=heights)[:, 0]
        for table, ax in zip(self.tables, axes, strict=True):
            (_draw_bars if _drawn_as_bars(table) else _draw_lines)(ax, table)
            ax.set_title(table.title, fontsize=9)
            ax.grid(alpha=0.3)
        if self.options.get("quick"):
            figure.suptitle("A quick run on tiny models: the figures mean nothing", fontsize=9)
        return figure

    def write(self, output: Path) -> None:
        """Print the report, and write it as `.json`, `.md` and `.png`, whatever the given path ends in."""
        output.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        # Samples, one line for each row: they are for programs, the rest is for people too.
        content = re.sub(r"\[[\d\s.,e-]+\]", lambda found: re.sub(r"\s+", "", found[0]), content)
        output.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")
        self.figure().savefig(output.with_suffix(".png"), dpi=120)
        print(self.markdown())
        print(f"Written: {output.with_suffix('.json')}, .md, .png")


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_fact(item)}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _drawn_as_bars(table: Table) -> bool:
    return not all(isinstance(point, int) for point in table.points())


def _draw_bars(ax, table: Table) -> None:
    drawn = [(row, ratio) for row in table.rows if (ratio := table.ratio(row))]
    if table.axis is not None:  # the line at 1 says it all
        drawn = [(row, ratio) for row, ratio in drawn if row.name != table.reference]
    labels = [row.name if row.point is None else f"{row.point}: {row.name}" for row, _ in drawn]
    for label, (row, ratio) in zip(labels, drawn, strict=True):
        color = "C7" if row.name == table.reference else "C0" if "minilora" in row.name else "C1"
        error = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
        ax.barh(label, ratio.median, xerr=error, color=color, capsize=3)
        ax.annotate(f" {ratio.median:.2f}", (ratio.high, label), va="center", fontsize=8)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.margins(x=0.12)
    ax.set_xlim(left=0)
    ax.invert_yaxis()
    ax.set_xlabel(f"time / {table.reference}; bars to the quartiles")


def _draw_lines(ax, table: Table) -> None:
    for name in table.names():
        drawn = [(row.point, ratio) for row in table.rows if row.name == name and (ratio := table.ratio(row))]
        points, ratios = [point for point, _ in drawn], [ratio for _, ratio in drawn]
        ax.plot(points, [ratio.median for ratio in ratios], marker="o", label=name)
        ax.fill_between(points, [r.low for r in ratios], [r.high for r in ratios], alpha=0.2)
    ax.set_xscale("log", base=2)
    ax.set_xticks(table.points(), labels=map(str, table.points()))
    ax.set_xlabel(table.axis)
    ax.set_ylabel(f"time / {table.reference}")
    ax.legend(fontsize=8)


# The machine


def describe_environment(device: torch.device) -> dict[str, object]:
    """Return what a reader needs to judge the figures: hardware, threads, versions. No names of machines."""
    return {
        "device": _gpu() if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _gpu() -> str:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    precision = torch.get_float32_matmul_precision()
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, "
        f"float32 matmul precision {precision!r}"
    )


def _cpu() -> str:
    name, flags = platform.processor(), set()
    with contextlib.suppress(OSError):
        information = Path("/proc/cpuinfo").read_text()
        if found := re.search(r"^model name\s*:\s*(.+)$", information, re.MULTILINE):
            name = found[1]
        if found := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", information, re.MULTILINE):
            flags = set(found[1].split())
    features = [flag for flag in MATRIX_FEATURES if flag in flags]
    return ", ".join([name or platform.machine(), f"{os.cpu_count()} cores", *features])


def _version(package: str) -> str | None:
    if package == "minilora":  # it may be run from a checkout
        import minilora

        return minilora.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# The command line


def parser_for(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument(
        "--rounds", type=positive, default=rounds, help="timed rounds; every contestant runs once in each"
    )
    parser.add_argument("--rank", type=positive, default=8, help="rank r of the updates; alpha is 2 r")
    parser.add_argument(
        "--threads", type=positive, help="CPU threads of torch; by default torch's own choice"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and inputs")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny models and few rounds: shows that the script works; the figures mean nothing",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="where to write the .json, .md and .png; by default "
        "benchmarks/results/<date>-<benchmark>-<device>, or runs/benchmarks/ with --quick",
    )
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def positive(text: str) -> int:
    """Read a whole number from 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def start(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line and set torch up accordingly; `args.device` is a `torch.device` afterwards."""
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if args.quick:
        args.rounds = min(args.rounds, 3)
        args.threads = args.threads or 1  # tiny matrices are no work for two
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.device = torch.device(args.device)
    return args


def finish(benchmark: str, args: argparse.Namespace, tables: list[Table]) -> None:
    """Report the tables of a run: print them, and write them where the command line says."""
    folder = QUICK_RESULTS if args.quick else RESULTS
    output = args.output or folder / f"{date.today().isoformat()}-{benchmark}-{args.device.type}.json"
    options = {
        name: str(value) if isinstance(value, torch.device) else value
        for name, value in vars(args).items()
        if name != "output"  # a path says something of the machine, and nothing of the measurement
    }
    Report(
        benchmark=benchmark, options=options, environment=describe_environment(args.device), tables=tables
    ).write(output)
