"""Fine-tune BERT on SST-2 with LoRA: low-rank updates on every query and value projection.

The recipe: r = 4, alpha = 16, LoRA dropout 0.1, the classifier trained in full, everything else
frozen; AdamW, a linear schedule with 6 % warm-up, cross-entropy, 3 epochs. 10 % of the training set
is held out (stratified); the data's own validation split is reported beside it.

    python examples/sst2.py                                 # bert-base-uncased on GLUE SST-2
    python examples/sst2.py --model minilm --limit 2000     # a smaller encoder, a shorter run
    accelerate launch examples/sst2.py                      # several GPUs, nothing else changes
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import common
from torch import nn

import minilora
from minilora import LoRAConfig

TASK = common.Task(
    name="sst2",
    title="SST-2",
    data="nyu-mll/glue:sst2",
    reported_splits=("validation",),
    report_every_epoch=True,
    max_length=128,
    sentences=(
        "A quiet, generous film that earns every one of its tears.",
        "Two hours of noise in search of a single idea.",
        "The jokes are old, but the cast makes them feel new.",
        "I wanted to like it, and the film gave me no help at all.",
        "Not the disaster I was promised; in fact I would watch it again tonight.",
    ),
)


def add_lora(model: nn.Module, args: argparse.Namespace) -> str:
    """Injects LoRA into `model`, in place.

    Returns:
        The method in words, for the plan and the title of the curves.
    """
    minilora.inject(
        model,
        targets=["query", "value"],
        config=LoRAConfig(r=args.rank, alpha=args.alpha, dropout=args.dropout),
        trainable=["classifier"],
    )
    return f"LoRA r={args.rank}, alpha={args.alpha:g} on query and value"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example and returns its exit code."""
    args = common.argument_parser(TASK, __doc__).parse_args(argv)
    return common.run(TASK, args, add_lora)


if __name__ == "__main__":
    sys.exit(main())
