"""What surrounds training and inference: import, inject, save, load, merge, unmerge, switch.

    python benchmarks/overhead.py

Imports are timed in fresh processes. The rest runs on BERT-base with random weights, minilora and PEFT in
turn, each on a model of its own.
"""

from __future__ import annotations

import abc
import copy
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import common
import models
import torch
from common import Contestant, NotMeasured, Row, Table, peak_memory
from models import Setup
from torch import nn

import minilora

OPERATIONS = ("inject", "save", "load", "merge", "unmerge", "switch")
ADDED = "added"

SOURCE = Path(minilora.__file__).parents[1]  # so that the fresh processes import this very minilora
IMPORT = """
import resource, sys, time
start = time.perf_counter()
import torch, safetensors.torch
{more}
seconds = time.perf_counter() - start
unit = 1 if sys.platform == "darwin" else 1024
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""
IMPORTS = {"torch + safetensors": "", "+ minilora": "import minilora", "+ PEFT": "import peft"}


# Imports


def measure_imports(*, rounds: int) -> Table:
    """Return the time and the memory of imports, each in a fresh process, in turn."""
    seconds: dict[str, list[float]] = {}
    memory: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}

    def fresh(name: str) -> None:
        code = IMPORT.format(more=IMPORTS[name])
        child = subprocess.run(
            [sys.executable, "-c", code], cwd=SOURCE, capture_output=True, text=True, check=False
        )
        if child.returncode:
            reasons[name] = child.stderr.strip().splitlines()[-1]
            return
        own_seconds, own_memory = child.stdout.split()
        seconds.setdefault(name, []).append(float(own_seconds))
        memory.setdefault(name, []).append(int(own_memory))

    # The children hold the watch: starting a process is not part of an import.
    common.race(
        [Contestant(name=name, run=lambda name=name: fresh(name)) for name in IMPORTS],
        clock=common.wall_clock(torch.device("cpu")),
        rounds=rounds,
        warmup=min(1, rounds - 1),
    )
    reference = next(iter(IMPORTS))
    rows = []
    for name in IMPORTS:
        if name in reasons:
            rows.append(Row(name=name, reason=reasons[name]))
            continue
        own, bare = seconds[name][-rounds:], seconds[reference][-rounds:]  # without the warm-up
        extra = {}
        if name != reference:
            extra[ADDED] = statistics.median(a - b for a, b in zip(own, bare, strict=True))
        rows.append(Row(name=name, samples=own, memory=round(statistics.median(memory[name])), extra=extra))
    return Table(
        title="import, in a fresh process",
        reference=reference,
        rows=rows,
        memory_label="resident memory of the process",
        formats={ADDED: common.time_text},
    )


# Operations on a model


class Library(abc.ABC):
    """The operations, by one library.

    Args:
        base: the bare model; copied, never changed.
        setup: rank and targets.
        folder: where to save.
    """

    file: ClassVar[str]

    def __init__(self, base: nn.Module, setup: Setup, folder: Path) -> None:
        self.base, self.setup, self.path = base, setup, folder / self.file
        self.merged = False
        self.bring_bare()
        self.inject()
        self.save()

    @abc.abstractmethod
    def inject(self) -> None:
        """Turn `self.bare` into `self.model`."""

    @abc.abstractmethod
    def save(self) -> None:
        """Write the adapter to `self.path`."""

    @abc.abstractmethod
    def load(self) -> None:
        """Turn `self.bare` into `self.model`, with the adapter of the file."""

    @abc.abstractmethod
    def read(self) -> None:
        """Give the adapter of `self.model`, unmerged, the values of the file."""

    @abc.abstractmethod
    def merge(self) -> None: ...

    @abc.abstractmethod
    def unmerge(self) -> None: ...

    def switch(self) -> None:
        """Go over to another adapter of the same form, on a merged model."""
        self.unmerge()
        self.read()
        self.merge()

    def bring_bare(self) -> None:
        self.bare = copy.deepcopy(self.base)

    def contestant(self, name: str, operation: str) -> Contestant:
        """Return an operation together with what brings the model into the state that it starts from."""

        def run() -> None:
            getattr(self, operation)()
            self.merged = operation in ("merge", "switch")

        def prepare() -> None:
            if operation in ("inject", "load"):
                self.bring_bare()
            elif operation == "merge" and self.merged:
                self.unmerge()
            elif operation in ("unmerge", "switch") and not self.merged:
                self.merge()

        return Contestant(name=name, run=run, prepare=prepare)


class Minilora(Library):
    file = "minilora.safetensors"

    def inject(self) -> None:
        self.model = models.with_minilora(self.bare, self.setup)

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
    file = "peft"

    def __init__(self, base: nn.Module, setup: Setup, folder: Path) -> None:
        self.package = models.import_optional("peft")
        self.config = models.peft_config(setup)
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
    with tempfile.TemporaryDirectory() as folder:
        rows = list(_operation_rows(setup, Path(folder), rounds=rounds))
    return Table(
        title=f"{setup.model}, {setup.targets}, r = {setup.rank}, fp32",
        axis="operation",
        reference=next(iter(LIBRARIES)),
        rows=rows,
        memory_label="peak of tensor memory above what was held before",
    )


def _operation_rows(setup: Setup, folder: Path, *, rounds: int) -> Iterator[Row]:
    base = setup.build()
    libraries: dict[str, Library] = {}
    reasons: dict[str, str] = {}
    for name, library in LIBRARIES.items():
        try:
            libraries[name] = library(base, setup, folder)
        except NotMeasured as reason:
            reasons[name] = str(reason)
    for operation in OPERATIONS:
        contestants = [library.contestant(name, operation) for name, library in libraries.items()]
        samples = common.race(contestants, clock=common.wall_clock(setup.device), rounds=rounds)
        for each in contestants:
            each.prepare()
            memory = peak_memory(each.run, setup.device)
            yield Row(name=each.name, point=operation, samples=samples[each.name], memory=memory)
        for name, reason in reasons.items():
            yield Row(name=name, point=operation, reason=reason)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = common.parser_for(
        "Time and memory of import, inject, save, load, merge, unmerge and switch.", rounds=15
    )
    parser.add_argument("--model", choices=list(models.SHAPES), default="bert-base", help="random weights")
    parser.add_argument(
        "--targets", choices=models.TARGETS, nargs="+", default=list(models.TARGETS), help="tables to make"
    )
    parser.add_argument(
        "--import-rounds", type=common.positive, default=7, help="fresh processes for each import"
    )
    args = common.start(parser, argv)
    if args.quick:
        args.model, args.import_rounds = models.SHAPES[args.model].quick, 1
    tables = [measure_imports(rounds=args.import_rounds)]
    for targets in args.targets:
        setup = Setup(model=args.model, device=args.device, targets=targets, rank=args.rank, seed=args.seed)
        tables.append(measure_operations(setup, rounds=args.rounds))
    variant = "" if args.model.startswith("bert") else f"-{args.model}"
    common.finish(f"overhead{variant}", args, tables)


if __name__ == "__main__":
    main()
