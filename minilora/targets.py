"""From what the user names to sites: targets, their nearest misses, and what there is to choose from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import nn

from .layout import layout_of
from .linear import is_of_peft, linear_shape
from .names import generic, nearest, outermost_of, suffix_counts
from .sites import Site, Sites
from .torch_internals import own_parameters

Target: TypeAlias = "str | re.Pattern[str] | Callable[[str, Any], bool]"
"""A full dotted name or a whole-segment suffix of one; a compiled pattern, matched in full; or a predicate
`(name, module) -> bool`. It names modules; where it matches none, the parameters of modules by the same
rules. The string "all-linear" is a target of its own."""

Targets: TypeAlias = "Target | Iterable[Target]"

ALL_LINEAR = "all-linear"

HINTS = 8
"""For how many targets that match nothing the nearest names are looked for."""


def select(
    sites: Sites, targets: Targets, *, argument: str, left_alone: Iterable[str] = (), matrices: bool = False
) -> tuple[dict[str, Site], list[str]]:
    """Return the sites that the targets match, and every problem met on the way.

    Args:
        sites: of the model, injected or bare; names are those of the bare model.
        targets: one target or several.
        argument: what the user calls these targets, for the messages.
        left_alone: names of modules that "all-linear" does not reach, with all that is in them.
        matrices: whether modules with a matrix are meant; a hint names those, where one is near.

    Returns:
        The sites by name, in the model's order, a shared module under its first name only; and a message
        for each target that is malformed or matches nothing.
    """
    problems: list[str] = []
    matched: set[str] = set()
    for target in as_list(targets):
        # A type or a module is callable, but not as a predicate.
        if isinstance(target, (type, nn.Module)) or not (
            isinstance(target, (str, re.Pattern)) or callable(target)
        ):
            problems.append(
                f"{argument}: {target!r} is a {type(target).__name__}; give a module's name, a compiled "
                "re.Pattern, or a callable (name, module) -> bool"
            )
            continue
        found = _all_linear(sites, left_alone) if target == ALL_LINEAR else matching(target, sites)
        if not found:
            # Comparing names is slow, and after a few hints the next ones tell nothing new.
            hint = _hint(target, sites, matrices) if len(problems) < HINTS else ""
            problems.append(f"{argument}: {_shown(target)} matches no module{hint}")
        matched.update(found)
    in_order = (*sites.unique(), *sites.parameters())
    return {site.name: site for site in in_order if site.name in matched}, problems


def matching(target: Target, sites: Sites) -> list[str]:
    """Return the names that a target matches: of modules, a shared one by its first; else of parameters."""
    if isinstance(target, str):
        return sites.by_end.get(target) or sites.parameters_by_end.get(target, [])
    modules = {sites.first_name(site) for site in sites.values() if _matches(target, site.name, site.bare)}
    return list(modules) or [
        site.name
        for site in sites.parameters()
        if _matches(target, site.name, own_parameters(site.bare)[site.parameter or ""])
    ]


def is_matrix_of_experts(site: Site) -> bool:
    """Return whether a parameter is a stack of linear layers, one for each expert of its module.

    The module says so itself, by a count of experts equal to the parameter's first dimension.
    """
    parameter = own_parameters(site.bare).get(site.parameter or "")
    if parameter is None or parameter.dim() != 3 or not parameter.is_floating_point():
        return False
    counts = {
        value for name, value in vars(site.bare).items() if "experts" in name and isinstance(value, int)
    }
    return len(parameter) in counts


def linear_parameters(sites: Sites) -> list[str]:
    """Return the parameters that are linear layers though no module of that kind holds them.

    Fused experts, a matrix each, and the input projections of `nn.MultiheadAttention`.
    """
    return [
        site.name
        for site in sites.parameters()
        if is_matrix_of_experts(site)
        or (isinstance(site.bare, nn.MultiheadAttention) and (site.parameter or "").endswith("proj_weight"))
    ]


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the task heads of a transformers model: children beside the backbone that own parameters.

    The output embedding of a language model is left out: it was pretrained with the backbone, so nobody
    is surprised to find it frozen. A model without `base_model_prefix` has no head that could be known.
    """
    backbone = getattr(model, "base_model_prefix", None)
    children = dict(model.named_children())
    if not isinstance(backbone, str) or backbone not in children:
        return {}
    pretrained = {id(p) for p in children[backbone].parameters()}
    if (output := output_embedding(model)) is not None:
        pretrained |= {id(p) for p in output.parameters()}
    return {
        name: child
        for name, child in children.items()
        if name != backbone and any(id(p) not in pretrained for p in child.parameters())
    }


def output_embedding(model: nn.Module) -> nn.Module | None:
    """Return the module that transformers calls the model's output embedding, or None."""
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    return output if isinstance(output, nn.Module) else None


