"""`path_for`: the path that a caller means, or what was given in its place."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from ..errors import MiniLoRAError


def path_for(path: object, model: object, *, call: str) -> Path:
    """Return the path of an adapter.

    Args:
        path: what was given as the path.
        model: what was given as the model.
        call: the right call, for messages.

    Raises:
        MiniLoRAError: when it is none, with the call in which it would be; also for swapped arguments.
    """
    if isinstance(path, nn.Module) and isinstance(model, (str, bytes, os.PathLike)):
        raise MiniLoRAError(f"the model comes first and the path second: minilora.{call}")
    if isinstance(path, (str, bytes, os.PathLike)) and os.fspath(path):
        return Path(os.fsdecode(path))
    raise MiniLoRAError(
        f"path must be a string or a pathlib.Path, not {path!r:.100} of type {type(path).__name__}: "
        f"minilora.{call}"
    )
