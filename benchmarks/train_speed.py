"""A training step with LoRA, against the least that it can cost and against other libraries.

    python benchmarks/train_speed.py                        # 4 layers of BERT-base, 16 x 128, fp32 and bf16
    python benchmarks/train_speed.py --sweep rank           # how the cost grows: one curve per contestant
    python benchmarks/train_speed.py --device cuda --layers 12 --batch 32
    python benchmarks/train_speed.py --device cuda --model llama-1b --batch 4 --length 512

A step is forward, loss, backward, AdamW and zeroing the gradients. The reference, frozen-bound, trains
the head and one bias of the first adapted layer: a gradient comes down as far as it must for LoRA, and no
weight gradient is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import common
import models
import torch
from common import Contestant, NotMeasured, Row, Table
from models import Setup

REFERENCE = "frozen-bound"
PEFT = "PEFT"
SWEPT = (REFERENCE, "plain form", "minilora", PEFT)
LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """A setup and the batch that it trains on."""

    setup: Setup
    batch: int
    length: int
    compiled: bool = False

    @property
    def title(self) -> str:
        setup = self.setup
        layers = setup.layers or setup.shape.config.num_hidden_layers
        return (
            f"{setup.model}, {layers} layers, batch {self.batch} x {self.length}, {setup.targets}, "
            f"r = {setup.rank}, {setup.precision}{', torch.compile' if self.compiled else ''}"
        )

    def swept(self, axis: str, value: int) -> Load:
        """Return this load with one quantity changed."""
        if axis == "tokens":
            length = min(value, self.length)
            return dataclasses.replace(self, batch=value // length, length=length)
        if axis == "length":  # the number of tokens stays
            return dataclasses.replace(self, batch=max(1, self.batch * self.length // value), length=value)
        return dataclasses.replace(self, setup=dataclasses.replace(self.setup, **{axis: value}))


@dataclasses.dataclass(frozen=True)
class Axis:
    """What a sweep changes."""

    label: str
    points: tuple[int, ...]
    quick_points: tuple[int, ...]


AXES = {
    "tokens": Axis("tokens per step", (1, 4, 16, 64, 256, 1024, 4096, 16384), (1, 32)),
    "rank": Axis("rank", (1, 2, 4, 8, 16, 32, 64), (1, 4)),
    "layers": Axis("layers", (2, 4, 8, 12, 24), (1, 2)),
    "length": Axis("tokens per sequence", (32, 64, 128, 256, 512), (8, 16)),
}


class TrainingStep:
    """A model made ready by one method, and its optimizer.

    Args:
        method: one of `models.TRAINING_METHODS`.
        load: what to train, and on what.
    """

    def __init__(self, method: models.TrainingMethod, load: Load) -> None:
        setup = load.setup
        self.setup = setup
        self.model = method(setup.build(), setup).train()
        self.call: Callable[..., object] = self.model
        self.on_cuda = setup.device.type == "cuda"
        if load.compiled:
            self.call = torch.compile(self.model, mode="reduce-overhead" if self.on_cuda else None)
        self.batch = setup.training_batch(load.batch, load.length)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE)

    def run(self) -> torch.Tensor:
        """Take one step, and return the loss before it."""
        if self.on_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        with self.setup.autocast(training=True):
            loss = self.call(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def peak_memory(self) -> int:
        """Return the peak of a step, model, optimizer and batch included."""
        return self._resident() + common.peak_memory(self.run, self.setup.device)

    def _resident(self) -> int:
        states = self.optimizer.state.values()
        in_optimizer = [value for state in states for value in state.values() if torch.is_tensor(value)]
        weights = [*self.model.parameters(), *self.model.buffers()]
        return common.resident_memory([*weights, *in_optimizer, *self.batch.values()])


def measure(load: Load, names: Sequence[str], *, rounds: int, point: int | None = None) -> Iterator[Row]:
    """Yield a row for each contestant.

    Raises:
        SystemExit: when the contestants do not start from the same loss: they would not do the same work.
    """
    steps: dict[str, TrainingStep] = {}
    losses: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            step = TrainingStep(models.TRAINING_METHODS[name], load)
            losses[name] = step.run().item()
            steps[name] = step
        except NotMeasured as reason:
            reasons[name] = str(reason)
        except (torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException) as error:
            reasons[name] = type(error).__name__
    # B starts at zero, so every method starts from the base model's own loss.
    tolerance = 1e-4 if load.setup.precision == "fp32" else 2e-2
    expected = losses[REFERENCE]
    if off := {name: loss for name, loss in losses.items() if not abs(loss / expected - 1) <= tolerance}:
        raise SystemExit(f"first losses differ from {REFERENCE}'s {expected:.6f}: {off}")
    samples = common.race(
        [Contestant(name=name, run=step.run) for name, step in steps.items()],
        clock=common.device_clock(load.setup.device),
        rounds=rounds,
        shortest=0.02,
    )
    for name in names:
        if name in reasons:
            yield Row(name=name, point=point, reason=reasons[name])
            continue
        # The replays of a CUDA graph allocate nothing: its memory belongs to the graph.
        memory = None if load.compiled else steps[name].peak_memory()
        yield Row(name=name, point=point, samples=samples[name], memory=memory)


def table(load: Load, *, rounds: int) -> Table:
    """Return the comparison of all methods at one point."""
    rows = list(measure(load, list(models.TRAINING_METHODS), rounds=rounds))
    return Table(title=load.title, reference=REFERENCE, memory_reference=PEFT, rows=rows)


def sweep(load: Load, name: str, *, rounds: int, quick: bool) -> Table:
    """Return the curves of cost along an axis."""
    axis = AXES[name]
    rows: list[Row] = []
    for value in axis.quick_points if quick else axis.points:
        print(f"{axis.label}: {value}", flush=True)
        rows += measure(load.swept(name, value), SWEPT, rounds=rounds, point=value)
    return Table(
        title=f"{load.title}; swept: {axis.label}",
        axis=axis.label,
        reference=REFERENCE,
        memory_reference=PEFT,
        rows=rows,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = common.parser_for("Training speed and memory of LoRA, against the frozen base.", rounds=9)
    parser.add_argument("--model", choices=list(models.SHAPES), default="bert-base", help="random weights")
    parser.add_argument(
        "--layers", type=common.positive, help="number of layers; by default 4 for bert-base, or the model's"
    )
    parser.add_argument("--batch", type=common.positive, default=16, help="sequences in a step")
    parser.add_argument("--length", type=common.positive, default=128, help="tokens in each sequence")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout on the low-rank path")
    parser.add_argument(
        "--targets", choices=models.TARGETS, nargs="+", default=list(models.TARGETS), help="tables to make"
    )
    parser.add_argument(
        "--precision",
        choices=models.PRECISIONS,
        nargs="+",
        help="tables to make; by default fp32 and bf16-autocast, on CUDA or in a sweep one of the two",
    )
    parser.add_argument("--sweep", choices=list(AXES), help="measure along this axis instead of at one point")
    parser.add_argument("--compile", action="store_true", help="torch.compile every contestant")
    args = common.start(parser, argv)
    if args.quick:
        args.model, args.batch, args.length = models.SHAPES[args.model].quick, 2, 16
    elif args.layers is None and args.model == "bert-base":
        args.layers = 4
    if args.precision is None:
        on_cuda = args.device.type == "cuda"
        args.precision = (
            ["bf16-autocast"] if on_cuda else ["fp32"] if args.sweep else ["fp32", "bf16-autocast"]
        )
    tables = []
    for precision in args.precision:
        for targets in args.targets:
            setup = Setup(
                model=args.model,
                device=args.device,
                targets=targets,
                rank=args.rank,
                precision=precision,
                layers=args.layers,
                dropout=args.dropout,
                seed=args.seed,
            )
            load = Load(setup=setup, batch=args.batch, length=args.length, compiled=args.compile)
            print(load.title, flush=True)
            tables.append(
                sweep(load, args.sweep, rounds=args.rounds, quick=args.quick)
                if args.sweep
                else table(load, rounds=args.rounds)
            )
    variant = "" if args.model.startswith("bert") else f"-{args.model}"
    common.finish(f"train_speed{variant}{f'-{args.sweep}' if args.sweep else ''}", args, tables)


if __name__ == "__main__":
    main()
