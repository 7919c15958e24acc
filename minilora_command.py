"""The console script `minilora`: a door that opens before minilora, and torch with it, is imported.

Importing torch takes seconds, in which people press Ctrl-C, too. This file stands outside the package because
importing anything in the package imports torch first.
"""

import sys

INTERRUPTED = 130


def main() -> int:
    """Run the command line and return its exit code."""
    try:
        from minilora.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("minilora: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
