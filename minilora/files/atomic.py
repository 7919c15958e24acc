"""Files and folders that appear under their names complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import CheckpointError


def write_whole(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file so that, whenever the process dies, the old one or the new one stands there.

    Raises:
        OSError: when it cannot be written; what stood there before still does.
    """
    temporary = _beside(path)
    try:
        with open(temporary, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill, which gets its name only when the block ends well; otherwise it is removed.

    Raises:
        CheckpointError: when something stands under the name already, an empty folder apart.
        OSError: when the folder cannot be made.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{str(path)!r} exists already; choose another name, or remove it first")
    temporary = _beside(path)
    temporary.mkdir(parents=False)
    try:
        yield temporary
        _flush_folder(temporary)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush_folder(path.parent)


def _beside(path: Path) -> Path:
    """Return a name for a temporary neighbour, on the same disk, so that a rename is all it takes."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # the rename itself is on disk only when its folder is
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
