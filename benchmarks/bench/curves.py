"""Loss curves: smoothed, in a table, in a plot."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from .markdown import grid

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
    """Return one panel for each precision."""
    figure = Figure(figsize=(4 * len(curves), 3.2), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for ax, (precision, pair) in zip(axes, curves.items(), strict=True):
        for (name, curve), style in zip(pair.items(), ("-", "--"), strict=True):
            ax.plot(smoothed(curve), style, label=name)
        ax.set_title(precision, fontsize=9)
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    axes[0].set_ylabel(f"training loss, mean of {WINDOW} steps")
    figure.suptitle(title, fontsize=9)
    return figure
