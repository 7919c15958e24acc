"""What came of training two libraries side by side: how far apart, how accurate, how fast."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .markdown import grid
from .plots import DPI, WIDTH, colour

WINDOW = 20  # steps in each mean of a kept curve
SPLITS = {"held_out": "held out", "reported": "validation"}  # as tables name them


@dataclass(kw_only=True)
class Seed:
    """One seed: both libraries, from the same values, on the same batches."""

    seed: int
    curves: dict[str, list[float]]
    """By library, the training loss: the mean of each `WINDOW` steps."""
    largest_gap: float
    """Between the two losses of a step, over all steps."""
    first_gap: float
    """The same over the first `WINDOW` steps."""
    largest_smoothed_gap: float
    """Between the two curves."""
    seconds: dict[str, float]
    """By library, of all training steps."""
    ratio: list[float]
    """minilora's time for a step over the other's for the same step: quartile, median, quartile."""
    final: dict[str, dict[str, dict[str, float]]]
    """By library and split: loss and accuracy at the end."""
    environment: dict[str, object]

    @classmethod
    def of(
        cls,
        seed: int,
        *,
        losses: dict[str, list[float]],
        seconds: dict[str, list[float]],
        final: dict[str, dict[str, dict[str, float]]],
        environment: dict[str, object],
    ) -> Seed:
        """Sum up what was measured at every step; the first library is timed against the second."""
        curves = {name: _means(each) for name, each in losses.items()}
        gaps = [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
        smoothed = [abs(a - b) for a, b in zip(*curves.values(), strict=True)]
        ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
        return cls(
            seed=seed,
            curves={name: [round(value, 6) for value in curve] for name, curve in curves.items()},
            largest_gap=max(gaps),
            first_gap=max(gaps[:WINDOW]),
            largest_smoothed_gap=max(smoothed),
            seconds={name: round(sum(each), 1) for name, each in seconds.items()},
            ratio=[round(value, 4) for value in statistics.quantiles(ratios, n=4)],
            final=final,
            environment=environment,
        )


@dataclass(kw_only=True)
class Parity:
    """All seeds of one recipe."""

    recipe: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    """Model, data and their sizes."""
    seeds: list[Seed] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Parity:
        """Read what `write` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        seeds = [Seed(**seed) for seed in content["seeds"]]
        return cls(recipe=content["recipe"], facts=content["facts"], seeds=seeds)

    def write(self, path: Path) -> None:
        """Write all seeds; the inverse is `read`."""
        content = {"benchmark": "parity", "date": date.today().isoformat(), **asdict(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def parity_text(parity: Parity) -> str:
    """Return what was run, and the two tables, as Markdown."""
    facts = "\n".join(
        f"- {name}: {value}" for name, value in {**parity.facts, "recipe": parity.recipe}.items()
    )
    return f"# parity\n\n{facts}\n\n{accuracies(parity)}\n\n{gaps(parity)}\n"


def accuracies(parity: Parity) -> str:
    """Return every seed with both libraries, then their means, as a Markdown table."""
    lines = [
        [
            str(seed.seed),
            name,
            f"{last_epoch_loss(parity, seed, name):.4f}",
            *(f"{seed.final[name][split]['accuracy']:.4f}" for split in SPLITS),
            f"{seed.seconds[name]:,.0f}",
        ]
        for seed in parity.seeds
        for name in seed.curves
    ]
    if len(parity.seeds) > 1:
        for name in parity.seeds[0].curves:
            spreads = (accuracy(parity, name, split) for split in SPLITS)
            lines.append(["mean ± standard deviation", name, "", *spreads, ""])
    counts = parity.facts["examples"]
    splits = (f"{words} ({counts[split]:,})" for split, words in SPLITS.items())
    return grid(["seed", "library", "training loss, last epoch", *splits, "seconds of training"], lines)


def gaps(parity: Parity) -> str:
    """Return how far the two curves come apart, and what a step costs, as a Markdown table."""
    lines = [
        [
            str(seed.seed),
            f"{seed.first_gap:.1e}",
            f"{seed.largest_gap:.1e}",
            f"{seed.largest_smoothed_gap:.1e}",
            f"{seed.ratio[1]:.3f} ({seed.ratio[0]:.3f} to {seed.ratio[2]:.3f})",
        ]
        for seed in parity.seeds
    ]
    header = [
        "seed",
        f"largest gap of a step's loss, first {WINDOW} steps",
        "over all steps",
        f"means of {WINDOW} steps",
        f"time of a step, {' / '.join(parity.seeds[0].curves)}: median (quartiles)",
    ]
    return grid(header, lines)


def last_epoch_loss(parity: Parity, seed: Seed, name: str) -> float:
    """Return the mean training loss of the last epoch."""
    curve = seed.curves[name]
    return statistics.mean(curve[-(len(curve) // parity.recipe["epochs"]) :])


def accuracy(parity: Parity, name: str, split: str) -> str:
    """Return the mean over the seeds with its standard deviation, which one seed does not have."""
    values = [seed.final[name][split]["accuracy"] for seed in parity.seeds]
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def draw_parity(parity: Parity) -> Figure:
    """Return one panel of loss curves for each seed, and below each the gap between them."""
    figure = Figure(figsize=(max(WIDTH, 4 * len(parity.seeds)), 4.8), dpi=DPI, layout="constrained")
    rows = figure.subplots(2, len(parity.seeds), squeeze=False, sharex=True, height_ratios=(3, 1))
    for (upper, lower), seed in zip(rows.T, parity.seeds, strict=True):
        for (name, curve), style, width in zip(seed.curves.items(), ("-", "--"), (3.5, 1.2), strict=True):
            upper.plot(_steps(curve), curve, style, label=name, color=colour(name), linewidth=width)
        first, second = seed.curves.values()
        lower.plot(_steps(first), [a - b for a, b in zip(first, second, strict=True)], color="0.4")
        upper.set_title(f"seed {seed.seed}", fontsize=9)
        upper.legend(fontsize=8)
        lower.set_xlabel("step")
        for ax in (upper, lower):
            ax.grid(alpha=0.3)
    rows[0, 0].set_ylabel(f"training loss, mean of {WINDOW} steps")
    rows[1, 0].set_ylabel("difference")
    return figure


def _steps(curve: Sequence[float]) -> list[int]:
    return [WINDOW * (i + 1) for i in range(len(curve))]


def _means(losses: Sequence[float]) -> list[float]:
    return [statistics.mean(losses[i : i + WINDOW]) for i in range(0, len(losses), WINDOW)]
