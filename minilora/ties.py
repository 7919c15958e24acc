"""Ties: a weight that several modules share, as an embedding and an output layer do.

A trained copy stands at one module and would loosen the tie. Rows that are trained stand at all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .config import Config, RowsConfig
from .errors import quoted
from .sites import Site, Sites
from .torch_internals import own_parameters


def copy_problem(site: Site, sites: Sites) -> str | None:
    """Return why a trained copy of a module or parameter would loosen a tie to another module, or None."""
    if site.parameter is not None:
        outside = [name for name in sites.owners(site) if name != site.name]
        what, instead = "parameter that is", "Untie"
    else:
        inside = set(site.bare.modules())
        outside = sorted(
            {name for p in site.bare.parameters() for name, m in sites.owners_of(p) if m not in inside}
        )
        weight = own_parameters(site.bare).get("weight")
        a_matrix = weight is not None and weight.dim() > 1
        what = "module whose weight is"
        instead = "Give it as a target for LoRA instead, or untie" if a_matrix else "Untie"
    if not outside:
        return None
    return (
        f"trainable names a {what} tied to {quoted(outside)}; a trained copy would untie them. {instead} the "
        "weights first"
    )


def at_all_owners(config: Config, site: Site, sites: Sites) -> dict[str, Config]:
    """Return what a config comes to, by name: rows stand at every module that owns their weight.

    The first of them has the rows, and the others are `of` it. Any other config is for its site alone.
    """
    weight = f"{site.owner}.{site.parameter or 'weight'}"
    if not isinstance(config, RowsConfig) or config.of or weight not in sites:
        return {site.name: config}
    first, *others = (name.removesuffix(".weight") for name in sites.owners(sites[weight]))
    return {first: replace(config, of=None), **{other: replace(config, of=first) for other in others}}


def rows_problem(
    config: Config, site: Site, sites: Sites, placed: Mapping[tuple[str, str], Config | None]
) -> str | None:
    """Return that a weight is shared in another way than a manifest has its rows placed, or None."""
    if not isinstance(config, RowsConfig):
        return None
    wanted = at_all_owners(replace(config, of=None), site, sites)
    if all(placed.get((name, config.kind)) == each for name, each in wanted.items()):
        return None
    return (
        f"rows are the same at all modules that share a weight, here {quoted([*wanted])}: tie or untie the "
        "weights as they were in training, or give the same rows"
    )
