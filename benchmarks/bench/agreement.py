"""Contestants must do the same work before they are timed: a fast wrong answer is not a result."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .forms import BASE, UNMERGED

OUTPUTS_FP32, OUTPUTS_BF16 = 1e-3, 5e-2
"""Largest difference to the unmerged outputs, relative to the largest of them. bfloat16 keeps 8 bits."""

LOSSES_FP32, LOSSES_BF16 = 1e-4, 2e-2
"""Largest relative difference of first losses."""


def compare_outputs(outputs: Mapping[str, Tensor], precision: str) -> dict[str, float]:
    """Return how far each form's output is from the unmerged one, relative to the largest value there.

    Raises:
        SystemExit: when one is further away than rounding explains, or the update has no effect.
    """
    if missing := {BASE, UNMERGED} - outputs.keys():
        raise SystemExit(f"not even {' or '.join(sorted(missing))} could be run: nothing to compare with")
    expected = outputs[UNMERGED]
    scale = expected.abs().max()
    differences = {name: ((out - expected).abs().max() / scale).item() for name, out in outputs.items()}
    for name, difference in differences.items():
        tolerance = OUTPUTS_BF16 if "bf16" in name or precision != "fp32" else OUTPUTS_FP32
        if name != BASE and not difference <= tolerance:
            raise SystemExit(f"{name}: differs from {UNMERGED} by {difference:.2e}, which is not rounding")
    if differences[BASE] <= OUTPUTS_FP32:
        raise SystemExit("the update does not change the model's outputs: nothing to compare")
    return differences


def compare_losses(losses: Mapping[str, float], precision: str) -> None:
    """Check that all start from the same loss: B starts at zero, so that is the base model's own.

    Raises:
        SystemExit: when one differs from the first by more than rounding explains.
    """
    tolerance = LOSSES_FP32 if precision == "fp32" else LOSSES_BF16
    expected = next(iter(losses.values()), 0.0)
    if off := {name: loss for name, loss in losses.items() if not abs(loss / expected - 1) <= tolerance}:
        raise SystemExit(f"first losses differ from {next(iter(losses))}'s {expected:.6f}: {off}")
