"""`build`: wrappers for all that a manifest says, or every problem at once.

`inject` makes a manifest from what the user names, `load` reads one from a file; from there on they are one
act: build everything beside the model, then `Plan.put_in_place` swaps it in.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from .adapter import Adapter
from .config import AdapterConfig, Config, LoRAConfig, RowsConfig
from .errors import TargetError, quoted
from .frozen import FrozenStatistics, keeps_statistics
from .linear import call_problem, is_managed, is_of_peft, linear_shape, plain_weight
from .lora import LoRA
from .lora_linear import LoRALinear
from .manifest import Manifest
from .module import InjectedModule, bare_module, device_of
from .names import above, described, generic
from .problems import Problems
from .rows import TrainedRows
from .sites import Site, Sites, replace_modules
from .ties import copy_problem, rows_problem
from .torch_internals import has_hooks, own_parameters
from .trained import TrainableHead, TrainedParameter
from .training import base_parameters
from .view import Substitution

WRAPPERS: dict[str, type[InjectedModule]] = {kind.kind: kind for kind in (LoRA, TrainedRows, Adapter)}
"""The wrappers that configs of each kind ask for; `LoRALinear` is a `LoRA`."""


@dataclass
class Plan:
    """New wrappers around a model's modules, complete, and not yet in the model."""

    before: Sites
    """The walk over the model as it is."""
    wrappers: dict[str, list[InjectedModule]] = field(default_factory=dict)
    """The new wrappers at each site, outermost first."""
    replacements: dict[nn.Module, nn.Module] = field(default_factory=dict)
    """What takes the place of what."""
    rows: dict[str, TrainedRows] = field(default_factory=dict)
    """The new wrappers that train rows, by site, for those that share them."""

    def add(self, site: Site, make: Callable[[nn.Module], InjectedModule], position: int) -> None:
        """Make a wrapper around what stands further in at a site, and inside what stands further out."""
        further_in = (wrapper for wrapper in site.wrappers if wrapper.position <= position)
        inside = next(further_in, site.bare)
        # What this plan has put there already stays inside of it.
        wrapper = make(self.replacements.get(inside, inside))
        self.replacements[inside] = wrapper
        self.wrappers.setdefault(site.owner, []).insert(0, wrapper)

    def sites(self) -> dict[str, Site]:
        """Return the sites with their new wrappers, as `sites.injected_sites` would, were they in place."""
        bare = {name: bare_module(wrappers[0]) for name, wrappers in self.wrappers.items()}
        return {name: Site(name, bare[name], tuple(wrappers)) for name, wrappers in self.wrappers.items()}

    def put_in_place(self) -> None:
        """Freeze the base, and swap the new wrappers in, under all parents of what they stand around.

        Interrupted, it leaves the model as it was.

        Warns:
            UserWarning: where a rank exceeds the smaller side of a layer; before anything has changed.
        """
        _warn_of_wide_ranks(self)
        model, new = self.before.model, [w for wrappers in self.wrappers.values() for w in wrappers]
        thawed = [parameter for parameter in base_parameters(self.before) if parameter.requires_grad]
        try:
            for parameter in thawed:
                parameter.requires_grad_(False)
            replace_modules(model, self.replacements)
            for wrapper in new:
                wrapper.begin()
        except BaseException:
            for wrapper in new:
                wrapper.ejected()
            replace_modules(model, {outer: inside for inside, outer in self.replacements.items()})
            for parameter in thawed:
                parameter.requires_grad_(True)
            raise


