"""Loss and accuracy in a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

LEAST_SPAN = 0.1  # of the axes of loss and accuracy


def plot_curves(metrics: dict[str, Any], step_losses: Sequence[float], path: Path) -> None:
    """Draws loss and accuracy over the epochs that there are.

    Args:
        metrics: The content of `metrics.json`, with one epoch at least.
        step_losses: The training loss of every step, all epochs in a row.
        path: The file to write.
    """
    epochs = [record["epoch"] for record in metrics["epochs"]]
    planned = metrics["arguments"]["epochs"]
    counts = metrics["data"]["examples"]
    held_out = ("held_out", "held out", {"color": "#d9730d", "marker": "o"})
    split = metrics["data"]["reported_split"]
    reported = ("reported", split, {"color": "#3f8f5f", "marker": "s", "linestyle": "--"})

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    so_far = "" if len(epochs) == planned else f", {len(epochs)} of {planned} epochs"
    figure.suptitle(
        f"{metrics['task']}: {metrics['method']}\n"
        f"{metrics['model']} on {metrics['data']['name']}, {counts['train']:,} training examples{so_far}",
        fontsize=11,
    )
    loss, accuracy = figure.subplots(1, 2)

    steps_per_epoch = len(step_losses) / len(epochs)
    window = max(1, round(steps_per_epoch / 6))
    smooth = torch.tensor(step_losses).unfold(0, window, 1).mean(dim=1).tolist()
    middles = [(step + (window + 1) / 2) / steps_per_epoch for step in range(len(smooth))]
    each = "every step" if window == 1 else f"mean over {window} steps"
    loss.plot(middles, smooth, color="#3b6ea8", label=f"training ({each})")
    for key, name, style in (held_out, reported):
        records = [record for record in metrics["epochs"] if key in record]
        if not records:
            continue
        at = [record["epoch"] for record in records]
        loss.plot(at, [record[key]["loss"] for record in records], label=name, **style)
        values = [record[key]["accuracy"] for record in records]
        when = "at the end" if at[-1] == planned else "so far"
        untrained = metrics.get("before", {}).get(key)
        was = f"{untrained['accuracy']:.3f} untrained, " if untrained else ""
        label = f"{name} ({counts[key]:,}): {was}{values[-1]:.3f} {when}"
        accuracy.plot(at, values, label=label, **style)
    loss.set_ylabel("cross-entropy")
    loss.set_xlim(0, epochs[-1] + 0.1)
    accuracy.set_ylabel("accuracy")
    accuracy.set_xlim(0.75, epochs[-1] + 0.25)
    accuracy.margins(y=0.15)
    for axes in (loss, accuracy):
        bottom, top = axes.get_ylim()
        if top - bottom < LEAST_SPAN:  # chance must not look like a steep slope
            middle = (bottom + top) / 2
            axes.set_ylim(middle - LEAST_SPAN / 2, middle + LEAST_SPAN / 2)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
