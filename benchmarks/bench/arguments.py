"""The options that the benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch


def parser_for(description: str, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return a parser with the options that benchmarks share.

    Args:
        description: what is measured.
        rounds: default of `--rounds`; None for a script without rounds, which writes no results either.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument("--rank", type=positive, default=8, help="rank r of the updates; alpha is 2 r")
    parser.add_argument(
        "--threads", type=positive, help="CPU threads of torch; by default torch's own choice"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and inputs")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny models and few rounds: shows that the script works; the figures mean nothing",
    )
    if rounds is not None:
        parser.add_argument(
            "--rounds", type=positive, default=rounds, help="timed rounds; every contestant runs once in each"
        )
        parser.add_argument(
            "--output",
            type=Path,
            help="where to write the .json, .md and .png; by default "
            "benchmarks/results/<date>-<benchmark>-<device>, or runs/benchmarks/ with --quick",
        )
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def positive(text: str) -> int:
    """Read a whole number from 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def start(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line and set torch up accordingly; `args.device` is a `torch.device` afterwards."""
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if args.quick:
        if "rounds" in args:
            args.rounds = min(args.rounds, 3)
        args.threads = args.threads or 1  # tiny matrices are no work for two
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.device = torch.device(args.device)
    return args
