"""Tables as plots: ratios with their quartiles."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .tables import Table


def draw(tables: Sequence[Table]) -> Figure:
    """Return one plot for each table: lines where its axis is numeric, bars otherwise."""
    heights = [1.2 + 0.35 * (len(table.rows) if _drawn_as_bars(table) else 8) for table in tables]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    axes = figure.subplots(len(tables), squeeze=False, height_ratios=heights)[:, 0]
    for table, ax in zip(tables, axes, strict=True):
        (_draw_bars if _drawn_as_bars(table) else _draw_lines)(ax, table)
        ax.set_title(table.title, fontsize=9)
        ax.grid(alpha=0.3)
    return figure


def _drawn_as_bars(table: Table) -> bool:
    return not all(isinstance(point, int) for point in table.points())


def _draw_bars(ax: Axes, table: Table) -> None:
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


def _draw_lines(ax: Axes, table: Table) -> None:
    for name in table.names():
        drawn = [(row.point, ratio) for row in table.rows if row.name == name and (ratio := table.ratio(row))]
        if not drawn:  # not measured anywhere
            continue
        points, ratios = [point for point, _ in drawn], [ratio for _, ratio in drawn]
        ax.plot(points, [ratio.median for ratio in ratios], marker="o", label=name)
        ax.fill_between(points, [r.low for r in ratios], [r.high for r in ratios], alpha=0.2)
    ax.set_xscale("log", base=2)
    ax.set_xticks(table.points(), labels=map(str, table.points()))
    ax.set_xlabel(table.axis)
    ax.set_ylabel(f"time / {table.reference}")
    ax.legend(fontsize=8)
