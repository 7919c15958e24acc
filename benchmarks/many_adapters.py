"""Many adapters on one model: batches whose rows have different ones, and adapters that come and go.

    python benchmarks/many_adapters.py --layers 4 --length 32                # a small Llama, CPU
    python benchmarks/many_adapters.py --model llama-1b --device cuda

One bank holds all adapters; the batches of each line use so many of them, in turn, row by row. Before
anything is timed, outputs are compared: bank and PEFT give the same, to rounding, or the run ends there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench.agreement import OUTPUTS_BF16, OUTPUTS_FP32
from bench.arguments import parser_for, positive, start
from bench.decoding import Cache, decoding_options
from bench.models import SHAPES
from bench.reports import finish
from bench.servers import BANK, BASE, SERVERS, Server, write_adapters
from bench.setups import PRECISIONS, Setup, add_model_arguments, setup_from, shrink
from bench.tables import Row, Table
from bench.timing import Contestant, device_clock, race, wall_clock
from bench.unmeasured import noting_why_not
from torch import Tensor

DECODED_TOKENS = 8


class Batch:
    """A batch whose rows have the first adapters in turn.

    Args:
        server: what serves it.
        setup: device and precision.
        rows: the adapter of each row.
        length: tokens of the prompt.
        decode: whether tokens are decoded one by one after the prompt, which is then read off the clock.
    """

    def __init__(self, server: Server, setup: Setup, rows: Sequence[str], length: int, decode: bool) -> None:
        self.server, self.setup, self.rows = server, setup, rows
        self.tokens = setup.tokens(len(rows), length)
        self.options: dict[str, Any] = {} if setup.shape.head else {"use_cache": False, "logits_to_keep": 1}
        self.prepare: Callable[[], None] | None = None
        if decode:
            self.cache = Cache(config=server.model.config, max_cache_len=length + DECODED_TOKENS)
            self.options = decoding_options(self.cache)
            self.prepare = self.read_prompt

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        with self.server.serving(self.rows) as more, self.setup.autocast(training=False):
            return self.server.model(input_ids=tokens, **self.options, **more).logits

    @torch.inference_mode()
    def read_prompt(self) -> None:
        """Fill the cache."""
        self.cache.reset()
        self.next = self.logits(self.tokens).argmax(-1)

    @torch.inference_mode()
    def first_logits(self) -> Tensor:
        """Return what is compared with the others'."""
        if self.prepare is not None:
            self.cache.reset()
        return self.logits(self.tokens).float()

    def run(self) -> Tensor:
        """Read the prompt, or decode after it."""
        if self.prepare is None:
            return self.logits(self.tokens)
        token = self.next
        for _ in range(DECODED_TOKENS):
            token = self.logits(token).argmax(-1)
        return token


def measure(
    servers: dict[str, Server], setup: Setup, names: Sequence[str], *, batch: int, length: int, decode: bool,
    rounds: int, reasons: dict[str, str],
) -> Table:  # fmt: skip
    """Return the table of one kind of batch: a line for each number of adapters."""
    rows: list[Row] = []
    for adapters in points(len(names)):
        of_rows = [names[i % adapters] for i in range(batch)]
        why_not, work = dict(reasons), {}
        for name, server in servers.items():
            with noting_why_not(name, why_not):
                server.require(adapters)
                work[name] = Batch(server, setup, of_rows, length, decode)
        compare(work, setup)
        contestants = [Contestant(name=n, run=own.run, prepare=own.prepare) for n, own in work.items()]
        samples = race(contestants, clock=device_clock(setup.device), rounds=rounds, shortest=0.02)
        per = DECODED_TOKENS if decode else 1
        for name in SERVERS:
            if name in samples:
                rows.append(Row(name=name, point=adapters, samples=[s / per for s in samples[name]]))
            else:
                rows.append(Row(name=name, point=adapters, reason=why_not[name]))
    what = f"{DECODED_TOKENS} tokens decoded one by one, time per token" if decode else "one forward pass"
    return Table(
        title=f"{setup.model}{f', {setup.layers} layers' if setup.layers else ''}, {what}, {batch} rows x "
        f"{length}, {setup.targets}, r = {setup.rank}, {setup.precision}",
        axis="adapters",
        reference=BASE,
        rows=rows,
    )


