"""One process writes what all have gathered; the others wait, and raise what it raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..torch_internals import is_shard


def by_one(model: nn.Module, act: Callable[[], None]) -> None:
    """Run an act in one of the processes that share a sharded model; in each, where the model is whole.

    It is the first of the widest mesh that parameters are spread over. The others come back when it is done.

    Args:
        model: every process of that mesh calls with its share.
        act: what is done once, writing a file.

    Raises:
        BaseException: what the act raised, in every process.
    """
    parameters: list[Any] = list(filter(is_shard, model.parameters()))
    if not parameters:
        act()
        return
    mesh = max((parameter.device_mesh for parameter in parameters), key=lambda mesh: mesh.size())
    raised: BaseException | None = None
    if not any(mesh.get_coordinate()):
        try:
            act()
        except BaseException as error:  # Ctrl-C, too: nobody shall wait for ever
            raised = error
    for group in mesh.get_all_groups():  # one for each dimension: after the last, all have heard of all
        heard: list[BaseException | None] = [None] * group.size()
        torch.distributed.all_gather_object(heard, raised, group=group)
        raised = raised or next(filter(None, heard), None)
    if raised is not None:
        raise raised
