"""Tables as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from .ratios import Spread
from .tables import Row, Table
from .unmeasured import NOT_MEASURED


def table_text(table: Table) -> str:
    """Return a table under its title: times and ratios, memory, and why a row was not measured."""
    parts = [f"## {table.title}"]
    if table.axis is None:
        parts.append(_line_for_each_row(table))
    else:
        parts.append(curve(table))
        if any(row.memory is not None for row in table.rows):
            parts += [f"{table.memory_label.capitalize()}:", _line_for_each_point(table, _memory_of)]
    if reasons := {row.name: row.reason for row in table.rows if row.reason}:
        parts.append("\n".join(f"- {name}: {NOT_MEASURED}, {why}" for name, why in reasons.items()))
    return "\n\n".join(parts)


def compared(tables: Mapping[str, Table], cell: Callable[[Table, Row], str]) -> str:
    """Return what several tables have of the same contestants, a column for each table.

    Args:
        tables: by the heads of their columns; without an axis.
        cell: what stands for a row of a table.
    """
    names = dict.fromkeys(name for table in tables.values() for name in table.names())
    measured = [name for name in names if all(table.at(None, name).samples for table in tables.values())]
    lines = [[name, *(cell(table, table.at(None, name)) for table in tables.values())] for name in measured]
    return grid(["", *tables], lines)


def ratio_cell(table: Table, row: Row) -> str:
    """Return a row's time in units of the reference's, with its quartiles."""
    return ratio_text(table.ratio(row))


def memory_cell(table: Table, row: Row) -> str:
    """Return a row's memory in units of the memory reference's."""
    ratio = table.memory_ratio(row)
    return "" if ratio is None else f"{ratio:.3f}"


def curve(table: Table) -> str:
    """Return a line for each point of the table's axis: times, and ratios to the reference."""
    return _line_for_each_point(table, _time_and_ratio)


def grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return cells in aligned columns, all but the first to the right."""
    widths = [max(3, *(len(line[i]) for line in [header, *lines])) for i in range(len(header))]

    def rendered(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return "\n".join([rendered(header), rule, *(rendered(line) for line in lines)])


def time_text(seconds: float) -> str:
    """Return a time in the unit that reads best, with three significant digits."""
    units = (("s", 1.0), ("ms", 1e3), ("µs", 1e6))
    unit, factor = next((each for each in units if abs(seconds) * each[1] >= 1), units[-1])
    value = seconds * factor
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(abs(value), 1))))}f} {unit}"


def ratio_text(ratio: Spread | None) -> str:
    """Return a ratio with its quartiles."""
    return f"{ratio.median:.3f} [{ratio.low:.3f}–{ratio.high:.3f}]" if ratio else ""


def _line_for_each_row(table: Table) -> str:
    with_memory = any(row.memory is not None for row in table.rows)
    header = ["", "time", f"× {table.reference} [quartiles]"]
    if with_memory:
        header += [table.memory_label, f"× {table.memory_reference or table.reference}"]
    header += list(table.formats)
    lines = []
    for row in table.rows:
        line = [row.name, _time(row), ratio_text(table.ratio(row))]
        if with_memory:
            ratio = table.memory_ratio(row)
            line += [_memory(row.memory), "" if ratio is None else f"{ratio:.3f}"]
        line += [show(row.extra[name]) if name in row.extra else "" for name, show in table.formats.items()]
        lines.append(line)
    return grid(header, lines)


def _line_for_each_point(table: Table, cell: Callable[[Table, Row], str]) -> str:
    header = [table.axis or "", *table.names()]
    lines = [
        [str(point), *(cell(table, table.at(point, name)) for name in table.names())]
        for point in table.points()
    ]
    return grid(header, lines)


def _time_and_ratio(table: Table, row: Row) -> str:
    if row.name == table.reference or not row.samples:
        return _time(row)
    return f"{_time(row)}, {ratio_text(table.ratio(row))}"


def _memory_of(_: Table, row: Row) -> str:
    return _memory(row.memory)


def _time(row: Row) -> str:
    return time_text(Spread.of(row.samples).median) if row.samples else NOT_MEASURED


def _memory(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f} MiB"
