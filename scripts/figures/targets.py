"""What was aimed at, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.markdown import grid

from .speed import SETUPS, SITES, Row, forward, importing, operation, recipe_step, step


@dataclass(frozen=True)
class Target:
    """What was aimed at, where it is measured, and why it is missed, if it is."""

    work: str
    most: float
    row: Row
    why: str = ""
    bound: Row | None = None
    """Of memory, not of time: the least that it can be."""

    def line(self) -> list[str]:
        """The target as a line: met where what is shown is not above it."""
        ratio, why = self.row.ratio(), self.why
        value, shown = ratio.median, f"{ratio.median:.2f} [{ratio.low:.2f}–{ratio.high:.2f}]"
        if self.bound:
            value = self.row.memory()
            shown, why = f"{value:.2f}", f"missed: what must be kept takes {self.bound.memory():.2f}"
        return [self.work, f"<= {self.most:.2f}", shown, "met" if round(value, 2) <= self.most else why]


LLAMA = "train_speed-llama-135m-bf16-cpu"
SKINNY = "missed: the four narrow products"
KEPT = "frozen-bound, inputs kept"
TARGETS = [
    *(
        Target(f"training step, {setup}", most, step(setup, "minilora"), SKINNY)
        for setup, most in zip(SETUPS, (1.02, 1.08, 1.03, 1.06), strict=True)
    ),
    *(
        Target(
            f"SST-2's batches, {'dropout 0.1' if dropout else 'no dropout'}, {sites}",
            most,
            recipe_step(sites, "minilora", dropout=dropout),
            SKINNY,
        )
        for dropout, sites, most in (
            (True, "query + value", 1.05),
            (True, "every linear layer", 1.30),
            (False, "query + value", 1.03),
            (False, "every linear layer", 1.15),
        )
    ),
    *(
        Target(
            f"Llama shape, {words}, every linear layer",
            1.03,
            Row(LLAMA, (precision,), "minilora"),
            SKINNY,
        )
        for precision, words in (("bf16", "stored in bfloat16"), ("bf16-autocast", "bf16 autocast"))
    ),
    *(
        Target(f"DoRA against LoRA, {sites}", 1.15, Row("train_speed-dora-cpu", (targets,), "minilora DoRA"))
        for sites, targets in SITES.items()
    ),
    *(
        Target(f"peak memory against PEFT's, {setup}", 0.95, step(setup, "minilora"), bound=step(setup, KEPT))
        for setup in SETUPS
    ),
    Target("inference, unmerged, every linear layer", 1.05, forward("minilora unmerged"), "missed"),
    *(
        Target(
            f"inference, {form}", 1.01, forward(f"minilora {form}"), "missed by noise: the base's own layers"
        )
        for form in ("merged", "fused")
    ),
    Target("import, against torch and safetensors", 1.03, importing("minilora"), "missed: a hundred modules"),
    *(
        Target(f"{point}, every linear layer, against PEFT", most, operation(point), "missed: see below")
        for point, most in (("inject", 0.25), ("load", 0.35), ("save", 1.0), ("merge", 1.0))
    ),
]


def targets() -> str:
    """What was aimed at and what came of it."""
    return grid(["work", "target", "measured", ""], [target.line() for target in TARGETS])


BLOCKS: dict[str, Callable[[], str]] = {"targets": targets}
