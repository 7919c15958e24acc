"""What LoRA's narrow products over all tokens take, and whether chunks or shared inputs would save any of it.

    python benchmarks/skinny_products.py
    python benchmarks/skinny_products.py --batch 32 --length 16 --width 384 --rank 4     # SST-2's

Three layers read the same x (n, in), as query, key and value do. Their narrow products A x^T and (g B)^T x,
and under autocast the rounding of x, are computed one by one, in chunks of tokens that stay in the cache, and
all at once, with three A's or three g B's stacked. The layers' own products x W^T stand beside them: they are
what a saving is to be held against.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
from bench.arguments import parser_for, positive, start
from bench.reports import finish
from bench.setups import add_batch_arguments
from bench.tables import Row, Table
from bench.timing import Contestant, device_clock, race
from torch import Tensor

SEPARATE, CHUNKS, STACKED, OWN = "one by one", "in chunks", "all at once", "the layers' own"
LAYERS = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Products:
    """The tensors of three layers that share an input, and what is done with them.

    Args:
        args: the command line.
        dtype: in which the products are formed.
    """

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype) -> None:
        tokens, width, r = args.batch * args.length, args.width, args.rank
        options = {"device": args.device, "dtype": dtype}
        self.x = torch.randn(tokens, width, **options)
        self.x32 = self.x.float()
        self.W = [torch.randn(width, width, **options) for _ in range(LAYERS)]
        self.A = [torch.randn(r, width, **options) for _ in range(LAYERS)]
        self.gB = [torch.randn(r, tokens, **options) for _ in range(LAYERS)]
        self.chunk = args.chunk

    def operations(self) -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
        """Yield what is computed, and the ways to do so."""
        own = {OWN: lambda: [self.x @ W.T for W in self.W]}
        yield (
            "A x^T",
            {
                SEPARATE: lambda: [A @ self.x.T for A in self.A],
                CHUNKS: lambda: [self.projected(A) for A in self.A],
                STACKED: lambda: torch.cat(self.A) @ self.x.T,
                **own,
            },
        )
        yield (
            "(g B)^T x",
            {
                SEPARATE: lambda: [gB @ self.x for gB in self.gB],
                CHUNKS: lambda: [self.summed(gB) for gB in self.gB],
                STACKED: lambda: torch.cat(self.gB) @ self.x,
                **own,
            },
        )
        if self.x.dtype != torch.float32:
            yield (
                "rounding x",
                {
                    SEPARATE: lambda: [self.x32.to(self.x.dtype) for _ in range(LAYERS)],
                    STACKED: lambda: self.x32.to(self.x.dtype),
                    **own,
                },
            )

    def projected(self, A: Tensor) -> Tensor:
        """Return A x^T, (r, n), some tokens at a time."""
        out = self.x.new_empty(len(A), len(self.x))
        for first in range(0, len(self.x), self.chunk):
            some = slice(first, first + self.chunk)
            torch.mm(A, self.x[some].T, out=out[:, some])
        return out

    def summed(self, gB: Tensor) -> Tensor:
        """Return (g B)^T x, (r, in), some tokens at a time."""
        out = self.x.new_zeros(len(gB), self.x.shape[1])
        for first in range(0, len(self.x), self.chunk):
            some = slice(first, first + self.chunk)
            out.addmm_(gB[:, some], self.x[some])
        return out


def table(args: argparse.Namespace, precision: str) -> Table:
    """Return the comparison in one precision."""
    rows: list[Row] = []
    for operation, ways in Products(args, DTYPES[precision]).operations():
        contestants = [Contestant(name=name, run=run) for name, run in ways.items()]
        samples = race(contestants, clock=device_clock(args.device), rounds=args.rounds, shortest=0.02)
        rows += [Row(name=name, point=operation, samples=samples[name]) for name in ways]
    return Table(
        title=f"{LAYERS} layers of {args.width} x {args.width} on one x, {args.batch * args.length} tokens, "
        f"r = {args.rank}, chunks of {args.chunk} tokens, {precision}",
        axis="computed",
        reference=SEPARATE,
        rows=rows,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_for("The narrow products of LoRA: in chunks, and shared.", rounds=21)
    add_batch_arguments(parser)
    parser.add_argument("--width", type=positive, default=768, help="of the layers")
    parser.add_argument("--chunk", type=positive, default=256, help="tokens in a chunk")
    args = start(parser, argv)
    if args.quick:
        args.batch, args.length, args.width, args.chunk = 2, 16, 64, 8
    finish("skinny_products", args, [table(args, precision) for precision in DTYPES])


if __name__ == "__main__":
    main()
