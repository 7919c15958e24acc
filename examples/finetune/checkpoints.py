"""The state of an unfinished run, from which `--resume` continues.

One file, replaced whole at the end of every epoch: whenever a run ends, the file is that of one epoch. It
therefore carries the bytes of the adapter's file too, beside which later steps may have been saved.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from finetune.errors import ExampleError


class Stateful(Protocol):
    """What an optimizer, a schedule and a gradient scaler have in common."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


def write_state(
    path: Path,
    history: dict[str, Any],
    *,
    adapter: Path,
    parts: dict[str, Stateful],
    order: torch.Generator,
    accelerator: Accelerator,
) -> None:
    """Writes all that decides how a run goes on; every process calls it, the main one writes.

    Args:
        path: The file. What stood there is replaced whole or not at all.
        history: Records of the epochs so far: numbers, texts, lists and dicts.
        adapter: The file that `minilora.save` has written after this epoch.
        parts: The optimizer and so on, by name.
        order: Draws the order of the batches.
        accelerator: Knows the processes, each of which draws its own dropout.
    """
    random = gather_object([_random_state(accelerator.device)])
    if not accelerator.is_main_process:
        return
    state = {
        **history,
        "adapter": torch.frombuffer(bytearray(adapter.read_bytes()), dtype=torch.uint8),
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "order": order.get_state(),
        "random": random,
    }
    new = path.with_name(f"{path.name}.new")
    torch.save(state, new)
    os.replace(new, path)


def read_state(path: Path) -> dict[str, Any]:
    """Reads what `write_state` has written: the history's entries, and those that `restore` takes.

    Raises:
        ExampleError: The file cannot be read.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ExampleError(
            f"{path} cannot be read, so the run cannot be resumed; start it again with --overwrite"
        ) from error
    return state


def restore(
    state: dict[str, Any], *, parts: dict[str, Stateful], order: torch.Generator, accelerator: Accelerator
) -> None:
    """Puts a state back, all but the adapter and the history. Inverse: `write_state`.

    Comes last before the training: whatever draws random numbers in between changes the result.
    """
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    order.set_state(state["order"])
    random = state["random"][accelerator.process_index]
    torch.set_rng_state(random["cpu"])
    if "device" in random:
        torch.get_device_module(accelerator.device).set_rng_state(random["device"])


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state