def compare(work: dict[str, Batch], setup: Setup) -> None:
    """Check that bank and PEFT compute the same, and the base something else.

    Raises:
        SystemExit: when they do not.
    """
    outputs = {name: own.first_logits() for name, own in work.items()}
    scale = outputs[BANK].abs().max()
    tolerance = OUTPUTS_FP32 if setup.precision == "fp32" else OUTPUTS_BF16
    if not (outputs[BASE] - outputs[BANK]).abs().max() > tolerance * scale:
        raise SystemExit("the adapters do not change the model's outputs: nothing to compare")
    if "PEFT" in outputs and not (outputs["PEFT"] - outputs[BANK]).abs().max() <= tolerance * scale:
        raise SystemExit(f"PEFT and {BANK} differ by more than rounding explains")


def points(most: int) -> Iterator[int]:
    """Yield 1, 4, 16, ... and the largest number."""
    adapters = 1
    while adapters < most:
        yield adapters
        adapters *= 4
    yield most


def measure_operations(
    servers: dict[str, Server], setup: Setup, *, rounds: int, reasons: dict[str, str]
) -> Table:
    """Return the time that it takes to load an adapter, to remove it, and to go over to another."""
    rows = []
    for operation in ("load", "remove", "switch"):
        found = {name: server.operations()[operation] for name, server in servers.items()
                 if operation in server.operations()}  # fmt: skip
        contestants = [Contestant(name=n, run=run, prepare=bring) for n, (bring, run) in found.items()]
        samples = race(contestants, clock=wall_clock(setup.device), rounds=rounds)
        rows += [Row(name=name, point=operation, samples=seconds) for name, seconds in samples.items()]
        rows += [Row(name=name, point=operation, reason=reason) for name, reason in reasons.items()]
    return Table(
        title=f"{setup.model}, adapters come and go, {setup.targets}, r = {setup.rank}",
        axis="operation",
        reference=BANK,
        rows=rows,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_for("Many adapters in one batch, and adapters that come and go.", rounds=7)
    add_model_arguments(parser, targets=["all-linear"])
    parser.set_defaults(model="llama-135m")
    parser.add_argument("--batch", type=positive, nargs="+", default=[16, 64], help="rows; two tables each")
    parser.add_argument("--length", type=positive, default=128, help="tokens of each prompt")
    parser.add_argument("--layers", type=positive, help="of the model; by default its own number")
    parser.add_argument("--adapters", type=positive, default=256, help="the most in one bank")
    parser.add_argument("--precision", choices=PRECISIONS, help="by default fp32 on a CPU, bf16 on CUDA")
    args = start(parser, argv)
    if args.quick:
        shrink_to_prove(args)
    args.precision = args.precision or ("bf16" if args.device.type == "cuda" else "fp32")
    names = [f"a{i}" for i in range(args.adapters)]
    tables: list[Table] = []
    for targets in args.targets:
        setup = setup_from(args, targets=targets, precision=args.precision, layers=args.layers)
        servers: dict[str, Server] = {}
        reasons: dict[str, str] = {}
        with tempfile.TemporaryDirectory() as folder:
            write_adapters(setup, Path(folder), names)
            for name, kind in SERVERS.items():
                with noting_why_not(name, reasons):
                    servers[name] = kind(setup, Path(folder), names)
            table = partial(
                measure, servers, setup, names, length=args.length, rounds=args.rounds, reasons=reasons
            )
            for batch in args.batch:
                tables.append(table(batch=batch, decode=False))
                if not SHAPES[args.model].head:
                    tables.append(table(batch=batch, decode=True))
            tables.append(measure_operations(servers, setup, rounds=args.rounds, reasons=reasons))
    finish("many_adapters", args, tables)


def shrink_to_prove(args: Any) -> None:
    """Make a quick run of it."""
    shrink(args)
    args.batch, args.length, args.adapters = [4], 8, min(args.adapters, 6)


if __name__ == "__main__":
    main()
