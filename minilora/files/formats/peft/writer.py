"""From an adapter to a PEFT folder, which is read back, by PEFT's own rules, before anything is written."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ....config import LoRAConfig
from ....errors import CheckpointError, several
from ....manifest import Manifest
from ....names import above, described, ends, natural
from ....sites import Sites
from ...atomic import new_folder, write_together, write_whole
from ...contents import Contents
from ...tensors import Entry, chunks_of, entries_of
from .. import native
from .card import CARD_FILE, may_be_replaced, model_card
from .config import CONFIG_FILE, PeftLoraConfig
from .matching import Expressions, LooseEnds, around_left_out, expression_problem, inner_parts
from .reader import MEANING_KEY, TENSOR_FILE, announced, peft_name
from .task import auto_mapping, task_of

Configs = Mapping[str, LoRAConfig]


def write(path: Path, contents: Contents, sites: Sites | None = None) -> None:
    """Write a folder that PEFT and vLLM load. Inverse: `reading`.

    Args:
        path: of the folder. A new one appears whole or not at all; in one that exists, the files of the
            adapter are replaced and others stay.
        contents: LoRA sites and modules trained in full; PEFT has no bottleneck adapters.
        sites: of the model that carries them. They are needed for target names shorter than full ones, and to
            know that PEFT's patterns will match nothing else; None goes by the names alone.

    Raises:
        CheckpointError: listing what PEFT's format cannot express; nothing is written.
        OSError: when the folder cannot be written.
    """
    problems = list(_inexpressible(contents.manifest))
    if layers := (contents.base.layers if contents.base else {}):
        problems.append(
            f"{described(layers)}: PEFT's layout for LoRA on {', '.join(sorted(set(layers.values())))} is "
            "not written yet; save this model in minilora's own format"
        )
    if sites is not None and not problems:
        problems += _caught_otherwise(contents.manifest, sites)
    if problems:
        raise CheckpointError(several(problems, outcome="nothing has been written"))
    configs: Configs = {
        site: config
        for config, names in contents.manifest.injections
        for site in names
        if isinstance(config, LoRAConfig)
    }
    tensors = {**contents.tensors, **_frozen_but_caught(contents.manifest, sites)}
    adapted = set(configs)
    tensors = {peft_name(name, adapted): tensor for name, tensor in tensors.items()}
    config = _config(contents, configs, sites)
    if problems := _said_otherwise(path, config, tensors, configs, sites):
        raise CheckpointError(several(problems, outcome="nothing has been written"))
    if sites is not None and (task := task_of(sites.model)) is not None:
        with_task = {**config, "task_type": task, "auto_mapping": None}
        if not _said_otherwise(path, with_task, tensors, configs, sites):
            config = with_task  # else PEFT would take a frozen head for a trained one
    meaning = PeftLoraConfig.from_dict(config).meaning(configs)
    metadata = native.header(tensors, {MEANING_KEY: meaning}, contents.base)
    entries: dict[str, Entry] = entries_of(tensors)
    files: dict[str, Iterable[bytes | bytearray]] = {TENSOR_FILE: chunks_of(entries, metadata)}
    if may_be_replaced(path / CARD_FILE):
        files[CARD_FILE] = [model_card(config, contents.manifest).encode()]
    files[CONFIG_FILE] = [json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"]  # the last
    if path.is_dir():
        write_together(path, files)
    else:
        with new_folder(path) as folder:
            for name, chunks in files.items():
                write_whole(folder / name, chunks)


def _said_otherwise(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    configs: Configs,
    sites: Sites | None,
) -> list[str]:
    """Return where the files, read by PEFT's rules, would say something else than what is written."""
    try:
        read = announced(path, PeftLoraConfig.from_dict(config), entries_of(tensors), {})
    except CheckpointError as error:
        return [f"PEFT's format cannot express this adapter: {error}"]
    found = {
        site: dataclasses.replace(lora, dtype=None)
        for lora, names in read.manifest.injections
        for site in names
    }
    wrong = [
        site
        for site in found.keys() | configs.keys()
        if site not in found
        or site not in configs
        or found[site] != dataclasses.replace(configs[site], dtype=None)
    ]
    problems = read.disagreements(sites) if sites is not None else []
    if wrong:
        problems.append(
            f"{described(sorted(wrong, key=natural))}: PEFT's patterns would say something else of it"
        )
    return problems


