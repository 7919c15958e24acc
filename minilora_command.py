"""The console script `minilora`: a door that opens before minilora, and torch with it, is imported.

Importing torch takes seconds, in which people press Ctrl-C, too. This file stands outside the package because
importing anything in the package imports torch first.
"""

import os
import signal
import sys

INTERRUPTED = 130


def main() -> int:
    """Run the command line and return its exit code."""
    # Elsewhere, as under nohup, Ctrl-C is ignored or means something else.
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:
        signal.signal(signal.SIGINT, _leave)
    from minilora.cli import main as run

    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


def _leave(*_: object) -> None:
    """End at once. A KeyboardInterrupt would be caught by some module that tries what it can import."""
    os.write(2, b"minilora: interrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
