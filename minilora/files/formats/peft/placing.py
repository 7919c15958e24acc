"""From the sites of a model to their places in PEFT: the way that `resolve` takes back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import nn

from ....config import LoRAConfig
from ....linear import linear_shape
from ....names import described
from ....problems import Problems
from ....sites import Site, Sites
from ....torch_internals import AttentionOutput, own_parameters
from .computes import difference, kind_of
from .packing import Packing
from .places import WITHOUT_DROPOUT, Place
from .resolve import parameter_packing

Configs = Mapping[str, LoRAConfig]


def placed(configs: Configs, layers: Mapping[str, str], sites: Sites | None) -> tuple[list[Place], list[str]]:
    """Return the place of each site in a PEFT model, and where PEFT has none that computes the same.

    Args:
        configs: LoRA sites and their configs.
        layers: the sites that are known to be no linear layers, with the names of their classes.
        sites: of the model; None goes by names alone, which do for linear layers.
    """
    if sites is None:
        problems = []
        if layers:
            problems.append(
                f"{described(layers)}: how PEFT lays out LoRA on {', '.join(sorted(set(layers.values())))} "
                "depends on the model: load it into the model, then minilora.save(model, folder, "
                'format="peft")'
            )
        return [Place(site, site, site) for site in configs], problems
    places: list[Place] = []
    misfits = Problems()
    for name, config in configs.items():
        try:
            place = _place(sites[name], configs, sites)
            if config.dropout and place.kind in WITHOUT_DROPOUT:
                raise ValueError("PEFT applies no dropout there; set dropout=0")
            places.append(place)
        except ValueError as error:
            misfits.add(name, str(error))
    return places, misfits.lines() + list(_conflicts(places, configs, sites))


def as_read(places: list[Place], configs: Configs) -> dict[str, LoRAConfig]:
    """Return the configs as PEFT's files give them back: with twice the alpha where B A is added twice."""
    inputs = {place.module: configs[place.site] for place in places if place.kind == "attention input"}
    return {
        place.site: (
            LoRAConfig.from_dict(
                {**configs[place.site].to_dict(), "alpha": 2 * inputs[_attention(place)].alpha}
            )
            if place.kind == "attention output"
            else configs[place.site]
        )
        for place in places
    }


def _place(site: Site, configs: Configs, sites: Sites) -> Place:
    """Return the place of a site.

    Raises:
        ValueError: saying why there is none.
    """
    owner, bare = site.owner, site.bare
    if site.parameter == "in_proj_weight" and isinstance(bare, nn.MultiheadAttention):
        if f"{owner}.out_proj" in configs:
            return Place(site.name, owner, owner, "attention input")
    elif site.parameter is None and isinstance(bare, AttentionOutput):
        attention = owner.rpartition(".")[0]
        given = configs.get(f"{attention}.in_proj_weight")
        if given is None or not isinstance(sites[attention].bare, nn.MultiheadAttention):
            raise ValueError(str(difference(bare)))
        return Place(owner, owner, owner, "attention output", packing=_twice(given, configs[site.name]))
    elif site.parameter is None and difference(bare) is None and kind_of(bare) != "attention input":
        kind = kind_of(bare)
        kernel = tuple(bare.kernel_size) if kind == "convolution" else ()  # type: ignore[arg-type]
        return Place(owner, owner, owner, kind, packing=Packing(kernel=kernel))
    leaf = site.parameter or "weight"
    parameter = own_parameters(bare).get(leaf)
    if parameter is None:
        raise ValueError(difference(bare) or f"it has no {leaf!r} of its own")
    try:
        packing = parameter_packing(bare, leaf, parameter)
    except ValueError as error:
        raise ValueError((difference(bare) if leaf == "weight" else None) or str(error)) from error
    names = [name for name in own_parameters(bare) if _name(owner, name) in configs]
    depth = len(names) - 1 - names.index(leaf)
    return Place(site.name, f"{owner}.{leaf}", owner, "parameter", depth, packing)


def _name(owner: str, leaf: str) -> str:
    return owner if leaf == "weight" else f"{owner}.{leaf}"


def _attention(place: Place) -> str:
    return place.module.rpartition(".")[0]


def _twice(inputs: LoRAConfig, output: LoRAConfig) -> Packing:
    """Return the layout at attention's out_proj, where PEFT takes the config of in_proj and adds B A twice.

    Raises:
        ValueError: when no power of two, which loses no bit, makes up for that.
    """
    if (inputs.r, inputs.rslora) != (output.r, output.rslora):
        raise ValueError(
            "PEFT gives in_proj_weight and out_proj of one attention one rank and one kind of scale"
        )
    factor = output.scaling / (2 * inputs.scaling) if inputs.scaling else 1.0
    if abs(math.frexp(factor)[0]) != 0.5 or (not inputs.scaling and output.scaling):
        raise ValueError(
            "PEFT gives in_proj_weight and out_proj of one attention one alpha; here their ratio is no power "
            "of two, and B cannot make up for it without rounding"
        )
    return Packing(factor=factor)


def _conflicts(places: list[Place], configs: Configs, sites: Sites) -> Iterator[str]:
    """Yield where PEFT refuses several sites together that it takes alone."""
    parameters = [place for place in places if place.kind == "parameter"]
    if not parameters:
        return
    modules = {place.module for place in places if place.kind != "parameter"}
    if both := [place.site for place in parameters if place.module in modules]:
        yield f"{described(both)}: PEFT cannot adapt a parameter of a module that it adapts itself"
    names = described([place.site for place in parameters])
    if any(config.dropout for config in configs.values()):
        yield f"{names}: PEFT has no LoRA on parameters beside dropout anywhere; set dropout=0"
    if any(is_conv1d(place, sites) for place in places):
        yield f"{names}: PEFT has no LoRA on parameters beside LoRA on transformers' Conv1D"


def is_conv1d(place: Place, sites: Sites) -> bool:
    """Return whether a place is a linear layer whose weight is stored as (in, out)."""
    shape = linear_shape(sites[place.module].bare) if place.kind == "linear" else None
    return shape is not None and shape.transposed
