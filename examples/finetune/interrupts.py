"""Ctrl-C at the two moments when a KeyboardInterrupt would do harm.

While Python is importing, it may be swallowed by the library in whose import it is raised, or come out as a
different error; while results are being written, it would cut them off. This file is imported before
anything slow, so it needs nothing but Python.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 130
"""What shells expect of a program that Ctrl-C has ended."""


def exit_at_once() -> None:
    """Lets Ctrl-C end the process on the spot, without a traceback. Inverse: `raise_again`."""
    signal.signal(signal.SIGINT, _exit)


def raise_again() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt, as Python usually does. Inverse: `exit_at_once`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def ignored() -> Iterator[None]:
    """Lets nothing happen on Ctrl-C within the block: launchers pass on the one that a terminal has sent."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _exit(signal_number: int, frame: FrameType | None) -> None:
    sys.stderr.write("\nInterrupted.\n")
    sys.stderr.flush()
    os._exit(EXIT_CODE)
