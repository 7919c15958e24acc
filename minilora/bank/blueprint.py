"""`Blueprint`: a bank that has been read, checked and built beside a model, and is not in it yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..config import LoRAConfig, is_float_dtype, plain_dtype
from ..errors import MiniLoRAError, quoted, several
from ..files.loading import Reading
from ..files.paths import path_for
from ..lora import LoRA
from ..manifest import Manifest
from ..module import InjectedModule, device_of, dtype_for
from ..names import described
from ..plan import Plan, build
from ..sites import Sites
from ..targets import Targets, choices, select
from .directory import Directory
from .filling import Held, Key, from_configs, from_file, largest_rank, make_site, refusals
from .site import BankSite, LowRankSite


@dataclass(frozen=True)
class Blueprint:
    """What a bank is made of."""

    directory: Directory
    """Without names yet."""
    places: dict[Key, BankSite]
    """The wrappers, without values yet."""
    held: dict[str, Held]
    """What each adapter brings."""
    plan: Plan
    """What puts the wrappers into the model."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        adapters: Mapping[str, Any],
        *,
        targets: Targets,
        trainable: Targets,
        slots: int | None,
        r: int | None,
        dtype: torch.dtype | str | None,
        how: Reading,
    ) -> Blueprint:
        """Return the blueprint of a bank; `how` its files are read, the rest as `Bank` has it.

        Raises:
            MiniLoRAError: listing everything that is wrong.
            OSError: when there is no such file, or it cannot be read.
        """
        sites, to = Sites(model), plain_dtype(dtype)
        problems = _argument_problems(sites, adapters, slots, r, to)
        if problems:  # the rest would make no sense
            raise MiniLoRAError(several(problems, outcome="the model has not been changed"))
        bare = sites.bare()
        held: dict[str, Held] = {}
        for name, path in adapters.items():
            try:
                file = path_for(path, model, call="Bank(model, {name: path, ...})")
                held[name] = from_file(bare, file, how)
            except MiniLoRAError as error:
                problems.append(f"{name!r}: {_indented(error)}")
        later = _later(bare, targets, trainable, r, problems)
        room = max([1, *map(largest_rank, (*held.values(), later))]) if r is None else r
        for name, each in held.items():
            problems += [f"{name!r}: {line}" for line in refusals(each, bare).lines()]
            if largest_rank(each) > room:
                problems.append(f"{name!r} has rank {largest_rank(each)}, and there is room for r={room}")
        problems += [f"targets: {line}" for line in refusals(later, bare).lines()]
        union = {key: wrapper for each in (later, *held.values()) for key, wrapper in each.items()}
        problems += _overlaps(bare, union)
        if not union and not problems:
            problems.append("the bank would have no site: give adapters, targets or trainable")
        if problems:
            raise MiniLoRAError(several(problems, outcome="the model has not been changed"))
        directory = Directory(len(adapters) if slots is None else slots, room, to)
        plan, _ = build(Manifest((), ()), sites)  # what keeps the base's statistics
        places: dict[Key, BankSite] = {}
        for key, wrapper in union.items():
            site = sites[key[0]]
            make = partial(
                make_site,
                wrapper=wrapper,
                directory=directory,
                device=device_of(site.bare, device_of(model)),
                dtype=to or _widest(site.bare, [each[key] for each in held.values() if key in each]),
            )
            plan.add(site, make, LowRankSite.position if isinstance(wrapper, LoRA) else BankSite.position)
            place = plan.wrappers[site.owner][0]
            assert isinstance(place, BankSite)
            places[key] = place
        return cls(directory, places, held, plan)


def _argument_problems(sites: Sites, adapters: object, slots: object, r: object, dtype: object) -> list[str]:
    if not isinstance(adapters, Mapping):
        return [f'adapters must be a mapping, {{"name": path, ...}}, not {adapters!r:.100}']
    problems = [
        f"an adapter's name must be a string that is not empty, not {name!r:.100}"
        for name in adapters
        if not isinstance(name, str) or not name
    ]
    taken = [
        name
        for name, site in sites.injected().items()
        if any(wrapper.trains or isinstance(wrapper, BankSite) for wrapper in site.wrappers)
    ]
    if taken:
        problems.append(f"{described(taken)}: injected already; call minilora.eject(model) first")
    for what, value in (("slots", slots), ("r", r)):
        if value is not None and (type(value) is not int or value < 1):
            problems.append(f"{what} must be an int from 1 on, or None, not {value!r:.100}")
    if type(slots) is int and slots < len(adapters):
        problems.append(f"slots={slots}, and {len(adapters)} adapters are given: {quoted(list(adapters))}")
    if not adapters and slots is None:
        problems.append("neither adapters nor slots are given: Bank(model, targets=[...], slots=4, r=8)")
    if dtype is not None and not is_float_dtype(dtype):
        problems.append(f"dtype must be a floating-point dtype, its name, or None, not {dtype!r:.100}")
    return problems


def _later(bare: Sites, targets: Targets, trainable: Targets, r: int | None, problems: list[str]) -> Held:
    """Return wrappers without values at the sites that are for adapters which come later."""
    heads, more = select(bare, trainable, argument="trainable")
    problems += more
    found, more = select(bare, targets, argument="targets", left_alone=heads)
    problems += [f"{line}\n{choices(bare)}" for line in more]
    if not found and not heads:
        return {}
    config = LoRAConfig(r=1 if r is None else r)
    if found and r is None:
        problems.append("targets: give the largest rank that there shall be room for, Bank(..., r=8)")
    try:
        return from_configs(bare, [(config, name) for name in found], heads, without_values=True)
    except MiniLoRAError as error:
        problems.append(f"targets: {_indented(error)}")
        return {}


def _overlaps(bare: Sites, union: Held) -> list[str]:
    """Return where one adapter trains in full what is, or holds, a site of another."""
    placed = [(LoRAConfig(r=1), name) for (name, _), wrapper in union.items() if isinstance(wrapper, LoRA)]
    heads = [name for (name, _), wrapper in union.items() if not isinstance(wrapper, LoRA)]
    try:
        from_configs(bare, placed, heads, without_values=True)
    except MiniLoRAError as error:
        return [_indented(error)]
    return []


def _widest(layer: nn.Module, wrappers: list[InjectedModule]) -> torch.dtype:
    """Return the dtype that holds A and B of all adapters at a layer, or that which new ones would have."""
    dtypes = [wrapper.lora_A.dtype for wrapper in wrappers if isinstance(wrapper, LoRA)]
    widest = dtypes[0] if dtypes else dtype_for(layer, None)
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def _indented(error: MiniLoRAError) -> str:
    return str(error).replace("\n", "\n    ")
