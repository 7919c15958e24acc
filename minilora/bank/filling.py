"""From a file, or a config, to what goes into a slot: the wrappers that it would have on a model of its own.

They stand outside the model, around its bare modules, and hold the values. The way back is the same: the
wrappers of a slot, filled from the bank, are what `files.saving` writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..config import Config
from ..errors import MiniLoRAError, several
from ..files.loading import Reading, fit
from ..lora import LoRA
from ..lora_linear import LoRALinear
from ..manifest import Manifest, grouped
from ..module import InjectedModule
from ..names import lies_within
from ..plan import build
from ..problems import Problems
from ..sites import Site, Sites
from ..trained import TrainableHead
from .directory import Directory
from .embedding import BankEmbedding, adds_up
from .head import BankLinearHead, BankModuleHead, is_gathered
from .linear import BankLinear
from .site import BankSite, LowRankSite

Key = tuple[str, str]
"""A site's name, and the kind of what stands there, as in `Manifest.placed`."""

Held = dict[Key, InjectedModule]
"""What a slot holds: a wrapper for each site."""


def from_file(bare: Sites, path: Path, how: Reading) -> Held:
    """Return what an adapter file holds, with its values.

    Args:
        bare: the places of the model, as if nothing stood around them.
        path: of the file or folder.
        how: to read it.

    Raises:
        CheckpointError: listing everything that is wrong with the file, or with it on this model.
        OSError: when there is no such file, or it cannot be read.
    """
    fitted = fit(path, bare, {}, how, outcome=f"{str(path)!r} was not loaded and the bank is as it was")
    for name, site in fitted.injected.items():
        for wrapper in site.wrappers:
            below = {key: fitted.tensors[f"{name}.{key}"] for key in wrapper.saved_state()}
            wrapper.load_saved_state(below)
    return held_by(fitted.injected)


def from_configs(
    bare: Sites, placed: Iterable[tuple[Config, str]], heads: Iterable[str], *, without_values: bool = False
) -> Held:
    """Return new wrappers, with the values that `inject` would give them.

    Raises:
        MiniLoRAError: listing every site where there can be none.
    """
    manifest = Manifest(grouped(placed), tuple(heads))
    plan, problems = build(manifest, bare, without_values=without_values)
    if problems:
        raise MiniLoRAError(several(problems.lines(), outcome="nothing was done"))
    return held_by(plan.sites())


def held_by(sites: Mapping[str, Site]) -> Held:
    """Return the wrappers at some sites that train something, by the names that a manifest has for them."""
    return {
        (wrapper.placed_at(name), wrapper.kind): wrapper
        for name, site in sites.items()
        for wrapper in site.wrappers
        if wrapper.trains
    }


def refusals(held: Held, bare: Sites) -> Problems:
    """Return what a bank cannot hold, each with the reason.

    Args:
        held: by an adapter.
        bare: the places of the model.
    """
    problems = Problems()
    routed = expert_lists(bare)
    for (name, _), wrapper in held.items():
        layer = wrapper.base
        if any(lies_within(name, outer) for outer in routed):
            problems.add(
                name, "is one of several experts, which see the tokens that a router picks, not rows"
            )
        elif isinstance(layer, NonDynamicallyQuantizableLinear):
            problems.add(name, "is never called: nn.MultiheadAttention computes with its weight itself")
        elif not isinstance(wrapper, TrainableHead) and not _is_low_rank(wrapper, layer):
            problems.add(
                name,
                f"{wrapper.description()} on {type(layer).__name__}: a bank takes LoRA on linear layers, "
                "Conv1D and embeddings that look up and do no more, without DoRA or a bias of B, and modules "
                "trained in full",
            )
    return problems


def _is_low_rank(wrapper: InjectedModule, layer: nn.Module) -> bool:
    """Return whether what a wrapper adds to a layer's output is a product with A and B, and no more."""
    if not isinstance(wrapper, LoRA) or set(wrapper.saved_state()) != {"lora_A", "lora_B"}:
        return False
    return isinstance(wrapper, LoRALinear) or adds_up(layer)


