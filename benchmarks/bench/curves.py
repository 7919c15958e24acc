"""Loss curves: smoothed, in a table, in a plot."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from .markdown import grid
from .plots import DPI, WIDTH, colour

Curves = dict[str, dict[str, list[float]]]
"""By precision and form, the loss at each step."""

WINDOW = 25  # steps in the mean that is shown


def smoothed(curve: Sequence[float]) -> list[float]:
    """Return the mean of the last `WINDOW` values at each step."""
    return [sum(curve[max(0, i - WINDOW + 1) : i + 1]) / min(i + 1, WINDOW) for i in range(len(curve))]


def curves_text(curves: Curves) -> str:
    """Return where each curve begins and ends, and how far the two of a precision come apart, as Markdown."""
    header = [
        "precision",
        "form",
        f"first {WINDOW}",
        f"last {WINDOW}",
        "largest gap between the smoothed curves",
    ]
    lines = []
    for precision, pair in curves.items():
        plain, fast = (smoothed(curve) for curve in pair.values())
        gap = max(abs(a - b) for a, b in zip(plain, fast, strict=True))
        for name, curve in zip(pair, (plain, fast), strict=True):
            first, last = curve[min(WINDOW, len(curve)) - 1], curve[-1]
            lines.append([precision, name, f"{first:.4f}", f"{last:.4f}", f"{gap:.4f}"])
    return grid(header, lines)


def draw_curves(curves: Curves, title: str) -> Figure:
    """Return for each precision both curves, and below them how far they come apart."""
    figure = Figure(figsize=(WIDTH, 3.6), dpi=DPI, layout="constrained")
    above, below = figure.subplots(
        2, len(curves), squeeze=False, sharex=True, sharey="row", height_ratios=(2, 1)
    )
    for ax, gap, (precision, pair) in zip(above, below, curves.items(), strict=True):
        both = [smoothed(curve) for curve in pair.values()]
        for name, curve, style, width in zip(pair, both, ("-", "--"), (3.5, 1.2), strict=True):
            ax.plot(curve, style, label=name, color=colour(name), linewidth=width)
        gap.plot([fast - plain for plain, fast in zip(*both, strict=True)], color=colour("minilora"))
        ax.set_title(precision, fontsize=9)
        gap.set_xlabel("step", fontsize=8)
        for each in (ax, gap):
            each.grid(alpha=0.25)
            each.tick_params(labelsize=8)
    above[0].legend(fontsize=8)
    above[0].set_ylabel(f"loss, mean of {WINDOW} steps", fontsize=8)
    below[0].set_ylabel("difference", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure
