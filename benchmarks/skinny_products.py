"""What LoRA's narrow products over all tokens take, and whether chunks or shared inputs would save any of it.

    python benchmarks/skinny_products.py
    python benchmarks/skinny_products.py --batch 32 --length 16 --width 384 --rank 4     # SST-2's

Three layers read the same x (n, in), as query, key and value do. Computed one by one, in chunks of tokens
that stay in the cache, and all at once, with what is narrow stacked:

    h = A x^T    gB = B^T g^T    dA = gB x    dB = h g        all four of each layer, x and g read twice
    rounding x                                                under autocast, by each layer or once

The layers' own products x W^T stand beside them: they are what a saving is to be held against. From call to
call another x and g are taken, which no cache holds any more; but for the rounding, of one x.
"""

from __future__ import annotations

import argparse
import itertools
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
MOST_INPUTS = 32
BYTES_OF_INPUTS = 256 * 2**20  # more than caches hold

Way = Callable[[Tensor, Tensor], object]
"""Computes something of x and g, both (n, width)."""


class Layers:
    """Three layers that share an input, and what is computed of it.

    Args:
        args: the command line.
        dtype: in which products are formed.
    """

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype) -> None:
        self.options = {"device": args.device, "dtype": dtype}
        self.shape, self.chunk = (args.batch * args.length, args.width), args.chunk
        self.x32 = torch.randn(self.shape, device=args.device)
        self.W = [torch.randn(args.width, args.width, **self.options) for _ in range(LAYERS)]
        self.A = [torch.randn(args.rank, args.width, **self.options) for _ in range(LAYERS)]
        self.B = [torch.randn(args.width, args.rank, **self.options) for _ in range(LAYERS)]

    def inputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one x and g after the other, for ever."""
        size = 2 * self.shape[0] * self.shape[1] * self.options["dtype"].itemsize
        count = min(MOST_INPUTS, 1 + BYTES_OF_INPUTS // size)
        pairs = [tuple(torch.randn(2, *self.shape, **self.options).unbind()) for _ in range(count)]
        return itertools.cycle(pairs)

    def operations(self) -> Iterator[tuple[str, dict[str, Way]]]:
        """Yield what is computed, and the ways to do so."""
        own: dict[str, Way] = {OWN: lambda x, g: [x @ W.T for W in self.W]}
        yield "h", {SEPARATE: self.projected, STACKED: lambda x, g: torch.cat(self.A) @ x.T, **own}
        yield "all four", {SEPARATE: self.gradients, CHUNKS: self.in_chunks, **own}
        if self.options["dtype"] != torch.float32:
            yield (
                "rounding x",
                {
                    SEPARATE: lambda x, g: [self.x32.to(x.dtype) for _ in range(LAYERS)],
                    STACKED: lambda x, g: self.x32.to(x.dtype),
                    **own,
                },
            )

    def projected(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """Return h, (r, n), of each layer."""
        return [A @ x.T for A in self.A]

    def gradients(self, x: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return dA, (r, in), and dB^T, (r, out), of each layer."""
        return [((B.T @ g.T) @ x, (A @ x.T) @ g) for A, B in zip(self.A, self.B, strict=True)]

    def in_chunks(self, x: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the same, from one chunk of tokens after the other."""
        found = []
        for A, B in zip(self.A, self.B, strict=True):
            dA, dB = torch.zeros_like(A), torch.zeros_like(A)
            for x_c, g_c in zip(x.split(self.chunk), g.split(self.chunk), strict=True):
                dA.addmm_(B.T @ g_c.T, x_c)
                dB.addmm_(A @ x_c.T, g_c)
            found.append((dA, dB))
        return found


def table(args: argparse.Namespace, precision: str) -> Table:
    """Return the comparison in one precision."""
    layers, rows = Layers(args, DTYPES[precision]), []
    inputs = layers.inputs()

    def called(way: Way) -> Callable[[], object]:
        return lambda: way(*next(inputs))

    for operation, ways in layers.operations():
        contestants = [Contestant(name=name, run=called(way)) for name, way in ways.items()]
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
