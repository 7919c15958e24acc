"""A training step with LoRA, against the least that it can cost and against other libraries.

    python benchmarks/train_speed.py                        # 4 layers of BERT-base, 16 x 128, fp32 and bf16
    python benchmarks/train_speed.py --sweep rank           # how the cost grows: one curve per contestant
    python benchmarks/train_speed.py --dora                 # DoRA, against LoRA
    python benchmarks/train_speed.py --kinds                # convolutions, an embedding, experts
    python benchmarks/train_speed.py --model minilm --data FOLDER --batch 32 --rank 4 --dropout 0.1    # SST-2
    python benchmarks/train_speed.py --device cuda --layers 12 --batch 32
    python benchmarks/train_speed.py --device cuda --model llama-1b --batch 4 --length 512

A step is forward, loss, backward, AdamW and zeroing the gradients. The reference, frozen-bound, trains
the head and one bias of the first adapted layer: a gradient comes down as far as it must for LoRA, and no
weight gradient is taken.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from bench.agreement import compare_losses
from bench.arguments import parser_for, positive, start
from bench.loads import AXES, KINDS, Load, load_of
from bench.memory import peak_memory, resident_memory
from bench.methods import DORA_METHODS, TRAINING_METHODS, TrainingMethod
from bench.reports import finish
from bench.setups import (
    PRECISIONS,
    TARGETS,
    add_batch_arguments,
    add_model_arguments,
    setup_from,
    shrink,
)
from bench.tables import Row, Table
from bench.timing import Contestant, device_clock, race
from bench.unmeasured import noting_why_not
from torch import nn

REFERENCE = "frozen-bound"
MINILORA = "minilora"
PEFT = "PEFT"
SWEPT = (REFERENCE, "plain form", MINILORA, PEFT)
OF_ANY_KIND = (REFERENCE, "frozen-bound, inputs kept", "full fine-tuning", MINILORA, PEFT)
LEARNING_RATE = 1e-4


class TrainingStep:
    """A model made ready by one method, and its optimizer.

    Args:
        method: one of `TRAINING_METHODS`.
        load: what to train, and on what.
    """

    def __init__(self, method: TrainingMethod, load: Load) -> None:
        setup = load.setup
        self.setup = setup
        self.model = method(setup.build(), setup).train()
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):  # minilora leaves the statistics of what is frozen alone
                module.eval()
        self.call: Callable[..., Any] = setup.compile(self.model) if load.compiled else self.model
        self.batches = load.batches()
        self.steps = 0
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE)

    def run(self) -> torch.Tensor:
        """Take one step, and return the loss before it."""
        batch = self.batches[self.steps % len(self.batches)]
        self.steps += 1
        self.setup.begin_step()
        with self.setup.autocast(training=True):
            loss = self.call(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def peak_memory(self) -> int:
        """Return the peak of a step, model, optimizer and batch included."""
        states = self.optimizer.state.values()
        in_optimizer = [value for state in states for value in state.values() if torch.is_tensor(value)]
        weights = [*self.model.parameters(), *self.model.buffers()]
        inputs = [value for batch in self.batches for value in batch.values()]
        resident = resident_memory([*weights, *in_optimizer, *inputs])
        self.steps = 0  # all contestants on the same batch
        return resident + peak_memory(self.run, self.setup.device)


def measure(
    load: Load, methods: Mapping[str, TrainingMethod], *, rounds: int, point: int | None = None
) -> Iterator[Row]:
    """Yield a row for each contestant.

    Raises:
        SystemExit: when the contestants do not start from the same loss: they would not do the same work.
    """
    steps: dict[str, TrainingStep] = {}
    losses: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, method in methods.items():
        with noting_why_not(name, reasons):
            step = TrainingStep(method, load)
            losses[name] = step.run().item()
            steps[name] = step
    compare_losses(losses, load.setup.precision)
    samples = race(
        [Contestant(name=name, run=step.run) for name, step in steps.items()],
        clock=device_clock(load.setup.device),
        rounds=rounds,
        shortest=0.02,
    )
    for name in methods:
        if name in reasons:
            yield Row(name=name, point=point, reason=reasons[name])
            continue
        # The replays of a CUDA graph allocate nothing: its memory belongs to the graph.
        memory = None if load.compiled else steps[name].peak_memory()
        yield Row(name=name, point=point, samples=samples[name], memory=memory)


def table(load: Load, *, rounds: int, dora: bool) -> Table:
    """Return the comparison of all methods at one point; of those with DoRA against LoRA without."""
    rows = list(measure(load, DORA_METHODS if dora else TRAINING_METHODS, rounds=rounds))
    reference = MINILORA if dora else REFERENCE
    return Table(title=load.title, reference=reference, memory_reference=PEFT, rows=rows)


def sweep(load: Load, name: str, *, rounds: int, quick: bool) -> Table:
    """Return the curves of cost along an axis."""
    axis = AXES[name]
    rows: list[Row] = []
    for value in axis.quick_points if quick else axis.points:
        print(f"{axis.label}: {value}", flush=True)
        methods = {method: TRAINING_METHODS[method] for method in SWEPT}
        rows += measure(load.swept(name, value), methods, rounds=rounds, point=value)
    return Table(
        title=f"{load.title}; swept: {axis.label}",
        axis=axis.label,
        reference=REFERENCE,
        memory_reference=PEFT,
        rows=rows,
    )


def kinds(args: argparse.Namespace, precision: str) -> Table:
    """Return the comparison for layers that are not linear, each in a model that has them."""
    rows: list[Row] = []
    methods = {name: TRAINING_METHODS[name] for name in OF_ANY_KIND}
    for kind in KINDS:
        load = load_of(kind, precision, args)
        print(load.title, flush=True)
        point = f"{kind} of {load.setup.model}, {load.batch} x {load.length}"
        rows += [dataclasses.replace(row, point=point) for row in measure(load, methods, rounds=args.rounds)]
    return Table(
        title=f"layers that are not linear, r = {args.rank}, {precision}",
        axis="what is adapted",
        reference=REFERENCE,
        memory_reference=PEFT,
        rows=rows,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_for("Training speed and memory of LoRA, against the frozen base.", rounds=9)
    add_model_arguments(parser, targets=TARGETS)
    parser.add_argument(
        "--layers", type=positive, help="number of layers; by default 4 for bert-base, or the model's"
    )
    add_batch_arguments(parser)
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout on the low-rank path")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        nargs="+",
        help="tables to make; by default fp32 and bf16-autocast, on CUDA or in a sweep one of the two",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--sweep", choices=list(AXES), help="measure along this axis instead of at one point")
    kind.add_argument("--dora", action="store_true", help="measure DoRA, against LoRA")
    kind.add_argument(
        "--kinds",
        action="store_true",
        help="measure convolutions, an embedding and experts, in models of theirs",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile every contestant")
    parser.add_argument(
        "--data",
        help="for --model minilm: train on the sentences of this folder, as examples/sst2.py does; needs the "
        "extra 'examples', too",
    )
    args = start(parser, argv)
    if args.quick:
        shrink(args)
    elif args.layers is None and args.model == "bert-base":
        args.layers = 4
    if args.precision is None:
        on_cuda = args.device.type == "cuda"
        args.precision = (
            ["bf16-autocast"] if on_cuda else ["fp32"] if args.sweep else ["fp32", "bf16-autocast"]
        )
    if args.data and (args.model != "minilm" or args.sweep):
        parser.error("--data: its sentences are cut into tokens for --model minilm, and not swept")
    sentences: Sequence[dict[str, torch.Tensor]] = ()
    if args.data:
        from bench.sentences import sentence_batches  # which needs what the examples need

        sentences = sentence_batches(args.data, args.batch, args.seed)
    tables = []
    for precision in args.precision:
        if args.kinds:
            tables.append(kinds(args, precision))
            continue
        for targets in args.targets:
            setup = setup_from(
                args, targets=targets, precision=precision, layers=args.layers, dropout=args.dropout
            )
            load = Load(
                setup=setup,
                batch=args.batch,
                length=args.length,
                compiled=args.compile,
                sentences=sentences,
            )
            print(load.title, flush=True)
            tables.append(
                sweep(load, args.sweep, rounds=args.rounds, quick=args.quick)
                if args.sweep
                else table(load, rounds=args.rounds, dora=args.dora)
            )
    finish(
        "train_speed",
        args,
        tables,
        variant=args.sweep
        or ("dora" if args.dora else "kinds" if args.kinds else "sentences" if args.data else ""),
    )


if __name__ == "__main__":
    main()
