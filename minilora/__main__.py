"""`python -m minilora`: the command line."""

from .cli import main

raise SystemExit(main())
