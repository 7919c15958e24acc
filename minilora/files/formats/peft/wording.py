"""How a PEFT config says what stands where: short names where they do, patterns for what is not common."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ....config import RowsConfig
from ....names import ends, natural
from ....sites import Sites
from ...contents import Contents
from .places import Place
from .placing import Configs
from .task import auto_mapping
from .tokens import indices_of
from .versions import WRITTEN_AS


def worded(
    contents: Contents,
    places: list[Place],
    configs: Configs,
    sites: Sites | None,
    *,
    bias: str,
    heads: Iterable[str],
    rows: Mapping[str, RowsConfig],
) -> dict[str, Any]:
    """Return the JSON of `adapter_config.json`, without a task.

    Args:
        contents: what is written.
        places: where LoRA is.
        configs: its configs, by site.
        sites: of the model, or None.
        bias: which biases are trained, by PEFT's word.
        heads: modules trained in full.
        rows: trained, by site.
    """
    said = {place.target: configs[place.site] for place in places if place.kind != "attention output"}
    ranks = {target: config.r for target, config in said.items()}
    alphas = {target: _integral(config.alpha) for target, config in said.items()}
    modules = {place.target for place in places if place.kind not in ("attention output", "parameter")}
    parameters = sorted((p.target for p in places if p.kind == "parameter"), key=natural)
    transposed = contents.base.transposed if contents.base else frozenset()
    linear = {place.site for place in places if place.kind == "linear"}
    first, inits = next(iter(configs.values())), {config.init for config in configs.values()}
    name = getattr(sites.model, "name_or_path", None) if sites is not None else None
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": auto_mapping(sites.model) if sites is not None else None,
        "base_model_name_or_path": name if isinstance(name, str) and name else None,
        "inference_mode": True,
        "revision": None,
        "r": _most_common(ranks),
        "lora_alpha": _most_common(alphas),
        "lora_dropout": max(config.dropout for config in configs.values()),
        "use_rslora": first.rslora,
        "use_dora": first.dora,
        # How A and B began changes nothing any more; and PEFT takes no other word beside a bias of B.
        "init_lora_weights": "gaussian" if inits == {"gaussian"} and not first.lora_bias else True,
        "bias": bias,
        "lora_bias": first.lora_bias,
        "fan_in_fan_out": bool(transposed & linear),
        "target_modules": _target_names(modules, sites),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": _patterns(ranks),
        "alpha_pattern": _patterns(alphas),
        "modules_to_save": list(heads) or None,
    }
    if rows:
        config["trainable_token_indices"] = indices_of(rows)
    if parameters:
        config["target_parameters"] = parameters
    if any(place.kind in ("parameter", "attention output") for place in places):
        config["peft_version"] = WRITTEN_AS  # whose layout it is; other versions' differ there
    return config


def _target_names(adapted: set[str], sites: Sites | None) -> list[str] | str:
    """Return targets that match the adapted sites and, among the model's modules, nothing else."""
    if sites is None:
        return sorted(adapted, key=natural)
    names = [site.name for site in sites.unique()]
    chosen = set(_shortest(adapted, names).values())
    if any(name not in adapted and not chosen.isdisjoint(ends(name)) for name in names):
        # A full name is the end of a longer one: only an expression, matched in full, tells them apart.
        return "|".join(re.escape(site) for site in sorted(adapted, key=natural))
    return sorted(chosen, key=natural)


def _patterns(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return PEFT's pattern of the values that are not the most common one."""
    common = _most_common(values)
    sites: dict[Any, list[str]] = {}
    for site, value in values.items():
        if value != common:
            sites.setdefault(value, []).append(site)
    counts = _end_counts(values)
    pattern = {}
    for value, names in sites.items():
        shortest = _shortest(names, counts)
        for site in sorted(names, key=natural):
            end = shortest[site]
            pattern[f"^{re.escape(site)}" if end == site else re.escape(end)] = value
    return pattern


def _shortest(chosen: Iterable[str], names: Iterable[str] | Counter[str]) -> dict[str, str]:
    """Return, for each chosen name, the shortest end of it, free of indices, that only chosen ones have.

    Or the full name, where there is none.
    """
    counts, of_chosen = names if isinstance(names, Counter) else _end_counts(names), _end_counts(chosen)
    found: dict[str, str] = {}
    for name in chosen:
        found[name] = name
        for end in reversed(list(ends(name))):
            if end.partition(".")[0].isdigit():
                break
            if counts[end] == of_chosen[end]:
                found[name] = end
                break
    return found


def _end_counts(names: Iterable[str]) -> Counter[str]:
    return Counter(end for name in names for end in ends(name))


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _integral(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha
