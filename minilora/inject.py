"""`inject` and `eject`: select, build everything, then swap once."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn

from .adapter import Adapter
from .config import AdapterConfig, Config, LoRAConfig
from .errors import TargetError, quoted, several
from .head import TrainableHead
from .lora import LoRALinear
from .module import (
    InjectedModule,
    device_of,
    injected_modules,
    named_sites,
    replace_modules,
    require_enabled,
    require_unwrapped,
)
from .targets import Targets, choices, describe_sites, head_modules, linear_names_within, select
from .training import freeze


def inject(
    model: nn.Module,
    targets: Targets,
    config: Config = LoRAConfig(),  # noqa: B008  frozen, so one default serves all calls
    *,
    trainable: Targets | None = None,
    exclude: Targets = (),
) -> nn.Module:
    """Put a LoRA update or a bottleneck adapter at every site that the targets match, and freeze the base.

    The model's outputs do not change: what is new starts at zero effect. Calling again adds to what is
    there, LoRA and bottleneck adapters on the same site included. Inverse: `eject`.

    Args:
        model: any module; changed in place. Not yet inside DDP, FSDP or `torch.compile`.
        targets: one, or several, of: a module's dotted name or a whole-segment suffix of it ("query"
            matches `layer.0.self.query`, never `my_query`); a compiled `re.Pattern`, matched in full; a
            callable `(name, module) -> bool`; "all-linear", which is every linear layer but the output
            head and what `trainable` names. Each must match.
        config: a `LoRAConfig` or an `AdapterConfig`.
        trainable: modules to train in full and to save with the adapter, such as ["classifier"]; a copy
            is trained and the original kept. `()` says that none is meant, and silences the warning that
            a model with a task head gets for None.
        exclude: targets of the same language that are taken out again. Each must match, too.

    Returns:
        The model itself.

    Raises:
        TargetError: listing every problem with a target or a site; the model is as it was.
        MiniLoRAError: when the model is wrapped in DDP, FSDP or `torch.compile`.
        TypeError: when the config is neither of the two.

    Warns:
        UserWarning: when a task head is about to stay frozen and unsaved.
    """
    require_unwrapped(model)
    if not isinstance(config, (LoRAConfig, AdapterConfig)):
        raise TypeError(f"config must be a LoRAConfig or an AdapterConfig, not {config!r}")
    heads, problems = select(model, () if trainable is None else trainable, argument="trainable")
    excluded, more = select(model, exclude, argument="exclude", spared=heads)
    problems += more
    sites, more = select(model, targets, argument="targets", spared=heads)
    problems += more
    left_out = set(excluded.values())
    chosen = {name: module for name, module in sites.items() if module not in left_out}
    if not chosen and not more:
        problems.append(
            "targets: exclude leaves none of the sites that they match" if sites else "targets: none given"
        )

    chains = dict(named_sites(model))
    trained = [name for name, chain in chains.items() if isinstance(chain[0], TrainableHead)]
    device = device_of(model)
    failures: dict[str, list[str]] = defaultdict(list)  # message -> sites, so that a stack is one line
    replacements: dict[nn.Module, nn.Module] = {}
    for name in chosen:
        try:
            old = _place_for(config, name, chains[name], trained)
            replacements[old] = build(old, config, site=name, device=device_of(old, device))
        except TargetError as error:
            failures[str(error)].append(name)
    for name, head in heads.items():
        try:
            require_trainable_in_full(model, name, head, {*chosen, *(heads.keys() - {name})})
            replacements[head] = TrainableHead(head)
        except TargetError as error:
            failures[str(error)].append(name)
    for message, names in failures.items():
        instead = sorted({inner for name in names for inner in linear_names_within(model, name)})
        hint = f"; linear layers inside it: {quoted(instead)}" if instead else ""
        problems.append(f"{describe_sites(names)}: {message}{hint}")
    if problems:
        raise TargetError(several(problems, outcome="the model has not been changed", footer=choices(model)))

    if trainable is None:
        _warn_of_frozen_head(model, chosen)
    replace_modules(model, replacements)
    freeze(model)
    return model


def eject(model: nn.Module) -> nn.Module:
    """Remove every injection: the base model is back, the very modules that were there before.

    Same objects, hooks, `state_dict` keys and bytes; what was merged is unmerged first. What was trained
    is lost unless it was saved. `requires_grad` stays as it is: the base is frozen until
    `model.requires_grad_(True)`. Inverse: `inject`.

    Returns:
        The model itself.

    Raises:
        MiniLoRAError: when the model carries no injection, or is inside `minilora.disabled`.
    """
    found = require_enabled(model, "eject")
    originals: dict[nn.Module, nn.Module] = {}
    for wrappers in found.values():
        for wrapper in wrappers:
            wrapper.unmerge()
        originals[wrappers[0]] = wrappers[-1].base
    replace_modules(model, originals)
    return model


def build(base: nn.Module, config: Config, *, site: str, device: torch.device) -> InjectedModule:
    """Return the wrapper that a config asks for, around a module that it does not change."""
    kinds: dict[str, Callable[..., InjectedModule]] = {LoRALinear.kind: LoRALinear, Adapter.kind: Adapter}
    return kinds[config.kind](base, config, site=site, device=device)


def _place_for(config: Config, name: str, chain: list[nn.Module], trained: Iterable[str]) -> nn.Module:
    """Return the module at a site that the new wrapper shall stand around: LoRA inside, adapters outside."""
    for above in trained:
        if f"{name}.".startswith(f"{above}."):
            raise TargetError(f"lies in {above!r}, which is trained in full; leave it out with exclude=...")
    for layer in chain:
        if isinstance(layer, InjectedModule) and layer.kind == config.kind:
            raise TargetError(
                f"carries {layer.description()} already; leave it out with exclude=..., "
                "or call minilora.eject(model) first"
            )
    return chain[-1] if config.kind == LoRALinear.kind else chain[0]


def require_trainable_in_full(model: nn.Module, name: str, head: nn.Module, chosen: Iterable[str]) -> None:
    """Raise where a copy of a module cannot stand for it."""
    if not any(p.is_floating_point() for p in head.parameters()):
        raise TargetError("trainable names a module without floating-point parameters")
    taken = {*chosen, *injected_modules(model)}
    overlap = [
        site
        for site in sorted(taken)
        if site == name or site.startswith(name + ".") or name.startswith(site + ".")
    ]
    if overlap:
        raise TargetError(
            "trainable names what is, contains or lies inside an injected site or another trainable module "
            f"({quoted(overlap)}); choose one of the two"
        )
    own_modules, own_parameters = set(head.modules()), {id(p) for p in head.parameters()}
    outside = [
        f"{module_name}.{parameter_name}"
        for module_name, module in model.named_modules()
        if module not in own_modules
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in own_parameters
    ]
    if outside:
        tied = quoted(outside)
        raise TargetError(
            f"trainable names a module whose weight is tied to {tied}; a trained copy would untie them. "
            "Give it as a target for LoRA instead, or untie the weights first"
        )


def _warn_of_frozen_head(model: nn.Module, chosen: Iterable[str]) -> None:
    trained = {*chosen, *injected_modules(model)}
    frozen = [
        name
        for name in head_modules(model)
        if not any(site == name or site.startswith(name + ".") for site in trained)
    ]
    if frozen:
        warnings.warn(
            f"{quoted(frozen)} of this {type(model).__name__} stays frozen and will not be saved with "
            f"the adapter. If it is new, pass trainable={frozen!r}; if frozen is meant, pass trainable=()",
            UserWarning,
            stacklevel=3,
        )
