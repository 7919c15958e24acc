"""Where a training step spends its time: torch's profile of frozen-bound and of minilora, side by side.

    python benchmarks/profile_step.py
    python benchmarks/profile_step.py --precision fp32 --targets qv

The difference of the two columns is what LoRA costs, by operation and shape.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench.arguments import parser_for, positive, start
from bench.loads import Load
from bench.methods import TRAINING_METHODS
from bench.profiles import Profile, write_profiles
from bench.profiling import quiet_profile
from bench.setups import PRECISIONS, TARGETS, add_batch_arguments, setup_from, shrink
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from train_speed import TrainingStep

STEPS = 7


def in_turn(steps: Sequence[TrainingStep]) -> list[Counter[tuple[str, str]]]:
    """Return what `self_times` does for each of some contestants, per step, taken in turn."""
    for step in steps * 2:
        step.run()
    sums: list[Counter[tuple[str, str]]] = [Counter() for _ in steps]
    for _ in range(STEPS):
        for step, times in zip(steps, sums, strict=True):
            times.update(self_times(step))
    return [Counter({key: time / STEPS for key, time in times.items()}) for times in sums]


def self_times(step: TrainingStep) -> Counter[tuple[str, str]]:
    """Return the milliseconds that each operation of a step takes itself, by its name and input shapes.

    On CUDA it is the time of the kernels that an operation starts. The kernels are listed as events of their
    own, too, without shapes, and are left out: they would be counted twice.
    """
    activities, clock = [ProfilerActivity.CPU], "self_cpu_time_total"
    if step.setup.on_cuda:
        activities, clock = [*activities, ProfilerActivity.CUDA], "self_device_time_total"
    with quiet_profile(activities=activities, record_shapes=True) as trace:
        step.run()
    times: Counter[tuple[str, str]] = Counter()
    for event in trace.key_averages(group_by_input_shape=True):
        if event.device_type == DeviceType.CPU:
            shapes = " x ".join(str(tuple(shape)) for shape in event.input_shapes if shape)
            times[event.key.removeprefix("aten::"), shapes] += getattr(event, clock) / 1e3
    return times


def main(argv: Sequence[str] | None = None) -> None:
    """Profile both, print the operations in which they differ most, and write them."""
    parser = parser_for("Profile of a training step.")
    parser.set_defaults(model="bert-base")
    parser.add_argument("--layers", type=positive, default=4, help="number of layers of BERT-base")
    add_batch_arguments(parser)
    parser.add_argument(
        "--targets", choices=TARGETS, nargs="+", default=list(TARGETS), help="one profile each"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        nargs="+",
        default=["fp32", "bf16-autocast"],
        help="one profile each",
    )
    parser.add_argument("--rows", type=positive, default=14, help="operations to keep")
    parser.add_argument("--output", type=Path, help="where to write the .json and .md")
    args = start(parser, argv)
    if args.quick:
        shrink(args)
    profiles = []
    for precision, targets in itertools.product(args.precision, args.targets):
        setup = setup_from(args, targets=targets, precision=precision, layers=args.layers)
        load = Load(setup=setup, batch=args.batch, length=args.length)
        steps = [TrainingStep(TRAINING_METHODS[name], load) for name in ("frozen-bound", "minilora")]
        profiles.append(Profile.of(load.title, *in_turn(steps), rows=args.rows))
    write_profiles(profiles, args)


if __name__ == "__main__":
    main()
