"""A sharded model, read as if it were whole.

    model: FSDPBert                     stand_in(model): Bert             the same modules, once more
      ...query: LoRALinear                ...query: LoRALinear
          .lora_A   DTensor                   .lora_A   Parameter         what was added: gathered at once
          .base     its weight a DTensor      .base     its weight ...    gathered while `one_by_one` is at it

So `save` and its like are written for whole models alone. Gathering is a collective: every process makes the
same calls, in the same order. The model itself is only read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..sites import Site, injected_sites
from ..torch_internals import (
    children,
    is_shard,
    names_where,
    own_parameters,
    put_child,
    put_parameter,
    put_shards_back,
    shadow,
)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor itself, or, of a DTensor, all its values as a plain tensor of this process's own."""
    if not is_shard(tensor):
        return tensor
    shard: Any = tensor.detach()
    home = shard.device_mesh.device_type
    if shard.device.type != home:  # FSDP keeps it on the CPU, from where the processes' group sends nothing
        shard = shard.to(home)
    gathered: Tensor = shard.full_tensor()
    return gathered


def stand_in(model: nn.Module) -> nn.Module:
    """Return a model to read in the place of one, in which all that injections brought is whole.

    Args:
        model: a model with injections, whose values processes may share among them.

    Returns:
        The model itself where it is whole already.
    """
    put_shards_back(model)
    if not names_where(model, is_shard):
        return model
    twins: dict[nn.Module, nn.Module] = {}
    twin = _twin(model, twins)
    for each in twins.values():  # what knows another module without owning it, as rows of a tied weight do
        known = {key: twins[v] for key, v in vars(each).items() if isinstance(v, nn.Module) and v in twins}
        vars(each).update(known)
    for site in injected_sites(twin).values():
        for wrapper in site.wrappers:
            _make_whole([wrapper])
            _make_whole(m for name, child in children(wrapper) if name != "base" for m in child.modules())
    return twin


def _twin(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """Return a shadow of a module, with shadows of all that is inside it."""
    if module not in twins:
        twins[module] = twin = shadow(module)
        for name, child in list(children(twin)):
            put_child(twin, name, _twin(child, twins))
    return twins[module]


def one_by_one(injected: Iterable[tuple[str, Site]]) -> Iterator[tuple[str, Site]]:
    """Yield the sites of a stand-in, each with the base's values in it whole for as long as its turn is."""
    for name, site in injected:
        with at_hand(site):
            yield name, site


@contextlib.contextmanager
def at_hand(site: Site) -> Iterator[None]:
    """Keep the base's values at a site of a stand-in whole for the time of a block.

    Of a module that is trained in full, all that is inside it; else the module's own.
    """
    shards = _make_whole(site.bare.modules() if site.trained_in_full else [site.bare])
    try:
        yield
    finally:
        for module, name, shard in shards:
            put_parameter(module, name, shard)


def _make_whole(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Put whole parameters in the place of shards, and return what stood where."""
    shards = [
        (module, name, parameter)
        for module in modules
        for name, parameter in own_parameters(module).items()
        if parameter is not None and is_shard(parameter)
    ]
    for module, name, shard in shards:
        put_parameter(module, name, nn.Parameter(whole(shard), requires_grad=shard.requires_grad))
    return shards
