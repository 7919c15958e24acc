"""Where a training step spends its time: torch's profile of frozen-bound and of minilora, side by side.

    python benchmarks/profile_step.py --precision fp32

The difference of the two columns is what LoRA costs, by operation and shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import models
from models import Setup
from torch.profiler import ProfilerActivity, profile
from train_speed import Load, TrainingStep

STEPS = 5


def self_times(step: TrainingStep) -> dict[tuple[str, str], float]:
    """Return the milliseconds per step that each operation takes itself, by its name and input shapes."""
    for _ in range(2):
        step.run()
    activities = [ProfilerActivity.CUDA if step.on_cuda else ProfilerActivity.CPU]
    with profile(activities=activities, record_shapes=True) as trace:
        for _ in range(STEPS):
            step.run()
    clock = "self_device_time_total" if step.on_cuda else "self_cpu_time_total"
    times: dict[tuple[str, str], float] = {}
    for event in trace.key_averages(group_by_input_shape=True):
        shapes = " x ".join(str(tuple(shape)) for shape in event.input_shapes if shape)
        key = (event.key.removeprefix("aten::"), shapes)
        times[key] = times.get(key, 0.0) + getattr(event, clock) / 1e3 / STEPS
    return times


def main(argv: Sequence[str] | None = None) -> None:
    """Print the operations in which the two differ most."""
    parser = common.parser_for("Profile of a training step.", rounds=1)
    parser.add_argument("--layers", type=common.positive, default=4)
    parser.add_argument("--batch", type=common.positive, default=16)
    parser.add_argument("--length", type=common.positive, default=128)
    parser.add_argument("--targets", choices=models.TARGETS, default="all-linear")
    parser.add_argument("--precision", choices=models.PRECISIONS, default="fp32")
    parser.add_argument("--rows", type=common.positive, default=14)
    args = common.start(parser, argv)
    setup = Setup(
        model="bert-tiny" if args.quick else "bert-base",
        device=args.device,
        targets=args.targets,
        rank=args.rank,
        precision=args.precision,
        layers=args.layers,
    )
    load = Load(setup=setup, batch=args.batch, length=args.length)
    bound, own = (
        self_times(TrainingStep(models.TRAINING_METHODS[name], load)) for name in ("frozen-bound", "minilora")
    )
    keys = sorted(bound.keys() | own.keys(), key=lambda key: -abs(own.get(key, 0) - bound.get(key, 0)))
    totals = sum(bound.values()), sum(own.values())
    print(f"{load.title}; milliseconds per step\n")
    print("| operation | input shapes | frozen-bound | minilora | difference |")
    print("|---|---|--:|--:|--:|")
    for key in keys[: args.rows]:
        a, b = bound.get(key, 0.0), own.get(key, 0.0)
        print(f"| {key[0]} | {key[1]} | {a:.1f} | {b:.1f} | {b - a:+.1f} |")
    print(f"| all | | {totals[0]:.1f} | {totals[1]:.1f} | {totals[1] - totals[0]:+.1f} |")


if __name__ == "__main__":
    main()
