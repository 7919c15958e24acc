"""torch's profiler, without what its C++ part writes to the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from torch.profiler import profile


@contextlib.contextmanager
def quiet_profile(**options: Any) -> Iterator[profile]:
    """Profile what runs inside, like `torch.profiler.profile`, whose options it takes."""
    with _silent_stderr(), profile(**options) as trace:
        yield trace


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Send the file descriptor nowhere: the notices of start and stop do not come through Python."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
