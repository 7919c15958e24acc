"""The command line: look at adapter files, compare, check, convert, combine and fuse them. No model is built.

commands.py             `main`, and what each command prints
arguments.py            what the command line takes, its help, and the exit codes
terminal.py             what reaches the terminal, and what becomes of it there
inventory.py            whose the tensors of a file are
updates.py              what is trained at one place, as something with a size
describe.py             what a file holds
differences.py          in what two files differ
base_files.py           a base model's files, read tensor by tensor
placement.py            how an adapter lies on them
ties.py                 which of their weights are other weights, too
verify_files.py         whether an adapter belongs to a base
fuse_files.py           a base and an adapter become a checkpoint, shard by shard
"""

from .commands import main

__all__ = ["main"]
