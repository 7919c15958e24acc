"""What reaches the terminal: results on stdout, messages on stderr, in characters that it can show."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any, TextIO


def show(line: str) -> None:
    """Print a line of a result.

    Raises:
        BrokenPipeError: when nobody reads it any more, as behind `| head -1`.
    """
    if sys.stdout is not None:
        print(printable(line, sys.stdout.encoding))


def show_json(value: object) -> None:
    """Print a result for programs; a number that is not finite, which JSON does not have, as null."""
    show(json.dumps(_finite(value), indent=2, allow_nan=False))


def say(message: str) -> None:
    """Print a message to stderr. Where nobody reads it, the work goes on all the same."""
    if sys.stderr is not None:
        try:
            print(printable(f"minilora: {message}", sys.stderr.encoding), file=sys.stderr, flush=True)
        except OSError:
            _to_nowhere(sys.stderr)


def flush() -> None:
    """Send what was printed on its way, so that what fails there fails here and not when Python ends.

    Raises:
        BrokenPipeError: when nobody reads it any more.
        OSError: when it cannot be written, as on a full disk.
    """
    if sys.stdout is not None:
        sys.stdout.flush()


def settle() -> None:
    """Send what was printed on its way, or let go of what cannot go, without a word."""
    try:
        flush()
    except OSError:
        _to_nowhere(sys.stdout)


def printable(text: str, encoding: str | None) -> str:
    r"""Return text with escapes for the characters that an encoding does not have.

    Half a character, which is what Python makes of a file name that is no UTF-8, is in none of them.

    >>> printable("naïve", "ascii"), printable("caf\udce9", "utf-8")
    ('na\\xefve', 'caf\\udce9')
    """
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def plain(name: str) -> str:
    r"""Return a name from a file with escapes for what would end the line or move the cursor.

    >>> plain("layer.0\n\x1b[2J")
    'layer.0\\n\\x1b[2J'
    """
    return name if name.isprintable() else repr(name)[1:-1]


def _finite(value: object) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _to_nowhere(stream: TextIO) -> None:
    """Let a stream, and what it still holds, end in the null device: Python would report it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