def choices(sites: Sites, limit: int = 20) -> str:
    """Return a table of what "all-linear" could reach, layers of a stack on one line."""
    if linear_shape(sites.model):
        kind = type(sites.model).__name__
        return (
            f"The model is itself a {kind}, and a site is a module inside a model: "
            'model = nn.Sequential(layer), and "0" as the target'
        )
    groups: Counter[tuple[str, str]] = Counter()
    of_peft = [name for name, site in sites.items() if is_of_peft(site.bare)]
    for name, site in sites.items():
        if (shape := linear_shape(site.bare)) and outermost_of(name, of_peft) is None:
            kind = f"{type(site.bare).__name__} {shape.in_features} -> {shape.out_features}"
            groups[generic(name), kind] += 1
    for name in linear_parameters(sites):
        site = sites[name]
        parameter = own_parameters(site.bare)[site.parameter or ""]
        assert parameter is not None
        layout = layout_of(site.bare, site.parameter or "", parameter)
        each = "".join(f"{count} x " for count in layout.leading)
        kind = f"{type(site.bare).__name__} {each}{layout.inputs} -> {layout.outputs}"
        groups[generic(name), kind] += 1
    if not groups:
        return f"This model has no {'other ' if of_peft else ''}linear layers."
    width = max(len(name) for name, _ in list(groups)[:limit])
    lines = [f"    {name:<{width}}  {kind}  x{n}" for (name, kind), n in list(groups.items())[:limit]]
    if len(groups) > limit:
        lines.append(f"    ... and {len(groups) - limit} more")
    return "\n".join(["To choose from, the linear layers of this model (* is any index):", *lines])


def linear_names_within(sites: Sites, outer: Iterable[str]) -> list[str]:
    """Return the linear layers inside some sites, as targets that a user could write instead."""
    return sorted(
        {
            f"{name.rsplit('.', 1)[-1]}.{inner}"
            for name in outer
            if name in sites and sites[name].parameter is None
            for inner, site in Sites(sites[name].bare).items()
            if linear_shape(site.bare) and not any(is_of_peft(m) for m in sites[name].bare.modules())
        }
    )


def as_list(targets: Targets) -> list[Target]:
    """Return the targets as a list, whether one was given or several."""
    if isinstance(targets, (str, re.Pattern)) or not isinstance(targets, Iterable):
        return [targets]
    return list(targets)


def _matches(target: re.Pattern[str] | Callable[[str, Any], bool], name: str, value: Any) -> bool:
    if isinstance(target, re.Pattern):
        return target.fullmatch(name) is not None
    return bool(target(name, value))


def _all_linear(sites: Sites, left_alone: Iterable[str]) -> list[str]:
    spared = {*left_alone, *sites.trained_in_full(), *head_modules(sites.model)}
    output = output_embedding(sites.model)
    modules = (
        sites.first_name(site)
        for site in sites.values()
        if linear_shape(site.bare)
        and site.outermost is not output
        and outermost_of(site.name, spared) is None
    )
    inside = (name for name in linear_parameters(sites) if outermost_of(name, spared) is None)
    return [*dict.fromkeys(modules), *inside]


def _shown(target: Target) -> str:
    if isinstance(target, re.Pattern):
        return f"re.compile({target.pattern!r})"
    return repr(target) if isinstance(target, str) else getattr(target, "__name__", repr(target))


def _hint(target: Target, sites: Sites, matrices: bool) -> str:
    """Return what the user may have meant, for a target that matches nothing."""
    if isinstance(target, re.Pattern):
        return " in full (a pattern must match the whole dotted name; begin it with '.*')"
    if not isinstance(target, str):
        return ""
    if target == ALL_LINEAR:
        some = any(linear_shape(site.bare) for site in sites.values())
        return (
            ": every linear layer is trained in full, as `trainable` says, or is the output head, which must "
            "be named itself"
            if some
            else ""
        )
    if target.lower().replace("_", "-").replace(" ", "-") in (ALL_LINEAR, "all", "linear", "all-linears"):
        return f"; did you mean {ALL_LINEAR!r}?"
    if re.search(r"[*+?\[\]()|^$\\]", target):
        return "; a string is a name, not a pattern: did you mean re.compile(...)?"
    own = {name: own_parameters(site.bare).values() for name, site in sites.items()}
    holding = [name for name in own if matrices and any(p is not None and p.dim() > 1 for p in own[name])]
    names = (holding, sites, [site.name for site in sites.parameters()])
    return next(filter(None, (_nearest(target, each) for each in names)), "")


def _nearest(target: str, names: Iterable[str]) -> str:
    counts = suffix_counts(names)
    near = ", ".join(f"{name!r} (x{counts[name]})" for name in nearest(target, counts))
    return f"; nearest: {near}" if near else ""
