"""Inference with an update beside the weights, merged, and fused, against the bare model.

    python benchmarks/merge_speed.py                                         # BERT-base, 16 x 128, CPU
    python benchmarks/merge_speed.py --targets qv --batch 1
    python benchmarks/merge_speed.py --device cuda --model llama-1b --batch 1 --decode

Before anything is timed, the outputs are compared: what should compute the same function does, or the run
ends there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench.agreement import compare_outputs
from bench.arguments import parser_for, start
from bench.decoding import Cache, decoding_options
from bench.forms import BASE, Form, forms
from bench.models import SHAPES
from bench.reports import finish
from bench.setups import (
    PRECISIONS,
    Setup,
    add_batch_arguments,
    add_model_arguments,
    setup_from,
    shrink,
)
from bench.tables import Row, Table
from bench.timing import Contestant, device_clock, race
from bench.unmeasured import NotMeasured, noting_why_not
from torch import Tensor

DECODED_TOKENS = 16
ERROR = "difference to unmerged"


class Forward:
    """One pass over a batch.

    Args:
        form: the model's form.
        setup: device and precision.
        batch: sequences.
        length: tokens in each.
    """

    def __init__(self, form: Form, setup: Setup, batch: int, length: int) -> None:
        self.model = form.build()
        self.setup = setup
        self.tokens = setup.tokens(batch, length)
        self.call = setup.compile(self.model) if form.compiled else self.model
        self.in_bfloat16 = form.in_bfloat16
        self.options = {"use_cache": False, "logits_to_keep": 1} if not setup.shape.head else {}

    @torch.inference_mode()
    def run(self) -> Tensor:
        """Return the logits: of the sequences, or of their last tokens."""
        return self.logits(self.call, self.tokens)

    def first_logits(self) -> Tensor:
        """Return what is compared with the other forms."""
        return self.run()

    def logits(self, call: Callable[..., Any], tokens: Tensor) -> Tensor:
        """Call a model in this form's precision; what is bfloat16 as a whole needs no autocast."""
        self.setup.begin_step()
        if self.in_bfloat16:
            return call(input_ids=tokens, **self.options).logits
        with self.setup.autocast(training=False):
            return call(input_ids=tokens, **self.options).logits


class Decode(Forward):
    """Greedy decoding, token by token, after a prompt that is read off the clock.

    Every step attends over the whole length of the cache, for all forms alike.
    """

    def __init__(self, form: Form, setup: Setup, batch: int, length: int) -> None:
        super().__init__(form, setup, batch, length)
        self.cache = Cache(config=setup.shape.config, max_cache_len=length + DECODED_TOKENS)
        self.options = decoding_options(self.cache)
        self.next = self.tokens[:, -1:].contiguous()

    @torch.inference_mode()
    def prepare(self) -> None:
        """Read the prompt."""
        self.cache.reset()
        self.next = self.logits(self.model, self.tokens).argmax(-1)

    @torch.inference_mode()
    def run(self) -> Tensor:
        """Decode, and return the logits of the last token."""
        token = self.next
        for _ in range(DECODED_TOKENS):
            logits = self.logits(self.call, token)
            token = logits.argmax(-1)
        return logits

    @torch.inference_mode()
    def first_logits(self) -> Tensor:
        """Return the logits after the prompt: forms go their own ways after one different token."""
        self.prepare()
        return self.logits(self.call, self.tokens[:, -1:].contiguous())


def measure(setup: Setup, *, batch: int, length: int, decode: bool, compile_: bool, rounds: int) -> Table:
    """Return the table for one setup.

    Raises:
        SystemExit: when a form's outputs are not those of the unmerged model.
    """
    work: dict[str, Forward] = {}
    outputs: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    names = []
    for form in forms(setup):
        names.append(form.name)
        with noting_why_not(form.name, reasons):
            if form.compiled and not compile_:
                raise NotMeasured("switched off (--no-compile, or --quick without --compile)")
            own = (Decode if decode else Forward)(form, setup, batch, length)
            outputs[form.name] = own.first_logits().float().clone()
            work[form.name] = own
    differences = compare_outputs(outputs, setup.precision)
    samples = race(
        [
            Contestant(name=name, run=own.run, prepare=own.prepare if isinstance(own, Decode) else None)
            for name, own in work.items()
        ],
        clock=device_clock(setup.device),
        rounds=rounds,
        shortest=0.02,
    )
    rows = []
    for name in names:
        if name in reasons:
            rows.append(Row(name=name, reason=reasons[name]))
            continue
        seconds = [each / (DECODED_TOKENS if decode else 1) for each in samples[name]]
        rows.append(Row(name=name, samples=seconds, extra={ERROR: differences[name]}))
    what = f"{DECODED_TOKENS} tokens decoded one by one, time per token" if decode else "one forward pass"
    return Table(
        title=f"{setup.model}, {what}, batch {batch} x {length}, {setup.targets}, r = {setup.rank}, "
        f"{setup.precision}",
        reference=BASE,
        rows=rows,
        formats={ERROR: "{:.1e}".format},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_for("Inference speed: unmerged, merged and fused against the base.", rounds=9)
    add_model_arguments(parser, targets=["all-linear"])
    add_batch_arguments(parser)
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of all forms but those fused to bf16; by default fp32 on a CPU, bf16-autocast on CUDA",
    )
    parser.add_argument(
        "--decode", action="store_true", help="time single-token decoding after a prompt of --length (Llama)"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="the torch.compile rows (minutes, at times); on by default, but not with --quick",
    )
    args = start(parser, argv)
    if args.quick:
        shrink(args)
    if args.decode and SHAPES[args.model].head:
        parser.error("--decode needs a language model: --model llama-1b")
    if args.compile is None:
        args.compile = not args.quick
    args.precision = args.precision or ("bf16-autocast" if args.device.type == "cuda" else "fp32")
    tables = [
        measure(
            setup_from(args, targets=targets, precision=args.precision),
            batch=args.batch,
            length=args.length,
            decode=args.decode,
            compile_=args.compile,
            rounds=args.rounds,
        )
        for targets in args.targets
    ]
    finish("merge_speed", args, tables, variant="decode" if args.decode else "")


if __name__ == "__main__":
    main()
