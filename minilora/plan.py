"""`Manifest`: which configs stand at which sites. `build`: wrappers for all of it, or every problem at once.

`inject` makes a manifest from what the user names, `load` reads one from a file; from there on they are one
act: build everything beside the model, then `Plan.put_in_place` swaps it in.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from .adapter import Adapter
from .config import AdapterConfig, Config, LoRAConfig
from .errors import TargetError, quoted
from .frozen import FrozenStatistics, keeps_statistics
from .linear import is_managed, linear_shape
from .lora import LoRALinear
from .module import InjectedModule, bare_module, device_of
from .names import above, described, nearest
from .sites import Site, Sites, replace_modules
from .torch_internals import own_parameters
from .trained import TrainableHead

CONFIGS: dict[str, type[Config]] = {config.kind: config for config in (LoRAConfig, AdapterConfig)}
"""The config of each kind that has one, by the kind's name."""

WRAPPERS: dict[str, Any] = {LoRALinear.kind: LoRALinear, Adapter.kind: Adapter}
"""What a config of each kind asks for."""


@dataclass(frozen=True)
class Manifest:
    """Which configs stand at which sites, and which modules are trained in full."""

    injections: tuple[tuple[Config, tuple[str, ...]], ...]
    trainable: tuple[str, ...]

    @classmethod
    def of(cls, injected: Mapping[str, Site]) -> Manifest:
        """Return the manifest of a model's wrappers, as `sites.injected_sites` gives them."""
        placed: list[tuple[Config, str]] = []
        trainable = []
        for name, site in injected.items():
            for wrapper in reversed(site.wrappers):  # LoRA first, then the adapter around it
                if wrapper.config is not None:
                    placed.append((wrapper.config, name))
                elif wrapper.trains:
                    trainable.append(name)
        return cls(grouped(placed), tuple(trainable))

    def placed(self) -> dict[tuple[str, str], Config | None]:
        """Return what stands where: (site, kind) -> config, or None for a module trained in full."""
        placed: dict[tuple[str, str], Config | None] = {
            (site, config.kind): config for config, sites in self.injections for site in sites
        }
        return placed | {(name, TrainableHead.kind): None for name in self.trainable}


def grouped(placed: Iterable[tuple[Config, str]]) -> tuple[tuple[Config, tuple[str, ...]], ...]:
    """Return the sites of each config, in the order in which they come."""
    groups: dict[Config, list[str]] = {}
    for config, site in placed:
        groups.setdefault(config, []).append(site)
    return tuple((config, tuple(sites)) for config, sites in groups.items())


class Problems:
    """What is wrong with which site; sites of the same problem become one line."""

    def __init__(self) -> None:
        self._sites: dict[str, list[str]] = {}

    def add(self, site: str, problem: str) -> None:
        """Note a problem."""
        self._sites.setdefault(problem, []).append(site)

    def __len__(self) -> int:
        return len(self._sites)

    def lines(self, hint: Callable[[list[str]], str] = lambda sites: "") -> list[str]:
        """Return a line for each problem, with what `hint` has to say to its sites."""
        return [f"{described(sites)}: {text}{hint(sites)}" for text, sites in self._sites.items()]


@dataclass
class Plan:
    """New wrappers around a model's modules, complete, and not yet in the model."""

    model: nn.Module
    wrappers: dict[str, list[InjectedModule]] = field(default_factory=dict)
    """The new wrappers at each site, outermost first."""
    replacements: dict[nn.Module, nn.Module] = field(default_factory=dict)
    """What takes the place of what."""

    def add(self, site: Site, make: Callable[[nn.Module], InjectedModule], *, innermost: bool) -> None:
        """Make a wrapper: around the bare module inside a site's wrappers, or around them all."""
        inside = site.bare if innermost else site.outermost
        # What this plan has put there already stays inside of it.
        wrapper = make(self.replacements.get(inside, inside))
        self.replacements[inside] = wrapper
        self.wrappers.setdefault(site.name, []).insert(0, wrapper)

    def sites(self) -> dict[str, Site]:
        """Return the sites with their new wrappers, as `sites.injected_sites` would, were they in place."""
        bare = {name: bare_module(wrappers[0]) for name, wrappers in self.wrappers.items()}
        return {name: Site(name, bare[name], tuple(wrappers)) for name, wrappers in self.wrappers.items()}

    def put_in_place(self) -> None:
        """Swap the new wrappers in, under all parents of what they stand around.

        Warns:
            UserWarning: where a rank exceeds the smaller side of a layer; before anything has changed.
        """
        _warn_of_wide_ranks(self)
        replace_modules(self.model, self.replacements)
        for wrappers in self.wrappers.values():
            for wrapper in wrappers:
                wrapper.begin()


