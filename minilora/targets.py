"""From what the user names to sites: targets, their nearest misses, and what there is to choose from."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from torch import nn

from .errors import listed
from .head import TrainableHead
from .linear import linear_shape
from .module import named_sites

Target: TypeAlias = "str | re.Pattern[str] | Callable[[str, nn.Module], bool]"
"""A full dotted name or a whole-segment suffix of one; a compiled pattern, matched in full; or a predicate
`(name, module) -> bool`. The string "all-linear" is a target of its own."""

Targets: TypeAlias = "Target | Iterable[Target]"

ALL_LINEAR = "all-linear"


def select(
    model: nn.Module, targets: Targets, *, argument: str, spared: Iterable[str] = ()
) -> tuple[dict[str, nn.Module], list[str]]:
    """Return the modules that the targets match, and every problem met on the way.

    Args:
        model: the model, injected or bare; names are those of the bare model.
        targets: one target or several.
        argument: what the user calls these targets, for the messages.
        spared: names of modules that "all-linear" leaves alone, with all that is in them.

    Returns:
        The bare modules by name, in the model's order, a shared one under its first name only; and a
        message for each target that is malformed or matches nothing.
    """
    named = [(name, chain[-1]) for name, chain in named_sites(model)]
    problems: list[str] = []
    matched: set[nn.Module] = set()
    for target in _as_list(targets):
        # A type or a module is callable, but not as a predicate.
        if isinstance(target, (type, nn.Module)) or not (
            isinstance(target, (str, re.Pattern)) or callable(target)
        ):
            problems.append(
                f"{argument}: {target!r} is a {type(target).__name__}; give a module's name, a compiled "
                "re.Pattern, or a callable (name, module) -> bool"
            )
            continue
        if target == ALL_LINEAR:
            found = _all_linear(model, named, spared)
        else:
            found = {module for name, module in named if _matches(target, name, module)}
        if not found:
            problems.append(f"{argument}: {_shown(target)} matches no module{_hint(target, named)}")
        matched |= found
    sites: dict[str, nn.Module] = {}
    for name, module in named:
        if module in matched:
            matched.remove(module)
            sites[name] = module
    return sites, problems


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the task heads of a transformers model: children beside the backbone that own parameters.

    The output embedding of a language model is left out: it was pretrained with the backbone, so nobody
    is surprised to find it frozen. A model without `base_model_prefix` has no head that could be known.
    """
    backbone = getattr(model, "base_model_prefix", None)
    if not isinstance(backbone, str) or backbone not in model._modules:
        return {}
    pretrained = {id(p) for p in getattr(model, backbone).parameters()}
    if (output := output_embedding(model)) is not None:
        pretrained |= {id(p) for p in output.parameters()}
    return {
        name: child
        for name, child in model.named_children()
        if name != backbone and any(id(p) not in pretrained for p in child.parameters())
    }


def output_embedding(model: nn.Module) -> nn.Module | None:
    """Return the module that transformers calls the model's output embedding, or None."""
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    return output if isinstance(output, nn.Module) else None


def choices(model: nn.Module, limit: int = 20) -> str:
    """Return a table of the model's linear layers, layers of a stack on one line."""
    groups: Counter[tuple[str, str]] = Counter()
    for name, chain in named_sites(model):
        if shape := linear_shape(chain[-1]):
            kind = f"{type(chain[-1]).__name__} {shape.in_features} -> {shape.out_features}"
            groups[generic_name(name), kind] += 1
    if not groups:
        return "This model has no linear layers."
    width = max(len(name) for name, _ in list(groups)[:limit])
    lines = [f"    {name:<{width}}  {kind}  x{n}" for (name, kind), n in list(groups.items())[:limit]]
    if len(groups) > limit:
        lines.append(f"    ... and {len(groups) - limit} more")
    return "\n".join(["To choose from, the linear layers of this model (* is any index):", *lines])


def generic_name(name: str) -> str:
    """Return a name with its indices as stars: `layer.3.query` -> `layer.*.query`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def linear_names_within(model: nn.Module, site: str) -> list[str]:
    """Return the linear layers inside a site, as targets that a user could write instead."""
    own = site.rsplit(".", 1)[-1]
    return [
        f"{own}.{name.removeprefix(site + '.')}"
        for name, chain in named_sites(model)
        if name.startswith(site + ".") and linear_shape(chain[-1])
    ]


def _as_list(targets: Targets) -> list[Target]:
    if isinstance(targets, (str, re.Pattern)) or not isinstance(targets, Iterable):
        return [targets]
    return list(targets)


def _matches(target: Target, name: str, module: nn.Module) -> bool:
    if isinstance(target, str):
        return name == target or name.endswith("." + target)
    if isinstance(target, re.Pattern):
        return target.fullmatch(name) is not None
    return bool(target(name, module))


def _all_linear(
    model: nn.Module, named: list[tuple[str, nn.Module]], spared: Iterable[str]
) -> set[nn.Module]:
    heads = {name for name, chain in named_sites(model) if isinstance(chain[0], TrainableHead)}
    left_alone = {*spared, *heads, *head_modules(model)}
    output = output_embedding(model)
    return {
        module
        for name, module in named
        if linear_shape(module)
        and module is not output
        and not any(name == spare or name.startswith(spare + ".") for spare in left_alone)
    }


def _shown(target: Target) -> str:
    if isinstance(target, re.Pattern):
        return f"re.compile({target.pattern!r})"
    return repr(target) if isinstance(target, str) else getattr(target, "__name__", repr(target))


def _hint(target: Target, named: list[tuple[str, nn.Module]]) -> str:
    """Return what the user may have meant, for a target that matches nothing."""
    if isinstance(target, re.Pattern):
        return " in full (a pattern must match the whole dotted name; begin it with '.*')"
    if not isinstance(target, str) or target == ALL_LINEAR:
        return ""
    counts = _suffix_counts(name for name, _ in named)
    near = difflib.get_close_matches(target, counts, n=3, cutoff=0.6)
    # A part of a name is the other usual slip: "attention.q" for "attention.self.query".
    near += [s for s in counts if target in s and s not in near and s.count(".") == target.count(".")][
        : 3 - len(near)
    ]
    if re.search(r"[*+?\[\]()|^$\\]", target):
        return "; a string is a name, not a pattern: did you mean re.compile(...)?"
    return f"; nearest: {', '.join(f'{name!r} (x{counts[name]})' for name in near)}" if near else ""


def _suffix_counts(names: Iterable[str]) -> Mapping[str, int]:
    """Return how often each suffix of up to three segments occurs, but for those that begin with an index."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for length in range(1, min(3, len(parts)) + 1):
            if not parts[-length].isdigit():
                counts[".".join(parts[-length:])] += 1
    return counts


def describe_sites(sites: Iterable[str]) -> str:
    """Return sites for a message, those that differ in their indices only as one: `'layer.*.query' (x12)`."""
    groups: dict[str, list[str]] = {}
    for site in sites:
        groups.setdefault(generic_name(site), []).append(site)
    shown = [
        repr(g) + f" (x{len(names)})" if len(names) > 1 else repr(names[0]) for g, names in groups.items()
    ]
    return listed(shown)
