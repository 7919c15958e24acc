"""Files and folders appear whole or not at all, and what was there keeps its mode, its link and its peace."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minilora import CheckpointError
from minilora.files import atomic
from minilora.files.atomic import new_folder, write_together, write_whole

posix = pytest.mark.skipif(os.name != "posix", reason="modes, links and locks of POSIX")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

OLD = {"tensors": b"old tensors", "config": b"old config"}
NEW = {"tensors": [b"new ", b"tensors"], "config": [b"new config"]}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fork() -> int:
    with warnings.catch_warnings():  # of other threads, which the child does without
        warnings.simplefilter("ignore")
        return os.fork()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with files that belong together, and one that does not."""
    path = tmp_path / "folder"
    path.mkdir()
    for name, content in {**OLD, "other": b"other"}.items():
        (path / name).write_bytes(content)
    return path


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_the_mode_of_what_is_replaced_is_kept(mode: int, tmp_path: Path) -> None:
    path, seen = tmp_path / "file", []
    path.write_bytes(b"old")
    path.chmod(mode)

    def chunks() -> Iterator[bytes]:
        yield b"new"
        (temporary,) = (entry for entry in tmp_path.iterdir() if entry != path)
        seen.append(stat.S_IMODE(temporary.stat().st_mode))

    write_whole(path, chunks())
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert not seen[0] & 0o077 & ~mode  # and nobody else could read it meanwhile


@posix
def test_a_new_file_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", [b"new"])
        with new_folder(tmp_path / "folder") as folder:
            (folder / "a").touch()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


@posix
def test_an_empty_folder_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(mode=0o700)
    with new_folder(tmp_path / "folder") as folder:
        (folder / "a").touch()
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o700


