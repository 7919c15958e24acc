"""`inject` and `eject`: select, build everything, then swap once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from .config import AdapterConfig, Config, LoRAConfig, RowsConfig
from .errors import TargetError, quoted, several
from .followers import tell_followers
from .manifest import Manifest, grouped
from .module import is_called
from .names import described, lies_within
from .plan import build
from .sites import Site, Sites, replace_modules, require_enabled, require_whole
from .targets import Target, Targets, as_list, choices, head_modules, linear_names_within, matching, select
from .ties import at_all_owners
from .torch_internals import own_parameters
from .words import explains_foreign_words, meant


@explains_foreign_words
def inject(
    model: nn.Module,
    targets: Targets,
    config: Config | Mapping[Target, Config] | Callable[[str, Any], Config] = LoRAConfig(),  # noqa: B008  frozen
    *,
    trainable: Targets | None = None,
    exclude: Targets = (),
) -> nn.Module:
    """Put what a config says at every site that the targets match, and freeze the base.

    The model's outputs do not change: what is new starts at zero effect. Frozen means frozen: a BatchNorm
    of the base stays in evaluation, and its running statistics as they are. Calling again adds to what is
    there, LoRA and bottleneck adapters on the same site included. Inverse: `eject`.

    Args:
        model: any module; changed in place. Not yet inside DDP, FSDP or `torch.compile`.
        targets: one, or several, of: a module's dotted name or a whole-segment suffix of it ("query"
            matches `layer.0.self.query`, never `my_query`); a compiled `re.Pattern`, matched in full; a
            callable `(name, module) -> bool`; "all-linear", which is every linear layer, fused experts and
            attention's packed projections included, but the output head and what `trainable` names. What
            matches no module is looked for among parameters ("in_proj_weight"). Each must match. `[]` where
            `trainable` is all that is wanted.
        config: a `LoRAConfig`, an `AdapterConfig` or a `RowsConfig`; or a mapping of targets to configs, of
            which the first that matches a site is its own; or a callable `(name, module or parameter) ->
            config`. Rows of a weight that several modules share, as a tied output layer does, are trained
            as one at all of these.
        trainable: modules and parameters to train in full and to save with the adapter, such as
            ["classifier", "norm.bias"]; a copy is trained and the original kept. A list of modules stands
            for its members. `()` says that none is meant, and silences the warning that a model with a task
            head gets for None.
        exclude: targets of the same language that are taken out again. Each must match, too.

    Returns:
        The model itself.

    Raises:
        TargetError: listing every problem with a target or a site; the model is as it was.
        MiniLoRAError: when the model is wrapped in DDP, FSDP or `torch.compile`, or an argument is not one.
        TypeError: when the config is none of these.

    Warns:
        UserWarning: when a task head is about to stay frozen and unsaved, or a rank exceeds the smaller
            side of its layer.

    Example:
        >>> model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
        >>> model = minilora.inject(model, ["body"], minilora.LoRAConfig(r=2), trainable=["head"])
        >>> print(minilora.summary(model))
        ModuleDict
        ------------------------------------------------------
        site      kind                      parameters  state
        ------------------------------------------------------
        body  x1  LoRA r=2 alpha=16                 32  active
        head  x1  trained in full (Linear)          18  active
        ------------------------------------------------------
        trainable: 50 parameters, 55.6 % of the base's 90
        LoRA reaches 100 % of the base's matrix weights
    """
    require_whole(model)
    sites = Sites(model)
    named = as_list(() if trainable is None else trainable)
    heads, problems = select(sites, named, argument="trainable")
    heads = _members(heads, sites)
    excluded, more = select(sites, exclude, argument="exclude", left_alone=heads)
    problems += more
    holding = not isinstance(config, AdapterConfig)  # LoRA and rows stand on a matrix of a module's own
    found, more = select(sites, targets, argument="targets", left_alone=heads, matrices=holding)
    problems += more
    chosen = [site for name, site in found.items() if name not in excluded]
    if found and not chosen and not more:
        problems.append("targets: exclude leaves none of the sites that they match")
    elif not (found or more or named):
        problems.append("targets: none given")
    placed, more = _configured(chosen, config, sites)
    problems += more
    plan, misfits = build(Manifest(grouped(placed), tuple(heads)), sites)
    problems += misfits.lines(lambda names: _instead(names, sites))
    if problems:
        raise TargetError(several(problems, outcome="the model has not been changed", footer=choices(sites)))
    if trainable is None:
        _warn_of_frozen_head(sites, [site.owner for site in chosen])
    plan.put_in_place()
    tell_followers(model)
    return model


def eject(model: nn.Module) -> nn.Module:
    """Remove every injection: the base model is back, the very modules that were there before.

    Same objects, hooks, `state_dict` keys and bytes; what was merged is unmerged first. What was trained
    is lost unless it was saved. `requires_grad` stays as it is: the base is frozen until
    `model.requires_grad_(True)`. Inverse: `inject`.

    Returns:
        The model itself.

    Raises:
        MiniLoRAError: when the model carries no injection, is sharded, or is inside `minilora.disabled`.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> layer = model[0]
        >>> minilora.eject(minilora.inject(model, "0"))[0] is layer
        True
    """
    require_whole(model, "eject before fully_shard; inside minilora.disabled it computes what the base does")
    originals: dict[nn.Module, nn.Module] = {}
    for site in require_enabled(model, "eject").values():
        for wrapper in site.wrappers:
            wrapper.ejected()
        originals[site.outermost] = site.bare
    replace_modules(model, originals)
    tell_followers(model)
    return model


def _configured(
    chosen: list[Site], config: object, sites: Sites
) -> tuple[list[tuple[Config, str]], list[str]]:
    """Return the config of each site, and what is wrong with a mapping or a callable of configs.

    Raises:
        TypeError: when what is given is no config, or what it gives is none.
    """
    placed: list[tuple[Config, str]] = []
    problems: list[str] = []
    of_site: Callable[[Site], object]
    if isinstance(config, Mapping) and all(isinstance(value, Config) for value in config.values()):
        matched = {target: set(matching(target, sites)) for target in config}
        problems += [
            f"config: {target!r} matches none of the sites" for target in config if not matched[target]
        ]

        def of_site(site: Site) -> object:
            return next((config[target] for target in config if site.name in matched[target]), None)
    elif callable(config) and not isinstance(config, type):

        def of_site(site: Site) -> object:
            value = site.bare if site.parameter is None else own_parameters(site.bare)[site.parameter]
            return config(site.name, value)
    else:

        def of_site(site: Site) -> object:
            return config

    without: list[str] = []
    for site in chosen:
        found = of_site(site)
        if found is None and isinstance(config, Mapping):
            without.append(site.name)
        elif not isinstance(found, (LoRAConfig, AdapterConfig, RowsConfig)):
            raise TypeError(
                "config must be a LoRAConfig, an AdapterConfig or a RowsConfig, not "
                f"{found!r:.100}{meant(found)}"
            )
        else:
            # LoRA at a module is LoRA on its weight: one site, one name.
            on_weight = not isinstance(found, AdapterConfig) and site.parameter == "weight" and site.owner
            name = site.owner if on_weight else site.name
            placed += [(each, owner) for owner, each in at_all_owners(found, sites[name], sites).items()]
    if without:
        problems.append(f"config: no entry matches {described(without)}")
    return list(dict.fromkeys(placed)), problems  # two targets may have been one weight


def _members(heads: dict[str, Site], sites: Sites) -> dict[str, Site]:
    """Return the sites with every list of modules, which is never called itself, given by its members."""
    found: dict[str, Site] = {}
    for name, site in heads.items():
        a_list = isinstance(site.bare, (nn.ModuleList, nn.ModuleDict)) and not is_called(site.bare)
        if site.parameter is None and a_list:
            members = {f"{name}.{child}": sites[f"{name}.{child}"] for child, _ in site.bare.named_children()}
            # Without any, the list stays, to be refused by name.
            found |= _members(
                {n: m for n, m in members.items() if any(True for _ in m.bare.parameters())}, sites
            ) or {name: site}
        else:
            found[name] = site
    return found


def _instead(names: list[str], sites: Sites) -> str:
    inner = linear_names_within(sites, names)
    return f"; linear layers inside it: {quoted(inner)}" if inner else ""


def _warn_of_frozen_head(sites: Sites, chosen: Iterable[str]) -> None:
    trained = {*chosen, *(name for name, site in sites.injected().items() if site.trains)}
    frozen = [
        name for name in head_modules(sites.model) if not any(lies_within(site, name) for site in trained)
    ]
    if frozen:
        warnings.warn(
            f"{quoted(frozen)} of this {type(sites.model).__name__} stays frozen and will not be saved with "
            f"the adapter. If it is new, pass trainable={frozen!r}; if frozen is meant, pass trainable=()",
            UserWarning,
            stacklevel=4,
        )