def build(manifest: Manifest, sites: Sites, *, without_values: bool = False) -> tuple[Plan, Problems]:
    """Return wrappers for all that a manifest asks for, and every problem met. The model is not touched.

    Args:
        manifest: what shall stand where.
        sites: of the model, as it is.
        without_values: make new parameters on the meta device, for values that come from a file.
    """
    plan, problems = Plan(sites), Problems()

    def add(site: Site, make: Callable[[nn.Module], InjectedModule], position: int) -> None:
        try:
            plan.add(site, make, position)
        except TargetError as error:
            problems.add(site.name, str(error))

    for site in sites.unique():
        frozen = any(isinstance(wrapper, FrozenStatistics) for wrapper in site.wrappers)
        if keeps_statistics(site.bare) and not frozen:
            plan.add(site, FrozenStatistics, FrozenStatistics.position)
    of_trainable = Problems()
    in_full = _trained_in_full(manifest, sites, of_trainable)
    for site in in_full:
        if site.parameter is not None:
            add(site, partial(TrainedParameter, parameter=site.parameter), TrainedParameter.position)
    default, placed = device_of(sites.model), manifest.placed()
    for config, names in sorted(manifest.injections, key=lambda entry: WRAPPERS[entry[0].kind].position):
        for name in names:
            problem = _missing(name, sites) or _taken(sites[name], config, sites, plan)
            if problem := problem or rows_problem(config, sites[name], sites, placed):
                problems.add(name, problem)
                continue
            device = torch.device("meta") if without_values else device_of(sites[name].bare, default)
            make = partial(_wrapper, config=config, site=sites[name], device=device, plan=plan)
            add(sites[name], make, WRAPPERS[config.kind].position)
    problems += of_trainable
    for site in in_full:
        if site.parameter is None:
            add(site, TrainableHead, TrainableHead.position)
    return plan, problems


def _wrapper(base: nn.Module, config: Config, site: Site, device: torch.device, plan: Plan) -> InjectedModule:
    """Return what a config asks for at a site, around `base`.

    Raises:
        TargetError: when it cannot stand there.
    """
    if isinstance(config, AdapterConfig):
        if site.parameter is not None:
            raise TargetError("is a parameter, and a bottleneck adapter goes around a module")
        return Adapter(base, config, site=site.name, device=device)
    a_layer = site.parameter is None and linear_shape(site.bare) and not runs_its_own_code(site.bare)
    if isinstance(config, LoRAConfig) and a_layer:
        return LoRALinear(base, config, site=site.name, device=device)
    parameter = site.parameter or "weight"
    if own_parameters(site.bare).get(parameter) is None:
        matrices = [n for n, p in own_parameters(site.bare).items() if p is not None and p.dim() > 1]
        instead = f"; give {quoted(matrices)} of it as the target" if matrices else ""
        raise TargetError(f"{type(site.bare).__name__} has no weight of its own{instead}")
    if isinstance(config, RowsConfig):
        first = plan.rows.get(config.of or "")
        made = TrainedRows(base, config, site=site.name, parameter=parameter, first=first)
        return plan.rows.setdefault(site.name, made)
    assert isinstance(config, LoRAConfig)
    return LoRA(base, config, site=site.name, device=device, parameter=parameter)


def runs_its_own_code(linear: nn.Module) -> bool:
    """Return whether a linear layer's class computes something else from its weight than F.linear does.

    Where hooks or a forward on the instance do, the layer is called as it is, and cannot be merged.
    """
    on_the_instance = has_hooks(linear) or "forward" in vars(linear)
    return plain_weight(linear) is not None and not on_the_instance and call_problem(linear) is not None


def _missing(name: str, sites: Sites) -> str | None:
    """Return why nothing can be put at a name on this model, or None."""
    if name not in sites:
        return "the model has no such module or parameter"
    if not sites[name].owner:
        return (
            "is a parameter of the model itself, which nothing stands around: put the model in another, "
            'nn.ModuleDict({"model": model}), and inject into that one'
        )
    if (first := sites.first_name(sites[name])) != name:
        return f"the model has this module first as {first!r}, and files name it so"
    return None


def _taken(site: Site, config: Config, sites: Sites, plan: Plan) -> str | None:
    """Return why a config cannot be injected at a site, for what is there already or planned, or None."""
    for outer in (*above(site.owner), site.owner):
        if sites[outer].trained_in_full:
            # By its generic name: the same problem in every layer of a stack is one line.
            return f"lies in {generic(outer)!r}, which is trained in full; leave it out with exclude=..."
    if problem := _of_peft(site, sites) or _occupied(site, config, plan):
        return problem
    if site.parameter is not None and len(sites.owners(site)) > 1 and not isinstance(config, RowsConfig):
        return f"is one parameter of several modules ({quoted(sites.owners(site))}); untie it first"
    return _offloaded(site)


def _of_peft(site: Site, sites: Sites) -> str | None:
    """Return that PEFT's layers stand around a site or in it, or None."""
    around = (sites[outer].bare for outer in (*above(site.owner), site.owner))
    if any(is_of_peft(module) for module in (*around, *site.bare.modules())):
        return (
            "is wrapped by PEFT already, or holds or lies in what is; take PEFT's layers out first: "
            "model = model.unload()"
        )
    return None


