"""Fine-tune BERT on IMDB reviews with LoRA, with bottleneck adapters, or with both at once.

    lora      low-rank updates on every query and value projection
    adapter   a bottleneck after both output projections of each block (Houlsby et al., 2019)
    both      the two together (default)

The classifier is trained in full and everything else is frozen. Reviews are truncated to
--max-length tokens, padded per batch and masked. 10 % of the training set is held out (stratified)
and followed at every epoch; the test split is measured once, at the end.

    python examples/imdb.py                                      # bert-base-uncased on IMDB
    python examples/imdb.py --method lora --limit 2000           # one method, a shorter run
    accelerate launch examples/imdb.py --mixed-precision bf16    # several GPUs
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import common
from torch import nn

import minilora
from minilora import AdapterConfig, LoRAConfig

TASK = common.Task(
    name="imdb",
    title="IMDB",
    data="stanfordnlp/imdb",
    reported_splits=("test", "validation"),
    report_every_epoch=False,
    max_length=256,
    sentences=(
        "I went in tired and came out wide awake. The script trusts its audience, the camera never "
        "shows off, and the last half hour is as tense as anything I have seen this year.",
        "Somebody spent a great deal of money on this and forgot to buy a story. By the second "
        "chase I was counting the exits.",
        "The first act drags and one subplot goes nowhere. Still, the two leads are so good "
        "together that I forgave all of it.",
        "My father loved the original. We turned this one off after forty minutes and did the "
        "dishes instead.",
    ),
)


def add_modules(model: nn.Module, args: argparse.Namespace) -> str:
    """Injects what `--method` asks for into `model`, in place.

    Returns:
        The method in words, for the plan and the title of the curves.
    """
    words = []
    if args.method in ("lora", "both"):
        minilora.inject(
            model,
            targets=["query", "value"],
            config=LoRAConfig(r=args.rank, alpha=args.alpha, dropout=args.dropout),
            trainable=["classifier"],
        )
        words.append(f"LoRA r={args.rank}, alpha={args.alpha:g} on query and value")
    if args.method in ("adapter", "both"):
        minilora.inject(
            model,
            targets=["output.dense"],  # attention.output.dense and output.dense of each block
            config=AdapterConfig(bottleneck=args.bottleneck),
            trainable=() if args.method == "both" else ["classifier"],
        )
        words.append(f"adapters of width {args.bottleneck} on both output projections")
    return " + ".join(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example and returns its exit code."""
    parser = common.argument_parser(TASK, __doc__)
    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        choices=("lora", "adapter", "both"),
        default="both",
        help="what is injected (default: %(default)s)",
    )
    method.add_argument(
        "--bottleneck",
        type=common.positive_int,
        default=64,
        metavar="N",
        help="width of the adapters (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    return common.run(TASK, args, add_modules)


if __name__ == "__main__":
    sys.exit(main())
