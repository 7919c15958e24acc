"""The command line: look at adapter files, compare, check, convert and fuse them. No model is built.

commands.py             `main`, and what each command prints
describe.py             what a file holds, and in what two differ
base_files.py           a base model's files, read tensor by tensor
fuse_files.py           a base and an adapter become a checkpoint, shard by shard
"""

from .commands import main

__all__ = ["main"]
