"""The command line's commands: results go to stdout, messages and progress to stderr."""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..bank import combine
from ..errors import CheckpointError, MiniLoRAError
from ..files.contents import Contents
from ..files.formats import native, peft, trainer
from ..files.loading import read
from ..files.tensors import FLOAT_DTYPES
from . import terminal
from .arguments import Exit, parser
from .base_files import INDEX_FILE, SINGLE_FILE, BaseFiles
from .describe import described, table
from .differences import Differences
from .fuse_files import fuse_files
from .inventory import Inventory
from .verify_files import verify_files


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, one of `arguments.Exit`.

    Raises:
        SystemExit: after `--help`, `--version`, and a command line that is not understood.
    """
    try:
        code = _run(argv)
        terminal.flush()
        return code
    except BrokenPipeError:
        return Exit.CLOSED
    except (MiniLoRAError, OSError) as error:
        terminal.say(f"error: {_told(error)}")
        return Exit.ERROR
    except KeyboardInterrupt:
        terminal.say("interrupted; nothing has been written")
        return Exit.INTERRUPTED
    finally:
        terminal.settle()


def _run(argv: Sequence[str] | None) -> Exit:
    arguments = parser().parse_args(argv)
    if arguments.command is None:
        parser().print_help()
        return Exit.DONE
    return COMMANDS[arguments.command](arguments)


def _inspect(arguments: argparse.Namespace) -> Exit:
    contents = _read(arguments.file)
    format, size = _format(arguments.file), _size(arguments.file)
    if arguments.json:
        path = str(arguments.file)
        terminal.show_json({"path": path, "format": format, "bytes": size, **described(contents)})
    else:
        parameters = sum(tensor.numel() for tensor in contents.tensors.values())
        name = terminal.plain(str(arguments.file))
        terminal.show(f"{name}: {format}, {parameters:,} parameters, {size:,} bytes")
        for line in table(contents):
            terminal.show(line)
    return Exit.NO if contents.damage or Inventory.of(contents).problems() else Exit.DONE


def _verify(arguments: argparse.Namespace) -> Exit:
    verdict = verify_files(_read(arguments.file), BaseFiles.open(arguments.base))
    if arguments.json:
        terminal.show_json(verdict.to_dict())
    else:
        terminal.show(f"{verdict.answer}: {verdict.reason}")
    return {"yes": Exit.DONE, "no": Exit.NO, "not checked": Exit.UNCHECKED}[verdict.answer]


def _diff(arguments: argparse.Namespace) -> Exit:
    differences = Differences.between(_read_whole(arguments.a), _read_whole(arguments.b))
    if arguments.json:
        terminal.show_json(differences.to_dict())
    else:
        for line in differences.lines() if differences else ["the same"]:
            terminal.show(line)
    return Exit.NO if differences else Exit.DONE


def _convert(arguments: argparse.Namespace) -> Exit:
    if arguments.portable and arguments.to != "peft":
        raise MiniLoRAError("--portable goes with --to peft, which servers read")
    contents = _read_whole(arguments.source)
    if _format(arguments.source) == arguments.to and not arguments.portable:
        raise CheckpointError(f"{str(arguments.source)!r} is in {arguments.to}'s format already")
    if arguments.target.exists():
        raise CheckpointError(
            f"{str(arguments.target)!r} exists already; choose another name, or remove it first"
        )
    if arguments.to == "minilora":
        native.write(arguments.target, contents)
        return Exit.DONE
    peft.write(arguments.target, contents, portable=arguments.portable)
    if contents.manifest.trainable:
        terminal.say(
            "note: PEFT takes any module whose name ends with one of "
            f"{list(contents.manifest.trainable)} for a trained one; "
            'minilora.save(model, path, format="peft") knows the model and allows for that'
        )
    return Exit.DONE


def _combine(arguments: argparse.Namespace) -> Exit:
    files, weights = arguments.adapters, arguments.weights
    if len(files) != len(weights):
        raise MiniLoRAError(f"--weights has {len(weights)} numbers for {len(files)} files: give one for each")
    if len({path.resolve() for path in files}) != len(files):
        raise MiniLoRAError("a file is given twice: add its weights up")
    if arguments.out.exists():
        raise CheckpointError(
            f"{str(arguments.out)!r} exists already; choose another name, or remove it first"
        )
    made = combine(
        dict(zip(files, weights, strict=True)),
        arguments.out,
        r=arguments.r,
        heads=arguments.heads,
        format=arguments.to,
    )
    ranks = sorted(set(made.ranks.values()))
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    name = terminal.plain(made.path)
    terminal.show(f"{name}: {len(made.ranks)} sites, {shown}, lost: {100 * made.loss:.3g} % of the update")
    return Exit.DONE


def _fuse(arguments: argparse.Namespace) -> Exit:
    fuse_files(
        BaseFiles.open(arguments.base),
        _read_whole(arguments.adapter),
        arguments.out,
        dtype=FLOAT_DTYPES[arguments.dtype] if arguments.dtype else None,
        check_base=not arguments.no_check_base,
        say=terminal.say,
    )
    return Exit.DONE


COMMANDS: dict[str, Callable[[argparse.Namespace], Exit]] = {
    "inspect": _inspect,
    "verify": _verify,
    "diff": _diff,
    "convert": _convert,
    "combine": _combine,
    "fuse": _fuse,
}


def _read(path: Path) -> Contents:
    """Return what an adapter file holds, and tell what its format has to tell."""
    if _format(path) == "peft" and path.is_dir() and not (path / peft.CONFIG_FILE).exists():
        if any((path / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
            raise CheckpointError(
                f"{str(path)!r} is a base model's folder, and no adapter's: a base is given with --base"
            )
    contents = read(path)
    for note in contents.notes:
        terminal.say(f"note: {note}")
    return contents


def _read_whole(path: Path) -> Contents:
    """Return what an adapter file holds, or raise where it is damaged."""
    contents = _read(path)
    if contents.damage:
        raise CheckpointError(f"{str(path)!r} is damaged: {contents.damage}; take another copy of it")
    return contents


def _format(path: Path) -> str:
    if trainer.is_checkpoint(path):
        return "trainer"
    return "peft" if path.is_dir() else "minilora"


def _size(path: Path) -> int:
    if path.is_dir():
        room = trainer if _format(path) == "trainer" else peft
        return sum((path / name).stat().st_size for name in (room.CONFIG_FILE, room.TENSOR_FILE))
    return path.stat().st_size


def _told(error: Exception) -> str:
    """Return an error as a sentence."""
    if isinstance(error, OSError) and error.strerror == os.strerror(errno.ENOENT) and error.filename:
        return f"there is no file or folder {os.fsdecode(error.filename)!r}"
    return str(error)