def build(manifest: Manifest, sites: Sites, *, without_values: bool = False) -> tuple[Plan, Problems]:
    """Return wrappers for all that a manifest asks for, and every problem met. The model is not touched.

    Args:
        manifest: what shall stand where.
        sites: of the model, as it is.
        without_values: make new parameters on the meta device, for values that come from a file.
    """
    plan, problems = Plan(sites.model), Problems()
    for site in sites.unique():
        frozen = any(isinstance(wrapper, FrozenStatistics) for wrapper in site.wrappers)
        if keeps_statistics(site.bare) and not frozen:
            plan.add(site, FrozenStatistics, innermost=True)
    default = device_of(sites.model)
    for config, names in sorted(manifest.injections, key=lambda entry: not WRAPPERS[entry[0].kind].innermost):
        kind = WRAPPERS[config.kind]
        for name in names:
            if problem := _missing(name, sites, problems) or _taken(sites[name], config, sites, plan):
                problems.add(name, problem)
                continue
            device = torch.device("meta") if without_values else device_of(sites[name].bare, default)
            try:
                make = partial(kind, config=config, site=name, device=device)
                plan.add(sites[name], make, innermost=kind.innermost)
            except TargetError as error:
                problems.add(name, str(error))
    overlaps, ties = _overlaps(manifest, sites), _ties(manifest, sites)
    for name, count in Counter(manifest.trainable).items():
        if problem := _missing(name, sites, problems):
            problems.add(name, f"to be trained in full, but {problem}")
        elif problem := (
            ("listed twice to be trained in full" if count > 1 else overlaps.get(name))
            or ties.get(name)
            or _offloaded(sites[name])
        ):
            problems.add(name, problem)
        else:
            try:
                plan.add(sites[name], TrainableHead, innermost=False)
            except TargetError as error:
                problems.add(name, str(error))
    return plan, problems


def _missing(name: str, sites: Sites, problems: Problems) -> str | None:
    """Return why nothing can be put at a name on this model, or None."""
    if name not in sites:
        # Comparing names is slow, and after a few hints the next ones tell nothing new.
        near = nearest(name, sites, limit=1) if len(problems) < 8 else []
        return "the model has no such module" + (f"; nearest: {near[0]!r}" if near else "")
    if (first := sites.first_name(sites[name])) != name:
        return f"the model has this module first as {first!r}, and files name it so"
    return None


def _taken(site: Site, config: Config, sites: Sites, plan: Plan) -> str | None:
    """Return why a config cannot be injected at a site, for what is there already or planned, or None."""
    for outer in (*above(site.name), site.name):
        if any(wrapper.trains_whole_module for wrapper in sites[outer].wrappers):
            return f"lies in {outer!r}, which is trained in full; leave it out with exclude=..."
        if any(kind.__name__ == "BaseTunerLayer" for kind in type(sites[outer].bare).__mro__):
            return (
                f"{outer!r} is wrapped by PEFT already; take PEFT's layers out first: model = model.unload()"
            )
    for wrapper in site.wrappers:
        if wrapper.kind == config.kind:
            return (
                f"carries {wrapper.description()} already; leave it out with exclude=..., "
                "or call minilora.eject(model) first"
            )
    if any(wrapper.kind == config.kind for wrapper in plan.wrappers.get(site.name, ())):
        return f"listed twice for {config.kind}"
    return _offloaded(site)


def _offloaded(site: Site) -> str | None:
    """Return why nothing can be made beside weights that accelerate brings in only for a call, or None."""
    for module in site.bare.modules():
        if is_managed(module) and any(p is not None and p.is_meta for p in own_parameters(module).values()):
            return (
                "its weights are offloaded, so what is trained would have no values of its own: inject or "
                "load first, then dispatch the model with accelerate"
            )
    return None


def _overlaps(manifest: Manifest, sites: Sites) -> dict[str, str]:
    """Return, for each module to be trained in full, the sites that it is, contains or lies in."""
    heads = set(manifest.trainable)
    taken = {name for _, names in manifest.injections for name in names}
    taken |= {name for name, site in sites.injected().items() if any(w.trains for w in site.wrappers)}
    found: dict[str, set[str]] = {}
    for name in heads & taken:
        found.setdefault(name, set()).add(name)
    for name in heads | taken:
        for outer in above(name):
            if outer in heads:
                found.setdefault(outer, set()).add(name)
            if name in heads and (outer in taken or outer in heads):
                found.setdefault(name, set()).add(outer)
    return {
        name: "trainable names what is, contains or lies inside an injected site or another trainable module "
        f"({quoted(sorted(others))}); choose one of the two"
        for name, others in found.items()
    }


def _ties(manifest: Manifest, sites: Sites) -> dict[str, str]:
    """Return, for each module to be trained in full, why a copy would loosen a tie to another module."""
    if not manifest.trainable:
        return {}
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for module_name, module in sites.model.named_modules():
        for parameter_name, parameter in own_parameters(module).items():
            owners.setdefault(id(parameter), []).append((f"{module_name}.{parameter_name}", module))
    found: dict[str, str] = {}
    for name in {*manifest.trainable} & set(sites):
        inside = set(sites[name].outermost.modules())
        outside = [
            owner
            for parameter in sites[name].bare.parameters()
            for owner, module in owners.get(id(parameter), ())
            if module not in inside
        ]
        if outside:
            instead = (
                "Give it as a target for LoRA instead, or untie"
                if linear_shape(sites[name].bare)
                else "Untie"
            )
            found[name] = (
                f"trainable names a module whose weight is tied to {quoted(outside)}; a trained copy would "
                f"untie them. {instead} the weights first"
            )
    return found


def _warn_of_wide_ranks(plan: Plan) -> None:
    wide = [
        name
        for name, wrappers in plan.wrappers.items()
        for wrapper in wrappers
        if isinstance(wrapper, LoRALinear)
        and wrapper.config.r > min(wrapper.in_features, wrapper.out_features)
    ]
    if wide:
        warnings.warn(
            f"{described(wide)}: r exceeds the smaller side of the layer, so a smaller r would do the same "
            "with fewer parameters",
            UserWarning,
            stacklevel=5,
        )