def _offloaded(site: Site) -> str | None:
    """Return why nothing can be made beside weights that accelerate brings in only for a call, or None."""
    for module in site.bare.modules():
        if is_managed(module) and any(p is not None and p.is_meta for p in own_parameters(module).values()):
            return (
                "its weights are offloaded, so what is trained would have no values of its own: inject or "
                "load first, then dispatch the model with accelerate"
            )
    return None


def _occupied(site: Site, config: Config, plan: Plan) -> str | None:
    """Return which wrapper of a site or a plan has the place already, or None."""
    parameter = site.parameter or "weight"
    for wrapper in (*site.wrappers, *plan.wrappers.get(site.owner, ())):
        if getattr(wrapper, "parameter", parameter) != parameter:
            continue  # of another parameter of the same module
        if wrapper.kind == config.kind:
            if wrapper not in site.wrappers:
                return f"listed twice for {config.kind}"
            return (
                f"carries {wrapper.description()} already; leave it out with exclude=..., "
                "or call minilora.eject(model) first"
            )
        if isinstance(wrapper, Substitution) and issubclass(WRAPPERS[config.kind], Substitution):
            return f"carries {wrapper.description()} as well; choose one of the two"
    return None


def _trained_in_full(manifest: Manifest, sites: Sites, problems: Problems) -> list[Site]:
    """Return the sites whose copies shall be trained, and note which of them cannot be."""
    overlaps = _overlaps(manifest, sites)
    found = []
    for name, count in Counter(manifest.trainable).items():
        if problem := _missing(name, sites):
            problems.add(name, f"to be trained in full, but {problem}")
        elif problem := (
            ("listed twice to be trained in full" if count > 1 else overlaps.get(name))
            or _adapted(sites[name])
            or _of_peft(sites[name], sites)
            or copy_problem(sites[name], sites)
            or _offloaded(sites[name])
        ):
            problems.add(name, problem)
        else:
            found.append(sites[name])
    return found


def _overlaps(manifest: Manifest, sites: Sites) -> dict[str, str]:
    """Return, for each module or parameter to be trained in full, the sites that it is, contains or lies in.

    A parameter may lie in a site, as the bias of a layer with LoRA on its weight does, if it is another.
    """
    heads = {name for name in manifest.trainable if name in sites}
    modules = {name for name in heads if sites[name].parameter is None}
    taken = {name for _, names in manifest.injections for name in names}
    taken |= {
        wrapper.placed_at(name)
        for name, s in sites.injected().items()
        for wrapper in s.wrappers
        if wrapper.trains
    }
    whole = sites.trained_in_full()
    found: dict[str, set[str]] = {}
    for name in heads & taken:
        found.setdefault(name, set()).add(name)
    for name in heads | taken:
        for outer in above(name):
            if outer in modules:
                found.setdefault(outer, set()).add(name)
            if (name in modules and outer in taken) or (name in heads and outer in modules | whole):
                found.setdefault(name, set()).add(outer)
    alike = Counter(map(generic, found))  # an overlap in each layer of a stack shall be one line
    return {
        name: "trainable names what is, contains or lies inside an injected site or another trainable module "
        f"({quoted(sorted({*map(generic, others)} if alike[generic(name)] > 1 else others))}); choose one of "
        "the two"
        for name, others in found.items()
    }


def _adapted(site: Site) -> str | None:
    """Return that an earlier call has something trained in a parameter to be trained in full, or None."""
    for wrapper in site.wrappers:
        if isinstance(wrapper, Substitution) and site.parameter in wrapper.replaces:
            return (
                f"to be trained in full, but carries {wrapper.description()} already; choose one of the two"
            )
    return None


def _warn_of_wide_ranks(plan: Plan) -> None:
    wide = [
        name
        for name, wrappers in plan.wrappers.items()
        for wrapper in wrappers
        if isinstance(wrapper, LoRA) and wrapper.config.r > min(wrapper.layout.inputs, wrapper.layout.outputs)
    ]
    if wide:
        warnings.warn(
            f"{described(wide)}: r exceeds the smaller side of the layer, so a smaller r would do the same "
            "with fewer parameters",
            UserWarning,
            stacklevel=5,
        )
