"""Inference with an update beside the weights, merged, and fused, against the bare model.

    python benchmarks/merge_speed.py                                         # BERT-base, 16 x 128, CPU
    python benchmarks/merge_speed.py --targets qv --batch 1
    python benchmarks/merge_speed.py --device cuda --model llama-1b --batch 1 --decode

Before anything is timed, the outputs are compared: what should compute the same function does, or the run
ends there.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import common
import models
import torch
import transformers
from common import Contestant, NotMeasured, Row, Table
from models import Setup
from torch import Tensor, nn

import minilora

BASE = "base"
UNMERGED = "minilora unmerged"
DECODED_TOKENS = 16
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest difference to the unmerged outputs, relative to the largest of them. bfloat16 keeps 8 bits."""
ERROR = "difference to unmerged"


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form of the model, as a row of the table."""

    name: str
    build: Callable[[], nn.Module]
    """Returns a model of its own, that no other form shares weights with."""
    compiled: bool = False
    in_bfloat16: bool = False
    """Whether the form is cast as a whole, and so runs without autocast."""


def forms(setup: Setup) -> list[Form]:
    """Return the forms to compare. All but the base hold the same update."""
    base = setup.build().eval()
    unmerged = copy.deepcopy(base)
    models.with_minilora(unmerged, setup)
    models.randomise_update(unmerged)

    def changed(change: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
        return lambda: change(copy.deepcopy(unmerged), **options)

    def peft(*, merged: bool) -> nn.Module:
        model = models.with_peft(copy.deepcopy(base), setup).eval()
        models.copy_adapter_to_peft(unmerged, model)
        if merged:
            model.merge_adapter()
        return model

    to_bfloat16 = changed(minilora.fuse, dtype=torch.bfloat16)
    return [
        Form(name=BASE, build=lambda: copy.deepcopy(base)),
        Form(name=UNMERGED, build=lambda: copy.deepcopy(unmerged)),
        Form(name="minilora merged", build=changed(minilora.merge)),
        Form(name="minilora fused", build=changed(minilora.fuse)),
        Form(name="minilora fused to bf16", build=to_bfloat16, in_bfloat16=True),
        Form(name="minilora fused + torch.compile", build=changed(minilora.fuse), compiled=True),
        Form(
            name="minilora fused to bf16 + torch.compile", build=to_bfloat16, in_bfloat16=True, compiled=True
        ),
        Form(name="PEFT unmerged", build=lambda: peft(merged=False)),
        Form(name="PEFT merged", build=lambda: peft(merged=True)),
    ]


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
        self.tokens = setup.tokens(batch, length)
        self.on_cuda = setup.device.type == "cuda"
        self.call = compiled(self.model, on_cuda=self.on_cuda) if form.compiled else self.model
        # A context can be entered once, so it is made at each call; a form in bfloat16 needs none.
        self.setup = None if form.in_bfloat16 else setup
        self.options = {"use_cache": False, "logits_to_keep": 1} if not setup.shape.head else {}

    def prepare(self) -> None:
        """Nothing to do before a pass."""

    @torch.inference_mode()
    def run(self) -> Tensor:
        """Return the logits: of the sequences, or of their last tokens."""
        return self.logits(self.call, self.tokens, **self.options)

    def logits(self, call: Callable[..., Any], tokens: Tensor, **options: Any) -> Tensor:
        """Call a model in this form's precision."""
        if self.on_cuda:
            torch.compiler.cudagraph_mark_step_begin()  # so that a replay may overwrite the last outputs
        if self.setup is None:
            return call(input_ids=tokens, **options).logits
        with self.setup.autocast(training=False):
            return call(input_ids=tokens, **options).logits


class Decode(Forward):
    """Greedy decoding, token by token, after a prompt that is read off the clock.

    The key-value cache is transformers' `StaticCache`, which CUDA graphs need, for all forms alike. Every
    step attends over its whole length.
    """

    def __init__(self, form: Form, setup: Setup, batch: int, length: int) -> None:
        super().__init__(form, setup, batch, length)
        self.cache = transformers.StaticCache(
            config=setup.shape.config, max_cache_len=length + DECODED_TOKENS
        )
        self.options = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        self.next = self.tokens[:, -1:].contiguous()

    @torch.inference_mode()
    def prepare(self) -> None:
        """Read the prompt."""
        self.cache.reset()
        self.next = self.logits(self.model, self.tokens, **self.options).argmax(-1)

    @torch.inference_mode()
    def run(self) -> Tensor:
        """Decode, and return the logits of the last token."""
        token = self.next
        for _ in range(DECODED_TOKENS):
            logits = self.logits(self.call, token, **self.options)
            token = logits.argmax(-1)
        return logits