def _inexpressible(manifest: Manifest) -> Iterator[str]:
    """Yield what PEFT's format has no words for."""
    configs = [config for config, _ in manifest.injections if isinstance(config, LoRAConfig)]
    for config, sites in manifest.injections:
        if not isinstance(config, LoRAConfig):
            yield (
                f"{described(sites)}: PEFT has no bottleneck adapters; save this model in minilora's "
                "own format"
            )
    if not configs:
        yield "PEFT needs at least one LoRA site"
    for name in manifest.trainable:
        if problem := expression_problem(name, around_left_out):
            yield f"{name!r}: PEFT takes it for an expression among modules_to_save, and as such it {problem}"
    for field in ("dropout", "rslora", "init"):
        if len(values := {getattr(config, field) for config in configs}) > 1:
            shown = ", ".join(sorted(map(repr, values)))
            yield f"{field}: PEFT has one value for all sites, and here are {shown}"


def _caught_otherwise(manifest: Manifest, sites: Sites) -> Iterator[str]:
    """Yield where PEFT, by its own rules of matching, would adapt other modules than these."""
    injected = {site for _, names in manifest.injections for site in names}
    heads = manifest.trainable
    if shared := sites.shared() & {*injected, *heads}:
        yield f"{described(sorted(shared))}: shared by several parents; PEFT would adapt the first alone"
    expressions = Expressions(heads, around_left_out, inner_parts)
    left_out: dict[str, list[str]] = {}
    for site in injected:
        if (index := expressions.first(site)) is not None:
            left_out.setdefault(heads[index], []).append(site)
    for head, names in left_out.items():
        yield f"{described(names)}: PEFT leaves it out, because {head!r} is trained in full"
    loose = LooseEnds(heads)
    caught = {name: [head for head in loose.of(name) if head != name] for name in sites}
    caught = {name: by for name, by in caught.items() if by}
    outer = {name for inner in (*injected, *heads, *caught) for name in above(inner)}
    found: dict[str, list[str]] = {}
    for name, by in caught.items():
        for head in by:
            if name in injected or name in outer or head in above(name):
                found.setdefault(head, []).append(name)
    for head, names in found.items():
        yield (f"{described(names)}: PEFT would train it in full along with {head!r}, whose end its name has")


def _frozen_but_caught(manifest: Manifest, sites: Sites | None) -> dict[str, Tensor]:
    """Return the state of modules that PEFT will take for trained ones, because of how their names end.

    "classifier" catches DistilBERT's "pre_classifier". PEFT finds the base's own values for it in the
    file, and computes the same.
    """
    heads, loose = set(manifest.trainable), LooseEnds(manifest.trainable)
    return {
        f"{name}.{key}": tensor
        for name, site in (sites or {}).items()
        if name not in heads and loose.of(name)
        for key, tensor in site.bare.state_dict().items()
    }


def _config(contents: Contents, configs: Configs, sites: Sites | None) -> dict[str, Any]:
    """Return the JSON of `adapter_config.json`, without a task."""
    ranks = {site: config.r for site, config in configs.items()}
    alphas = {site: _integral(config.alpha) for site, config in configs.items()}
    first = next(iter(configs.values()))
    transposed = contents.base.transposed if contents.base else frozenset()
    name = getattr(sites.model, "name_or_path", None) if sites is not None else None
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": auto_mapping(sites.model) if sites is not None else None,
        "base_model_name_or_path": name if isinstance(name, str) and name else None,
        "inference_mode": True,
        "revision": None,
        "r": _most_common(ranks),
        "lora_alpha": _most_common(alphas),
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "use_dora": False,
        "init_lora_weights": True if first.init == "kaiming" else first.init,
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": bool(transposed & set(configs)),
        "target_modules": _target_names(set(configs), sites),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": _patterns(ranks),
        "alpha_pattern": _patterns(alphas),
        "modules_to_save": list(contents.manifest.trainable) or None,
    }


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
