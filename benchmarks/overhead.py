"""What surrounds training and inference: import, inject, save, load, merge, unmerge, switch.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --sweep sites     # 600 to 9,600 of them, on a narrow BERT

Imports are timed in fresh processes. The rest runs on BERT-base with random weights, minilora and PEFT in
turn, each on a model of its own.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.arguments import parser_for, positive, start
from bench.imports import measure_imports
from bench.memory import peak_memory
from bench.methods import peft_config, with_minilora
from bench.operations import OPERATIONS, Library
from bench.reports import finish
from bench.setups import TARGETS, Setup, add_model_arguments, setup_from, shrink
from bench.tables import Row, Table
from bench.timing import race, wall_clock
from bench.unmeasured import import_optional, noting_why_not
from torch import nn

import minilora

NARROW = "bert-narrow"
SITES_PER_LAYER = 6
LAYERS = (100, 400, 1600)  # of the narrow model: what is not arithmetic, without the arithmetic
IMPORTS = {"torch + safetensors": None, "+ minilora": "minilora", "+ PEFT": "peft"}


class Minilora(Library):
    """The operations by minilora."""

    file = "minilora.safetensors"

    def inject(self) -> None:
        self.model = with_minilora(self.bare, self.setup)

    def save(self) -> None:
        minilora.save(self.model, self.path)

    def load(self) -> None:
        self.model = minilora.load(self.bare, self.path)

    def read(self) -> None:
        minilora.load(self.model, self.path)

    def merge(self) -> None:
        minilora.merge(self.model)

    def unmerge(self) -> None:
        minilora.unmerge(self.model)


class Peft(Library):
    """The operations by PEFT."""

    file = "peft"

    def __init__(self, base: nn.Module, setup: Setup, folder: Path) -> None:
        self.package = import_optional("peft")
        self.config = peft_config(setup)
        super().__init__(base, setup, folder)

    def inject(self) -> None:
        self.model = self.package.get_peft_model(self.bare, self.config)

    def save(self) -> None:
        self.model.save_pretrained(self.path)

    def load(self) -> None:
        self.model = self.package.PeftModel.from_pretrained(self.bare, self.path)

    def read(self) -> None:
        self.model.load_adapter(self.path, adapter_name="default")

    def merge(self) -> None:
        self.model.merge_adapter()

    def unmerge(self) -> None:
        self.model.unmerge_adapter()


LIBRARIES: dict[str, type[Library]] = {"PEFT": Peft, "minilora": Minilora}


def measure_operations(setup: Setup, *, rounds: int) -> Table:
    """Return the time and the memory of every operation, for both libraries."""
    return Table(
        title=f"{setup.model}, {setup.targets}, r = {setup.rank}, fp32",
        axis="operation",
        reference=next(iter(LIBRARIES)),
        rows=list(_rows(setup, rounds=rounds, memory=True)),
        memory_label="peak of tensor memory above what was held before",
    )


def measure_sites(setups: Sequence[Setup], *, rounds: int) -> list[Table]:
    """Return a table for every operation: how its time grows with the number of sites.

    Args:
        setups: with the narrow model, of ever more layers.
        rounds: how often each operation is timed.
    """
    tables = {
        operation: Table(
            title=f"{operation}, width {setups[0].shape.config.hidden_size}, r = {setups[0].rank}, fp32",
            axis="sites",
            reference=next(iter(LIBRARIES)),
            rows=[],
        )
        for operation in OPERATIONS
    }
    for setup in setups:
        assert setup.layers
        for row in _rows(setup, rounds=rounds, memory=False):
            sites = setup.layers * SITES_PER_LAYER
            tables[str(row.point)].rows.append(dataclasses.replace(row, point=sites))
    return list(tables.values())


def _rows(setup: Setup, *, rounds: int, memory: bool) -> Iterator[Row]:
    """Yield what was measured of each operation, the memory in a run of its own."""
    base = setup.build()
    libraries: dict[str, Library] = {}
    reasons: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, library in LIBRARIES.items():
            with noting_why_not(name, reasons):
                libraries[name] = library(base, setup, Path(folder))
        for operation in OPERATIONS:
            contestants = [library.contestant(name, operation) for name, library in libraries.items()]
            samples = race(contestants, clock=wall_clock(setup.device), rounds=rounds)
            for each in contestants:
                each.prepare()
                peak = peak_memory(each.run, setup.device) if memory else None
                yield Row(name=each.name, point=operation, samples=samples[each.name], memory=peak)
            for name, reason in reasons.items():
                yield Row(name=name, point=operation, reason=reason)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_for(
        "Time and memory of import, inject, save, load, merge, unmerge and switch.", rounds=15
    )
    add_model_arguments(parser, targets=TARGETS)
    parser.add_argument("--import-rounds", type=positive, default=7, help="fresh processes for each import")
    sweep = "the time over the number of sites, instead; --model and --targets are given by it"
    parser.add_argument("--sweep", choices=["sites"], help=sweep)
    args = start(parser, argv)
    if args.quick:
        shrink(args)
        args.import_rounds = 1
    if args.sweep:
        setups = [
            Setup(model=NARROW, device=args.device, rank=args.rank, seed=args.seed, layers=layers)
            for layers in (LAYERS[:1] if args.quick else LAYERS)
        ]
        finish("overhead", args, measure_sites(setups, rounds=args.rounds), variant=args.sweep)
        return
    tables = [measure_imports(IMPORTS, rounds=args.import_rounds)]
    tables += [
        measure_operations(setup_from(args, targets=targets), rounds=args.rounds) for targets in args.targets
    ]
    finish("overhead", args, tables)


if __name__ == "__main__":
    main()
