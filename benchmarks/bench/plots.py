"""Tables as plots: ratios with their quartiles, one colour for each library in all of them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from .ratios import Spread
from .tables import Row, Table

WIDTH = 6.4  # inches: the width of a page of the documentation, and letters that a phone still shows
DPI = 160

# Okabe and Ito's, which also the colour-blind tell apart; of methods beside libraries, quieter ones.
COLOURS = {
    "minilora": "#0072B2",
    "PEFT": "#D55E00",
    "loralib": "#009E73",
    "adapters": "#CC79A7",
    "plain form": "#E69F00",
    "full fine-tuning": "#A9A9A9",
}
REFERENCE = "#555555"

# What an axis sweeps, in a title: there it would name one value of many.
SWEPT = {
    "layers": (r", \d+ layers", ""),
    "rank": (r", r = \d+", ""),
    "tokens per step": (r", batch \d+ x \d+", ""),
    "tokens per sequence": (r", batch (\d+) x (\d+)", lambda m: f", {int(m[1]) * int(m[2])} tokens a step"),
}
WORDS = {"qv": "query + value", "all-linear": "every linear layer", "bf16-autocast": "bf16 autocast"}

SPAN = 7  # from here on, the greatest ratio over the least is shown by its logarithm


def colour(name: str) -> str:
    """Return the colour of a contestant: its library's, whatever it does there."""
    return next((value for key, value in COLOURS.items() if key in name), REFERENCE)


def heading(table: Table) -> str:
    """Return the title of a plot, without the value of what is swept."""
    settings = table.title.split("; swept: ")[0]
    if table.axis in SWEPT:
        settings = re.sub(*SWEPT[table.axis], settings)
    return ", ".join(WORDS.get(setting, setting) for setting in settings.split(", "))


def draw(tables: Sequence[Table]) -> Figure:
    """Return one plot for each table: lines where its axis is numeric, bars otherwise."""
    heights = [1.1 + 0.3 * (len(_bars(table)) if _drawn_as_bars(table) else 8) for table in tables]
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(tables), squeeze=False, height_ratios=heights)[:, 0]
    for table, ax in zip(tables, axes, strict=True):
        (_draw_bars if _drawn_as_bars(table) else _draw_lines)(ax, table)
        ax.set_title(_in_lines(heading(table)), fontsize=9, loc="left", x=0)
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def _in_lines(settings: str, width: int = 62) -> str:
    """Break a title between settings, not within one."""
    whole = ", ".join(setting.replace(" ", "\N{NO-BREAK SPACE}") for setting in settings.split(", "))
    return textwrap.fill(whole, width, break_on_hyphens=False)


def _drawn_as_bars(table: Table) -> bool:
    return not all(isinstance(point, int) for point in table.points())


def _bars(table: Table) -> list[tuple[Row, Spread]]:
    drawn = [(row, ratio) for row in table.rows if (ratio := table.ratio(row))]
    if table.axis is None:
        return drawn
    return [(row, ratio) for row, ratio in drawn if row.name != table.reference]  # the line at 1 says it all


def _draw_bars(ax: Axes, table: Table) -> None:
    drawn = _bars(table)
    labels = [
        textwrap.fill(row.name if row.point is None else f"{row.point}: {row.name}", 34) for row, _ in drawn
    ]
    medians = [ratio.median for _, ratio in drawn]
    wide = bool(medians) and max(medians) > SPAN * min(medians)
    start = 1 if wide else 0  # a logarithm has no zero to start from: bars go from the reference
    for label, (row, ratio) in zip(labels, drawn, strict=True):
        error = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
        ax.barh(label, ratio.median - start, left=start, color=colour(row.name), height=0.7)
        ax.errorbar(ratio.median, label, xerr=error, color="black", capsize=3, linewidth=1)
        left = ratio.median < start  # a bar that goes from the reference to the left
        at, side = (ratio.low, "right") if left else (ratio.high, "left")
        ax.annotate(f" {ratio.median:.2f} ", (at, label), va="center", ha=side, fontsize=8)
    ax.axvline(1, color="black", linewidth=0.8)
    if wide:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.margins(x=0.12)
    if not wide:
        ax.set_xlim(left=0)
    ax.tick_params(labelsize=8)
    ax.invert_yaxis()
    ax.set_xlabel(f"time / {table.reference}{', log scale' if wide else ''}; whiskers: quartiles", fontsize=8)


def _draw_lines(ax: Axes, table: Table) -> None:
    seen: list[str] = []
    medians: list[float] = []
    spreads: list[Spread] = []
    for name in table.names():
        drawn = [(row.point, ratio) for row in table.rows if row.name == name and (ratio := table.ratio(row))]
        if not drawn:  # not measured anywhere
            continue
        points, ratios = [point for point, _ in drawn], [ratio for _, ratio in drawn]
        style = ("-", "--", ":")[seen.count(colour(name))]  # two of one library: the same colour
        seen.append(colour(name))
        ax.plot(points, [r.median for r in ratios], style, marker="o", ms=4, color=colour(name), label=name)
        ax.fill_between(
            points, [r.low for r in ratios], [r.high for r in ratios], color=colour(name), alpha=0.15, lw=0
        )
        medians += [r.median for r in ratios]
        spreads += ratios
    cut = _limit(ax, medians, spreads)
    ax.set_xscale("log", base=2)
    ax.set_xticks(table.points(), labels=map(str, table.points()))
    ax.minorticks_off()
    ax.tick_params(labelsize=8)
    ax.set_xlabel(f"{table.axis}; bands: quartiles{cut}", fontsize=8)
    ax.set_ylabel(f"time / {table.reference}", fontsize=8)
    if medians:
        ax.legend(fontsize=8)


def _limit(ax: Axes, medians: Sequence[float], spreads: Sequence[Spread]) -> str:
    """Show all medians, and of the quartiles what is near them; return what is said of the rest."""
    if not medians:  # nothing was measured
        return ""
    low, high = min(medians), max(medians)
    room = 0.3 * max(high - low, 0.1)
    bottom = max(low - room, min(spread.low for spread in spreads) - 0.2 * room)
    top = min(high + room, max(spread.high for spread in spreads) + 0.2 * room)
    ax.set_ylim(bottom, top)
    beyond = [edge for s in spreads for edge in (s.low, s.high) if not bottom <= edge <= top]
    return f", cut off at the edge (as far as {max(beyond, key=abs):.2f})" if beyond else ""
