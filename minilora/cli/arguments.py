"""What the command line takes, its help, and the exit codes."""

from __future__ import annotations

import argparse
from enum import IntEnum
from pathlib import Path

from .. import __version__
from ..files.tensors import FLOAT_DTYPES

ADAPTER = "a minilora file, a PEFT folder, or a slim checkpoint of a Trainer"
BASE = "a folder with a model's safetensors files, or one such file"


class Exit(IntEnum):
    """How a command ends."""

    DONE = 0
    NO = 1
    ERROR = 2
    UNCHECKED = 3
    INTERRUPTED = 130
    CLOSED = 141


EXIT_CODES = """\
exit codes:
  0    done, or the answer is yes
  1    the answer is no: damaged, does not belong to the base, differs
  2    an error, or a command line that is not understood; nothing was written
  3    nothing was checked, since nothing is known to check against
  130  interrupted; nothing was written
  141  the reader of the output went away
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser; the command's name is in `command`, None where there was none."""
    main = argparse.ArgumentParser(
        prog="minilora",
        description="Look at adapter files, compare, check, convert, combine and fuse them; without a model.",
        epilog=EXIT_CODES + "\nminilora COMMAND --help shows an example of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    main.add_argument("--version", action="version", version=f"minilora {__version__}")
    commands = main.add_subparsers(dest="command", metavar="COMMAND")

    command = _command(
        commands,
        "inspect",
        "show what a file holds",
        "exit codes: 0, the file is whole; 1, it is damaged; 2, an error",
        "minilora inspect adapter.safetensors",
    )
    command.add_argument("file", type=Path, metavar="FILE", help=ADAPTER)
    command.add_argument("--json", action="store_true", help="for programs: every site, shape and number")

    command = _command(
        commands,
        "verify",
        "check that a file is whole and belongs to a base",
        "exit codes: 0, yes; 1, no; 2, an error; 3, it fits by names and shapes, and no value was compared",
        "minilora verify adapter.safetensors --base base/",
    )
    command.add_argument("file", type=Path, metavar="FILE", help=ADAPTER)
    command.add_argument("--base", type=Path, required=True, help=BASE)
    command.add_argument("--json", action="store_true", help="for programs: the answer, site by site")

    command = _command(
        commands,
        "diff",
        "show in what two files differ",
        "exit codes: 0, the same; 1, they differ; 2, an error",
        "minilora diff monday.safetensors tuesday.safetensors",
    )
    command.add_argument("a", type=Path, metavar="A", help=ADAPTER)
    command.add_argument("b", type=Path, metavar="B", help="another")
    command.add_argument("--json", action="store_true", help="for programs: every site that differs")

    command = _command(
        commands,
        "convert",
        "write a file anew in another format",
        "exit codes: 0, done; 2, an error, and nothing was written",
        "minilora convert adapter.safetensors adapter-for-peft --to peft",
    )
    command.add_argument("source", type=Path, metavar="IN", help=ADAPTER)
    command.add_argument(
        "target", type=Path, metavar="OUT", help="a file or a folder that does not exist yet"
    )
    command.add_argument(
        "--to", choices=("minilora", "peft"), default="minilora", help="the new format (default: minilora)"
    )
    command.add_argument(
        "--portable", action="store_true", help="with --to peft: what every server reads alike, LoRA alone"
    )

    command = _command(
        commands,
        "combine",
        "write the weighted sum of several adapters as one",
        "exit codes: 0, done; 2, an error, and nothing was written",
        "minilora combine legal.safetensors formal.safetensors --weights 0.7 0.3 --out both.safetensors",
    )
    command.add_argument("adapters", type=Path, nargs="+", metavar="FILE", help=ADAPTER)
    command.add_argument(
        "--weights", type=float, nargs="+", required=True, metavar="W", help="a number for each file"
    )
    command.add_argument("--out", type=Path, required=True, help="a file or a folder that does not exist yet")
    command.add_argument("--r", type=int, help="the largest rank of the result (default: the sum of all)")
    command.add_argument(
        "--heads", type=Path, metavar="FILE", help="whose modules trained in full are taken, if any has some"
    )
    command.add_argument("--to", choices=("minilora", "peft"), default="minilora", help="the format")

    command = _command(
        commands,
        "fuse",
        "write a base with an adapter in its weights, shard by shard",
        "exit codes: 0, done; 2, an error, and nothing was written",
        "minilora fuse --base base/ --adapter adapter.safetensors --out fused/",
    )
    command.add_argument("--base", type=Path, required=True, help=BASE)
    command.add_argument("--adapter", type=Path, required=True, help=ADAPTER)
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a folder, or a file where the base is one; does not exist yet",
    )
    command.add_argument("--dtype", choices=sorted(FLOAT_DTYPES), help="of the result (default: the base's)")
    command.add_argument("--no-check-base", action="store_true", help="fuse into another base than its own")
    return main


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    does: str,
    codes: str,
    example: str,
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=does,
        description=f"{does[0].upper()}{does[1:]}.",
        epilog=f"example:\n  {example}\n\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