def compiled(model: nn.Module, *, on_cuda: bool) -> Callable[..., Any]:
    """Compile a model; on CUDA its kernels are replayed as a CUDA graph."""
    return torch.compile(model, mode="reduce-overhead" if on_cuda else None, dynamic=False)


def measure(setup: Setup, *, batch: int, length: int, decode: bool, compile_: bool, rounds: int) -> Table:
    """Return the table for one setup.

    Raises:
        SystemExit: when a form's outputs are not those of the unmerged model.
    """
    work: dict[str, Forward] = {}
    rows: dict[str, Row] = {}
    outputs: dict[str, Tensor] = {}
    for form in forms(setup):
        rows[form.name] = Row(name=form.name)
        try:
            if form.compiled and not compile_:
                raise NotMeasured("switched off (--no-compile, or --quick without --compile)")
            own = (Decode if decode else Forward)(form, setup, batch, length)
            # Decoding goes its own way after one different token: compare what the prompt gives.
            check = Forward.run if not decode else _first_logits
            outputs[form.name] = check(own).float().clone()
            work[form.name] = own
        except NotMeasured as reason:
            rows[form.name] = Row(name=form.name, reason=str(reason))
        except (torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException) as error:
            rows[form.name] = Row(name=form.name, reason=f"{type(error).__name__}")
    differences = compare(outputs, setup)
    samples = common.race(
        [
            Contestant(name=name, run=own.run, prepare=own.prepare if decode else None)
            for name, own in work.items()
        ],
        clock=common.device_clock(setup.device),
        rounds=rounds,
        shortest=0.02,
    )
    for name, seconds in samples.items():
        per_call = [each / DECODED_TOKENS for each in seconds] if decode else seconds
        rows[name] = Row(name=name, samples=per_call, extra={ERROR: differences[name]})
    what = f"{DECODED_TOKENS} tokens decoded one by one, time per token" if decode else "one forward pass"
    return Table(
        title=f"{setup.model}, {what}, batch {batch} x {length}, {setup.targets}, r = {setup.rank}, "
        f"{setup.precision}",
        reference=BASE,
        rows=list(rows.values()),
        formats={ERROR: "{:.1e}".format},
    )


def _first_logits(work: Decode) -> Tensor:
    work.prepare()
    with torch.inference_mode():
        return work.logits(work.call, work.tokens[:, -1:].contiguous(), **work.options)


def compare(outputs: dict[str, Tensor], setup: Setup) -> dict[str, float]:
    """Return how far each output is from the unmerged one, relative to the largest value there.

    Raises:
        SystemExit: when one is further away than rounding explains, or the update has no effect.
    """
    expected = outputs[UNMERGED]
    scale = expected.abs().max()
    differences = {name: ((out - expected).abs().max() / scale).item() for name, out in outputs.items()}
    for name, difference in differences.items():
        in_bfloat16 = "bf16" in name or setup.precision != "fp32"
        tolerance = TOLERANCE[torch.bfloat16 if in_bfloat16 else torch.float32]
        if name != BASE and not difference <= tolerance:
            raise SystemExit(f"{name}: differs from {UNMERGED} by {difference:.2e}, which is not rounding")
    if differences[BASE] <= TOLERANCE[torch.float32]:
        raise SystemExit("the update does not change the model's outputs: nothing to compare")
    return differences


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = common.parser_for("Inference speed: unmerged, merged and fused against the base.", rounds=9)
    parser.add_argument("--model", choices=list(models.SHAPES), default="bert-base", help="random weights")
    parser.add_argument("--batch", type=common.positive, default=16, help="sequences")
    parser.add_argument("--length", type=common.positive, default=128, help="tokens in each sequence")
    parser.add_argument(
        "--targets", choices=models.TARGETS, nargs="+", default=["all-linear"], help="one table for each"
    )
    parser.add_argument(
        "--precision",
        choices=models.PRECISIONS,
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
    args = common.start(parser, argv)
    if args.quick:
        args.model, args.batch, args.length = models.SHAPES[args.model].quick, 2, 16
    if args.decode and models.SHAPES[args.model].head:
        parser.error("--decode needs a language model: --model llama-1b")
    if args.compile is None:
        args.compile = not args.quick
    args.precision = args.precision or ("bf16-autocast" if args.device.type == "cuda" else "fp32")
    tables = [
        measure(
            Setup(
                model=args.model,
                device=args.device,
                targets=targets,
                rank=args.rank,
                precision=args.precision,
                seed=args.seed,
            ),
            batch=args.batch,
            length=args.length,
            decode=args.decode,
            compile_=args.compile,
            rounds=args.rounds,
        )
        for targets in args.targets
    ]
    variant = "" if args.model.startswith("bert") else f"-{args.model}"
    common.finish(f"merge_speed{variant}{'-decode' if args.decode else ''}", args, tables)


if __name__ == "__main__":
    main()