@posix
def test_a_symbolic_link_is_followed(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("there", "absent"):
        (tmp_path / name).symlink_to(Path("elsewhere") / name)
    (tmp_path / "elsewhere" / "there").write_bytes(b"old")
    for name in ("there", "absent"):
        write_whole(tmp_path / name, [b"new"])
        assert (tmp_path / name).is_symlink()
    assert contents(tmp_path / "elsewhere") == {"there": b"new", "absent": b"new"}
    (tmp_path / "elsewhere" / "config").write_bytes(b"old")
    (folder / "config").unlink()
    (folder / "config").symlink_to(tmp_path / "elsewhere" / "config")
    write_together(folder, NEW)
    assert (folder / "config").is_symlink()
    assert (tmp_path / "elsewhere" / "config").read_bytes() == b"new config"
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_names_of_255_bytes(tmp_path: Path) -> None:
    file, folder = "ä" * 127 + "a", "b" * 255
    write_whole(tmp_path / file, [b"new"])
    with new_folder(tmp_path / folder) as new:
        write_whole(new / file, [b"new"])
    write_together(tmp_path / folder, {file: [b"newer"]})
    assert (tmp_path / folder / file).read_bytes() == b"newer"
    assert (tmp_path / file).read_bytes() == b"new"


def fails_at(number: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> list[Any]:
    """Let the rename of that number fail; return the list of those that were asked for."""
    real, calls = os.replace, []

    def replace(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == number:
            raise error
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    return calls


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_after_an_error_the_old_files_are_back(
    number: int, error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fails_at(number, patch, error)
        with pytest.raises(type(error)):
            write_together(folder, NEW)
    assert contents(folder) == {**OLD, "other": b"other"}
    for name in OLD:
        (folder / name).unlink()
    if number <= 2:  # where there are no old ones, two renames are all
        with monkeypatch.context() as patch:
            fails_at(number, patch, error)
            with pytest.raises(type(error)):
                write_together(folder, NEW)
        assert contents(folder) == {"other": b"other"}
    write_together(folder, NEW)
    assert contents(folder) == {"tensors": b"new tensors", "config": b"new config", "other": b"other"}


def test_an_error_while_the_data_is_made_leaves_all_as_it_was(folder: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise ZeroDivisionError

    for act in (
        lambda: write_together(folder, {"tensors": [b"new"], "config": chunks()}),
        lambda: write_whole(folder / "config", chunks()),
    ):
        with pytest.raises(ZeroDivisionError):
            act()
        assert contents(folder) == {**OLD, "other": b"other"}
    with pytest.raises(ZeroDivisionError), new_folder(folder / "new") as new:
        write_whole(new / "config", chunks())
    assert contents(folder) == {**OLD, "other": b"other"}


@forks
@pytest.mark.parametrize("number", range(1, 6))
def test_killed_at_any_point_the_old_or_the_new_or_no_config_is_there(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = fork()
    if child == 0:  # the process that is killed before its rename of that number, or after the last
        with contextlib.suppress(BaseException):
            real, calls = os.replace, []

            def replace(source: Any, target: Any) -> None:
                calls.append(target)
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(source, target)

            os.replace = replace
            write_together(folder, NEW)
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    found = contents(folder)
    whole = {"tensors": b"new tensors", "config": b"new config", "other": b"other"}
    assert found["other"] == b"other"
    if "config" in found:
        assert any({name: found[name] for name in each} == each for each in ({**OLD}, whole))
    write_together(folder, NEW)
    if atomic.fcntl is not None:
        assert contents(folder) == whole  # and what the killed one left is gone


@posix
def test_what_a_killed_save_left_is_removed_and_what_a_running_one_writes_is_not(tmp_path: Path) -> None:
    if atomic.fcntl is None:
        pytest.skip("needs locks")
    left = [tmp_path / f".minilora-{name}.tmp" for name in ("file", "folder")]
    left[0].write_bytes(b"half")
    left[1].mkdir()
    (left[1] / "half").write_bytes(b"half")
    other = tmp_path / ".somebody-else.tmp"
    other.touch()

    def chunks() -> Iterator[bytes]:
        yield b"slow"
        with new_folder(tmp_path / "folder") as folder:
            assert [path for path in left if path.exists()] == []
            write_whole(tmp_path / "quick", [b"quick"])
            write_whole(folder / "inner", [b"quick"])

    write_whole(tmp_path / "slow", chunks())
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "folder", "quick", "slow"]


@posix
def test_a_temporary_taken_for_a_leftover_at_its_birth_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its creation and its lock, another save may come by."""
    if atomic.fcntl is None:
        pytest.skip("needs locks")
    real, times = atomic._lock, []

    def lock(descriptor: int, patience: float) -> bool:
        if not times:
            (temporary,) = tmp_path.glob(".minilora-*.tmp")
            temporary.unlink()
        times.append(1)
        return real(descriptor, patience)

    def chunks() -> Iterator[bytes]:
        yield b"new"
        write_whole(tmp_path / "another", [b"new"])  # which removes what has no lock

    monkeypatch.setattr(atomic, "_lock", lock)
    write_whole(tmp_path / "file", chunks())
    assert contents(tmp_path) == {"file": b"new", "another": b"new"}


def test_a_temporary_taken_for_a_leftover_before_it_is_opened_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = Path.touch, []

    def touch(path: Path, *args: Any, **kwargs: Any) -> None:
        real(path, *args, **kwargs)
        made.append(path)
        if len(made) == 1:
            path.unlink()

    monkeypatch.setattr(Path, "touch", touch)
    write_whole(tmp_path / "file", [b"new"])
    assert contents(tmp_path) == {"file": b"new"}
    assert len(made) == (1 if atomic.fcntl is None else 2)


def test_whoever_has_no_patience_does_not_sleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the clock stands still between two looks at it."""
    if atomic.fcntl is None:
        pytest.skip("needs locks")
    monkeypatch.setattr(atomic.time, "monotonic", lambda: 1.0)
    with atomic.one_at_a_time(tmp_path), pytest.raises(BlockingIOError), atomic._locked(tmp_path):
        pass


def told_of_waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Return what is set when the thread "second" waits for a lock."""
    pause, waits = time.sleep, threading.Event()

    def sleep(seconds: float) -> None:
        if threading.current_thread().name == "second":
            waits.set()
        pause(seconds)

    monkeypatch.setattr(atomic.time, "sleep", sleep)
    return waits


def save_amid_a_save(folder: Path, monkeypatch: pytest.MonkeyPatch, begins: Callable[[Path], bool]) -> None:
    """Save twice, the second time from within the first: before the first rename for which `begins` holds."""
    real, waits, threads = os.replace, told_of_waiting(monkeypatch), []

    def replace(source: Any, target: Any) -> None:
        if threading.current_thread().name == "first" and not threads and begins(Path(source)):
            threads.append(threading.Thread(target=write_together, args=(folder, OLD_AGAIN), name="second"))
            threads[0].start()
            assert waits.wait(60)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    first = threading.Thread(target=write_together, args=(folder, NEW), name="first")
    first.start()
    first.join()
    threads[0].join()


@posix
def test_a_save_that_begins_amid_another_keeps_the_modes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At that time the old files are away, and the new ones not yet there."""
    if atomic.fcntl is None:
        pytest.skip("needs locks")
    for name in OLD:
        (folder / name).chmod(0o600)

    def a_new_file_gets_its_name(source: Path) -> bool:
        if not source.name.startswith("."):
            return False
        assert not any((folder / name).exists() for name in OLD)
        return True

    save_amid_a_save(folder, monkeypatch, a_new_file_gets_its_name)
    assert contents(folder) == {"tensors": b"third tensors", "config": b"third config", "other": b"other"}
    assert [stat.S_IMODE((folder / name).stat().st_mode) for name in OLD] == [0o600, 0o600]


@posix
def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a device, a pipe or a socket; name a file"):
        write_whole(tmp_path / "pipe", [b"new"])
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@posix
def test_a_save_waits_for_the_one_that_has_just_made_the_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which gives up the folder first, and each of the files a moment later."""
    if atomic.fcntl is None:
        pytest.skip("needs locks")
    waits = told_of_waiting(monkeypatch)
    second = threading.Thread(target=write_together, args=(folder, NEW), name="second")
    with atomic._locked(folder / "tensors"):
        second.start()
        assert waits.wait(60)
    second.join()
    assert contents(folder) == {"tensors": b"new tensors", "config": b"new config", "other": b"other"}


@posix
def test_two_saves_into_one_folder_come_one_after_the_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if atomic.fcntl is None:
        pytest.skip("needs locks")
    save_amid_a_save(folder, monkeypatch, lambda source: True)
    assert contents(folder) == {"tensors": b"third tensors", "config": b"third config", "other": b"other"}


OLD_AGAIN = {"tensors": [b"third tensors"], "config": [b"third config"]}


@posix
def test_a_save_that_never_ends_does_not_stop_others_for_ever(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if atomic.fcntl is None:
        pytest.skip("needs locks")
    monkeypatch.setattr(atomic, "PATIENCE", 0.0)
    with (
        atomic.one_at_a_time(folder),
        pytest.raises(CheckpointError, match=r"another save into '.*folder' has not"),
    ):
        write_together(folder, NEW)
    assert contents(folder) == {**OLD, "other": b"other"}


@forks
def test_a_process_forked_during_a_save_holds_no_lock(folder: Path) -> None:
    """As a DataLoader's workers may be, and they live long."""
    children = []

    def chunks() -> Iterator[bytes]:
        yield b"new"
        children.append(fork())
        if children[-1] == 0:
            signal.pause()

    try:
        write_together(folder, {"tensors": chunks(), "config": chunks()})
        write_together(folder, NEW)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert contents(folder) == {"tensors": b"new tensors", "config": b"new config", "other": b"other"}


def test_without_locks_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "fcntl", None)
    (folder / ".minilora-x.tmp").touch()  # nobody can tell whose it is
    write_together(folder, NEW)
    write_whole(folder / "third", [b"new"])
    with new_folder(folder / "inner") as inner:
        write_whole(inner / "a", [b"new"])
    assert sorted(path.name for path in folder.iterdir()) == [
        ".minilora-x.tmp", "config", "inner", "other", "tensors", "third",
    ]  # fmt: skip
    assert (folder / "config").read_bytes() == b"new config"


def test_errors_name_the_path_that_was_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "config"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            OSError, match=r"\[Errno 28\] nothing was written, and what .* device: '.*config'$"
        ):
            write_whole(path, [b"new"])
        with pytest.raises(OSError, match=r"No space left on device: '.*folder'$"):
            write_together(folder, NEW)
        with (
            pytest.raises(OSError, match=r"No space left on device: '.*new'$"),
            new_folder(folder / "new") as new,
        ):
            write_whole(new / "a", [b"new"])
    assert contents(folder) == {**OLD, "other": b"other"}
    with pytest.raises(IsADirectoryError, match=r"it is a folder; name a file in it: '.*folder'$"):
        write_whole(folder, [b"new"])
    with pytest.raises(FileNotFoundError, match=r"no folder '.*absent'; make it first: '.*absent/a'$"):
        write_whole(folder / "absent" / "a", [b"new"])
    with (
        pytest.raises(FileNotFoundError, match=r"no folder '.*absent'; make it first: '.*absent/a'$"),
        new_folder(folder / "absent" / "a"),
    ):
        pass
    with pytest.raises(CheckpointError, match="exists already"), new_folder(path):
        pass

    for place, says in (
        (path / "a", "config' is a file; name a folder to put it in: '.*a'$"),
        (folder / ("a" * 256), "the name is too long for the disk; choose a shorter one: '.*aa'$"),
    ):
        with pytest.raises(OSError, match=f"nothing was written: .*{says}"):
            write_whole(place, [b"new"])

    with pytest.raises(OSError, match="is a file; name a folder"), new_folder(path / "a"):
        pass

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", forbidden)
        with pytest.raises(PermissionError, match=r"denied; choose a place that you may write to: '.*new'$"):
            write_whole(folder / "new", [b"new"])

    def reads_another() -> Iterator[bytes]:
        yield (folder / "absent").read_bytes()

    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*absent'"):
        write_whole(path, reads_another())
