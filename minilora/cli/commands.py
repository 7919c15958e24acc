"""The command line: look at adapter files, compare, check, convert and fuse them. No model is built.

Results go to stdout, messages and progress to stderr. Exit codes: 0, done or yes; 1, the answer is no (what
is verified does not fit, what is compared differs); 2, an error; 130, interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError, MiniLoRAError
from ..files.contents import Contents
from ..files.formats import native, peft
from ..files.loading import read
from ..files.tensors import FLOAT_DTYPES
from .base_files import BaseFiles, fit
from .describe import described, differences, table
from .fuse_files import fuse_files

NO = 1
ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except (MiniLoRAError, OSError) as error:
        _say(f"error: {error}")
        return ERROR
    except KeyboardInterrupt:
        _say("interrupted; nothing has been written")
        return INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minilora", description="Look at adapter files, compare, check, convert and fuse them."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("inspect", help="show what a file holds")
    command.add_argument("file", type=Path, help="a minilora file or a PEFT folder")
    command.add_argument("--json", action="store_true", help="for programs: every site, shape and number")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("verify", help="check that a file is whole and belongs to a base")
    command.add_argument("file", type=Path, help="a minilora file or a PEFT folder")
    command.add_argument("--base", type=Path, required=True, help="a folder with a model's safetensors files")
    command.set_defaults(run=_verify)

    command = commands.add_parser("convert", help="write a file anew in another format")
    command.add_argument("source", type=Path, metavar="IN", help="a minilora file or a PEFT folder")
    command.add_argument("target", type=Path, metavar="OUT", help="which does not exist yet")
    command.add_argument("--to", choices=("peft", "minilora"), required=True)
    command.set_defaults(run=_convert)

    command = commands.add_parser("fuse", help="write a base with an adapter in its weights, shard by shard")
    command.add_argument("--base", type=Path, required=True, help="a folder with a model's safetensors files")
    command.add_argument("--adapter", type=Path, required=True, help="a minilora file or a PEFT folder")
    command.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    command.add_argument("--dtype", choices=sorted(FLOAT_DTYPES), help="of the result (default: the base's)")
    command.add_argument("--no-check-base", action="store_true", help="fuse into another base than its own")
    command.set_defaults(run=_fuse)

    command = commands.add_parser("diff", help="show in what two files differ")
    command.add_argument("a", type=Path, metavar="A")
    command.add_argument("b", type=Path, metavar="B")
    command.set_defaults(run=_diff)
    return parser


def _inspect(arguments: argparse.Namespace) -> int:
    contents = read(arguments.file)
    _tell(contents)
    size = _size(arguments.file)
    if arguments.json:
        summary = {"path": str(arguments.file), "format": _format(arguments.file), "bytes": size}
        print(json.dumps({**summary, **described(contents)}, indent=2))
    else:
        parameters = sum(tensor.numel() for tensor in contents.tensors.values())
        print(f"{arguments.file}: {_format(arguments.file)}, {parameters:,} parameters, {size:,} bytes")
        for line in table(contents):
            print(line)
    return NO if contents.damage else 0


def _verify(arguments: argparse.Namespace) -> int:
    contents = read(arguments.file)
    _tell(contents)
    base = BaseFiles.open(arguments.base)
    if contents.damage:
        print(f"no: {contents.damage}")
        return NO
    try:
        comparison = fit(contents, base).comparison
    except CheckpointError as error:
        print(f"no: {error}")
        return NO
    print(f"{'no' if comparison.different else 'yes'}: {comparison}")
    return NO if comparison.different else 0


def _convert(arguments: argparse.Namespace) -> int:
    if _format(arguments.source) == arguments.to:
        raise CheckpointError(f"{str(arguments.source)!r} is in {arguments.to}'s format already")
    if arguments.target.exists():
        raise CheckpointError(f"{str(arguments.target)!r} exists already; choose another name")
    contents = _whole(arguments.source)
    if arguments.to == "minilora":
        native.write(arguments.target, contents)
        return 0
    peft.write(arguments.target, contents)
    if contents.manifest.trainable:
        _say(
            "note: PEFT takes any module whose name ends with one of "
            f"{list(contents.manifest.trainable)} for a trained one; "
            'minilora.save(model, path, format="peft") knows the model and allows for that'
        )
    return 0


def _fuse(arguments: argparse.Namespace) -> int:
    fuse_files(
        arguments.base,
        _whole(arguments.adapter),
        arguments.out,
        dtype=FLOAT_DTYPES[arguments.dtype] if arguments.dtype else None,
        check_base=not arguments.no_check_base,
        say=_say,
    )
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    lines = list(differences(_whole(arguments.a), _whole(arguments.b)))
    for line in lines or ["the same"]:
        print(line)
    return NO if lines else 0


def _whole(path: Path) -> Contents:
    contents = read(path)
    if contents.damage:
        raise CheckpointError(f"{str(path)!r}: {contents.damage}")
    _tell(contents)
    return contents


def _tell(contents: Contents) -> None:
    for note in contents.notes:
        _say(f"note: {note}")


def _format(path: Path) -> str:
    return "peft" if path.is_dir() else "minilora"


def _size(path: Path) -> int:
    if path.is_dir():
        return sum((path / name).stat().st_size for name in (peft.CONFIG_FILE, peft.TENSOR_FILE))
    return path.stat().st_size


def _say(line: str) -> None:
    print(f"minilora: {line}", file=sys.stderr, flush=True)
