"""Files and folders that appear under their names complete, or not at all.

What is written goes to a temporary neighbour first, `.minilora-<number>.tmp`, which is flushed to disk and
then renamed. It is locked for as long as it is written. So the next save in the same folder can tell the
temporaries of a process that was killed, whose locks are gone, from those of one that is running, and
removes them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

from ..errors import CheckpointError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and no leftover is taken away
    fcntl = None

Chunks = Iterable[bytes | bytearray]

PREFIX, SUFFIX = ".minilora-", ".tmp"  # short: the name beside may have all the 255 bytes that a name can

PATIENCE = 30.0
"""Seconds to wait for another save into the same folder, which holds it for some milliseconds."""


def write_whole(path: Path, chunks: Chunks) -> None:
    """Write a file so that, whenever the process dies, the old one or the new one stands there.

    The mode of the old one is kept, and where the path is a symbolic link, what it points to is replaced.

    Raises:
        OSError: naming the path, when it cannot be written; what stood there before still does.
    """
    with _errors_name(path):
        target = Path(os.path.realpath(path))
        _remove_leftovers(target.parent)
        with _written_beside(target, chunks, _mode(target)) as temporary:
            os.replace(temporary, target)
        _flush_folder(target.parent)


def write_together(folder: Path, files: Mapping[str, Chunks]) -> None:
    """Replace files that belong together, in a folder that exists; others stay.

    The last of the files is the one without which no reader takes the others for anything, and it is away
    while they are exchanged. So if the process dies, the old files are found, or the new ones, or the last
    one is missing. After an error the old ones are back. One save at a time does this in a folder.

    Args:
        folder: where the files are.
        files: what each shall hold, by name.

    Raises:
        CheckpointError: when another save into the folder does not come to an end.
        OSError: naming the folder, when they cannot be written; what stood there before still does.
    """
    with _errors_name(folder), contextlib.ExitStack() as stack:
        _remove_leftovers(folder)
        targets = {Path(os.path.realpath(folder / name)): chunks for name, chunks in files.items()}
        with one_at_a_time(folder):  # amid another's exchange, the old ones would seem to be missing
            modes = {target: _mode(target) for target in targets}
        new = {
            target: stack.enter_context(_written_beside(target, chunks, modes[target]))
            for target, chunks in targets.items()
        }
        stack.enter_context(one_at_a_time(folder))
        old = {target: _beside(target) for target in new if target.exists()}
        for target in old:
            # So that nobody takes it for a leftover. The save that made it may hold it for a moment more.
            stack.enter_context(_locked(target, PATIENCE))
        put: list[Path] = []
        try:
            for target in reversed(old):
                os.replace(target, old[target])
            for target, temporary in new.items():
                put.append(target)
                os.replace(temporary, target)
        except BaseException:
            for target in reversed(put):
                target.unlink(missing_ok=True)
            for target, aside in old.items():
                if aside.exists():
                    os.replace(aside, target)
            raise
        for aside in old.values():
            aside.unlink(missing_ok=True)
        _flush_folder(folder)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill, which gets its name only when the block ends well; otherwise it is removed.

    Raises:
        CheckpointError: when something stands under the name already, an empty folder apart.
        OSError: naming the path, when the folder cannot be made.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{str(path)!r} exists already; choose another name, or remove it first")
    with _errors_name(path):
        target = Path(os.path.realpath(path))
        _remove_leftovers(target.parent)
        with _made_beside(target, Path.mkdir) as temporary:
            yield temporary
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            _flush_folder(temporary)
            os.replace(temporary, target)
        _flush_folder(target.parent)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep `write_together` of other threads and processes out of a folder for the time of a block.

    Raises:
        CheckpointError: when another is in it and does not come to an end.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(folder, PATIENCE))
        except BlockingIOError as error:
            raise CheckpointError(
                f"another save into {str(folder)!r} has not come to an end for {PATIENCE:.0f} seconds"
            ) from error
        yield


@contextlib.contextmanager
def _written_beside(target: Path, chunks: Chunks, mode: int | None) -> Iterator[Path]:
    """Give a temporary file that is written and flushed, for the block to rename; else it is removed."""
    # Not for a moment may more people read it than what it replaces.
    make = Path.touch if mode is None else _make_private
    with _made_beside(target, make) as temporary:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(mode)
        yield temporary


@contextlib.contextmanager
def _made_beside(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Give a temporary neighbour, locked; what is left of it when the block ends is removed."""
    while True:
        temporary = _beside(target)
        make(temporary)
        with contextlib.ExitStack() as stack:
            stack.callback(_remove, temporary)
            try:
                stack.enter_context(_locked(temporary, PATIENCE))
            except FileNotFoundError:
                continue  # it was taken for a leftover before it was opened
            if temporary.exists():  # else before it was locked
                yield temporary
                return


def _beside(target: Path) -> Path:
    """Return a name on the same disk, so that a rename is all it takes."""
    return target.with_name(f"{PREFIX}{uuid.uuid4().hex}{SUFFIX}")


def _mode(target: Path) -> int | None:
    """Return the mode of the file that will be replaced, or None where there is none.

    Raises:
        IsADirectoryError: when it is a folder.
        OSError: when it is no file of any kind, but a device or the like.
    """
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return stat.S_IMODE(mode)


def _make_private(path: Path) -> None:
    path.touch(mode=0o600)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporaries of processes that were killed: those that nobody holds a lock on."""
    for path in folder.glob(f"{PREFIX}*{SUFFIX}"):
        # An error tells of one that is in use, or not ours to remove.
        with contextlib.suppress(OSError), _locked(path) as locked:
            if locked:
                _remove(path)


@contextlib.contextmanager
def _locked(path: Path, patience: float = 0.0) -> Iterator[bool]:
    """Lock a file or a folder for the time of a block, and tell it whether there are locks here at all.

    Raises:
        BlockingIOError: when another holds the lock for longer than the patience, in seconds.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        locked = _lock(descriptor, patience)
        try:
            yield locked
        finally:
            if locked:  # closing alone would not do where a child process was forked meanwhile
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, patience: float) -> bool:
    """Lock an open file; return False where the file system has no locks."""
    assert fcntl is not None
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.01)
        except OSError:
            return False
        else:
            return True


@contextlib.contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Let errors about the temporary name the path that the caller gave, and say what to do."""
    try:
        yield
    except OSError as error:
        about = None if error.filename is None else os.fsdecode(error.filename)
        if about is not None and PREFIX not in about and about not in (str(path), os.path.realpath(path)):
            raise  # about another file, which is being read
        number, folder = error.errno or errno.EIO, path.absolute().parent
        if folder.exists() and not folder.is_dir():
            text = f"nothing was written: {str(folder)!r} is a file; name a folder to put it in"
        elif number == errno.ENAMETOOLONG:
            text = "nothing was written: the name is too long for the disk; choose a shorter one"
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
            text = (
                f"nothing was written, and what was there still is: {os.strerror(number)}; choose a place "
                "that you may write to"
            )
        elif not folder.is_dir():
            text = f"nothing was written: there is no folder {str(folder)!r}; make it first"
        elif number == errno.EISDIR:
            text = "nothing was written: it is a folder; name a file in it"
        elif number == errno.EINVAL:
            text = "nothing was written: it is a device, a pipe or a socket; name a file"
        else:
            text = f"nothing was written, and what was there still is: {os.strerror(number)}"
        raise OSError(number, text, str(path)) from error


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # the rename itself is on disk only when its folder is
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