def expert_lists(bare: Sites) -> list[str]:
    """Return the names of the lists of experts in a model, one module for each expert."""
    return [
        name
        for name, site in bare.items()
        if isinstance(site.bare, nn.ModuleList) and name.rpartition(".")[2] == "experts"
    ]


def make_site(
    base: nn.Module, wrapper: InjectedModule, directory: Directory, device: torch.device, dtype: torch.dtype
) -> BankSite:
    """Return a bank's wrapper for what a wrapper holds.

    Args:
        base: what it shall stand around.
        wrapper: of any of the adapters, at this site.
        directory: of the bank.
        device: of A and B.
        dtype: of A and B.
    """
    if isinstance(wrapper, LoRA):
        kind = BankLinear if isinstance(wrapper, LoRALinear) else BankEmbedding
        return kind(base, directory, wrapper.layout, device=device, dtype=dtype)
    return BankLinearHead(base, directory) if is_gathered(base) else BankModuleHead(base, directory)


def largest_rank(held: Held) -> int:
    """Return the largest rank in an adapter; 0 where it has no LoRA."""
    return max((w.config.r for w in held.values() if isinstance(w, LoRA)), default=0)


def misfits(held: Held, places: Mapping[Key, BankSite], directory: Directory) -> Problems:
    """Return where a bank has no room for an adapter.

    Args:
        held: by the adapter.
        places: of the bank.
        directory: of the bank.
    """
    r, rounds = directory.r, directory.dtype is not None
    problems = Problems()
    for key, wrapper in held.items():
        if key not in places:
            problems.add(
                key[0],
                "the bank has no place there, since none of its first adapters had: make the bank with this "
                "one, or with targets=[...] and trainable=[...]",
            )
            continue
        place = places[key]
        if not isinstance(wrapper, LoRA) or not isinstance(place, LowRankSite):
            continue
        if wrapper.config.r > r:
            problems.add(
                key[0],
                f"has rank {wrapper.config.r}, and there is room for {r}: Bank(..., r={wrapper.config.r})",
            )
        own, there = wrapper.lora_A.dtype, place.dtype
        if not rounds and torch.promote_types(own, there) != there:
            problems.add(
                key[0], f"is {own}, which the bank's {there} cannot hold without loss: Bank(..., dtype=...)"
            )
    return problems


def held_in(bare: Sites, places: Mapping[Key, BankSite], slot: int) -> Mapping[str, Site]:
    """Return the wrappers that an adapter of a bank would have on a model of its own, with its values."""
    own = {key: place for key, place in places.items() if slot in place.configs}
    placed = [(c, key[0]) for key, place in own.items() if (c := place.configs[slot]) is not None]
    heads = [key[0] for key, place in own.items() if place.configs[slot] is None]
    plan, problems = build(Manifest(grouped(placed), tuple(heads)), bare, without_values=True)
    assert not problems, problems.lines()  # they could stand there when the adapter came
    sites = plan.sites()
    for key, wrapper in held_by(sites).items():
        wrapper.load_saved_state({k: v.detach() for k, v in own[key].state(slot).items()})
    return sites


def fill(directory: Directory, places: Mapping[Key, BankSite], name: str, slot: int, held: Held) -> None:
    """Put an adapter into a slot, whole or not at all."""
    undo = [place.remember(slot) for place in places.values()]
    drops = False
    try:
        for key, place in places.items():
            wrapper = held.get(key)
            if isinstance(wrapper, LoRA):
                # The dtype is the bank's business from now on.
                wrapper.config = dataclasses.replace(wrapper.config, dtype=None)
                drops = drops or wrapper.config.dropout > 0
            place.put(slot, wrapper)
        directory.enter(name, slot, drops=drops)
    except BaseException:
        for restore in undo:
            restore()
        raise
