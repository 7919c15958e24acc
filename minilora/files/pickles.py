"""`unpickled`: tensors that `torch.save` wrote. Nothing else opens a pickle, and this when told to alone."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .tensors import Entry, entries_of


def unpickled(path: Path) -> dict[str, Entry]:
    """Return the tensors of a dictionary that `torch.save` wrote, on the CPU.

    torch's restricted unpickler makes tensors and plain containers, and runs nothing else that is named in
    the file. It has had holes: a file from somebody who is not trusted is not made safe by it.

    Raises:
        CheckpointError: when it is no pickle, names something else, or is no dictionary of plain tensors.
        OSError: when there is no such file, or it cannot be read.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{str(path)!r} is no pickle of tensors alone: {reason:.300}") from error
    if not isinstance(values, dict) or not all(
        isinstance(name, str) and type(value) in (Tensor, torch.nn.Parameter)
        for name, value in values.items()
    ):
        raise CheckpointError(f"{str(path)!r} is no dictionary of names and tensors")
    return entries_of({name: value.detach() for name, value in values.items()})
