"""PEFT's LoRA folders, read and written without PEFT.

    adapter_config.json         settings, and patterns that say which modules they concern
    adapter_model.safetensors   base_model.model.<site>.lora_A.weight   (r, in)
                                base_model.model.<site>.lora_B.weight   (out, r)
                                base_model.model.<module>.weight, ...   of modules trained in full

PEFT applies the patterns and takes what tensors it finds; here the tensors say what the sites are, and the
patterns must say the same. Nothing of minilora's own goes into the config, where PEFT warns of strangers,
and the base's fingerprint and a checksum go into the tensors' header, which PEFT and vLLM do not read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import LoRAConfig
from ...errors import CheckpointError, MiniLoRAError, listed, quoted, several
from ...names import described, natural
from ...plan import Manifest, grouped
from ...sites import Sites
from ..atomic import new_folder, write_whole
from ..contents import Contents
from ..fingerprint import Fingerprint
from ..tensors import entries_of, read_json, read_tensors, write_tensors
from .native import DIGEST_KEY, base_of, damage, header
from .peft_config import PeftLoraConfig

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."

# What other endings of a key give away, the first that fits.
FOREIGN_KEYS = (
    (r"\.lora_embedding_[AB]$", "LoRA on an embedding is not supported yet"),
    (r"\.lora_magnitude_vector(\.weight)?$", "DoRA is not supported yet"),
    (r"\.lora_B\.bias$", "a bias beside lora_B is not part of minilora's LoRA"),
    (r"\.lora_[AB]\..+\.weight$", "the key carries an adapter's name, which PEFT leaves out when it saves"),
    (
        r"\.bias$",
        "a trained bias of the base, which minilora does not write to (bias='all' or 'lora_only' in the "
        "config): merge the adapter with PEFT, or train it with bias='none'",
    ),
    (r"embed", "a whole embedding was saved (was the vocabulary resized?): minilora does not replace it"),
)


def read(path: Path) -> Contents:
    """Return what a PEFT folder holds. Inverse: `write`.

    The modules' own names are all that is known of the model; `Contents.disagreements` checks the rest.

    Raises:
        CheckpointError: listing every field and tensor that is unsound or cannot be honoured.
        OSError: when there is no such folder, or its files cannot be read.
    """
    config = _read_config(path)
    metadata, stored = read_tensors(path / TENSOR_FILE)
    updates, heads, problems = _sorted_out(stored, config)
    placed, more = _configs(updates, config)
    if problems := problems + more:
        outcome = f"{str(path)!r} was not read"
        raise CheckpointError(several(problems, outcome=outcome))
    tensors = {
        f"{site}.lora_{side}": tensor for site, pair in updates.items() for side, tensor in pair.items()
    }
    for module, state in heads.items():
        tensors |= {f"{module}.{name}": tensor for name, tensor in state.items()}
    manifest = Manifest(grouped((placed[site], site) for site in sorted(placed, key=natural)), tuple(heads))
    loose = [
        module
        for module in heads
        if not any(module == e or module.endswith("." + e) for e in config.modules_to_save)
    ]
    notes = [
        f"modules_to_save of {str(path)!r} is {list(config.modules_to_save)}; by PEFT's rule, the end of any "
        f"name, that trains {quoted(loose)} in full as well. Write full names there to exclude such catches"
    ]
    return Contents(
        manifest,
        tensors,
        base=base_of(metadata) or _layout_only(config, updates),
        disagreements=lambda sites: _disagreements(config, set(updates), set(heads), sites),
        damage=damage(stored, metadata) if DIGEST_KEY in metadata else None,
        notes=tuple(notes if loose else ()),
    )


def write(path: Path, contents: Contents, sites: Sites | None = None) -> None:
    """Write a folder that PEFT and vLLM load. Inverse: `read`.

    Args:
        path: of the folder. A new one appears whole or not at all; in one that exists, the two files are
            replaced and others stay.
        contents: LoRA sites and modules trained in full; PEFT has no bottleneck adapters.
        sites: of the model that carries them. They are needed for target names shorter than full ones, and to
            know that PEFT's patterns will match nothing else; None goes by the names alone.

    Raises:
        CheckpointError: listing what PEFT's format cannot express; nothing is written.
        OSError: when the folder cannot be written.
    """
    problems = list(_inexpressible(contents.manifest))
    if sites is not None and not problems:
        problems += _caught_otherwise(contents.manifest, sites)
    if problems:
        raise CheckpointError(several(problems, outcome="nothing has been written"))
    names = [site.name for site in sites.unique()] if sites is not None else None
    config = _config(contents, names)
    config["base_model_name_or_path"] = getattr(sites and sites.model, "name_or_path", None) or None
    tensors = {**contents.tensors, **_frozen_but_caught(contents.manifest, sites)}
    updates = {
        f"{site}.lora_{side}"
        for _, targets in contents.manifest.injections
        for site in targets
        for side in "AB"
    }
    tensors = {
        f"{PREFIX}{key}.weight" if key in updates else PREFIX + key: tensor for key, tensor in tensors.items()
    }
    text = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
    metadata = header(tensors, {}, contents.base)
    if path.is_dir() and any(path.iterdir()):
        (path / CONFIG_FILE).unlink(missing_ok=True)  # without it, no reader takes the tensors for anything
        write_tensors(path / TENSOR_FILE, entries_of(tensors), metadata)
        write_whole(path / CONFIG_FILE, [text])
    else:
        with new_folder(path) as folder:
            write_tensors(folder / TENSOR_FILE, entries_of(tensors), metadata)
            write_whole(folder / CONFIG_FILE, [text])


def _read_config(path: Path) -> PeftLoraConfig:
    if not path.is_dir():
        path.stat()  # FileNotFoundError where there is nothing at all
        raise CheckpointError(
            f"{str(path)!r} is a file; a PEFT adapter is the folder with {CONFIG_FILE!r} in it"
        )
    present = sorted(file.name for file in path.iterdir())
    if CONFIG_FILE not in present:
        raise CheckpointError(
            f"{str(path)!r} has no {CONFIG_FILE!r}, so it is no PEFT adapter: {listed(present)}"
        )
    try:
        config = PeftLoraConfig.from_dict(read_json(path / CONFIG_FILE))
    except CheckpointError as error:
        raise CheckpointError(f"{str(path / CONFIG_FILE)!r} cannot be honoured: {error}") from error
    if TENSOR_FILE not in present and PICKLE_FILE in present:
        raise CheckpointError(
            f"{str(path)!r} has its tensors as a pickle ({PICKLE_FILE!r}), which can run code when read "
            "and is never opened here. If you trust it: safetensors.torch.save_file(torch.load("
            f"{PICKLE_FILE!r}, weights_only=True), {TENSOR_FILE!r})"
        )
    if TENSOR_FILE not in present:
        raise CheckpointError(f"{str(path)!r} has no {TENSOR_FILE!r}")
    return config


def _sorted_out(
    stored: Mapping[str, Tensor], config: PeftLoraConfig
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]], list[str]]:
    """Return the pairs of A and B by site, the state of modules trained in full by module, and problems."""
    updates: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    strangers: dict[str, list[str]] = {}
    for key, tensor in sorted(stored.items(), key=lambda item: natural(item[0])):
        name = key.removeprefix(PREFIX)
        pair = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if name == key:
            strangers.setdefault(f"the key does not begin with {PREFIX!r}", []).append(key)
        elif module := next((m for m in _modules_above(name) if config.saves(m)), None):
            heads.setdefault(module, {})[name.removeprefix(module + ".")] = tensor
        elif pair and not re.search(r"(^|\.)base_layer\.", name):
            updates.setdefault(pair[1], {})[pair[2]] = tensor
        else:
            reason = next(
                (why for pattern, why in FOREIGN_KEYS if re.search(pattern, name)),
                "neither LoRA nor part of a module that modules_to_save names",
            )
            strangers.setdefault(reason, []).append(key)
    problems = [f"{quoted(keys)}: {reason}" for reason, keys in strangers.items()]
    for site, tensors in updates.items():
        if missing := {"A", "B"} - set(tensors):
            problems.append(f"{site!r} has no lora_{missing.pop()}")
        elif not tensors["A"].ndim == tensors["B"].ndim == 2:
            problems.append(
                f"{site!r}: A has {tensors['A'].ndim} dimensions; convolutions are not supported yet"
            )
        elif tensors["A"].shape[0] != tensors["B"].shape[1]:
            shapes = f"{tuple(tensors['A'].shape)} and {tuple(tensors['B'].shape)}"
            problems.append(f"{site!r}: A and B, {shapes}, have no rank in common")
    if not updates:
        problems.append("there is no LoRA tensor in it")
    return updates, heads, problems


def _modules_above(key: str) -> Iterator[str]:
    """Yield the modules that a tensor's key lies in, the outermost first."""
    parts = key.split(".")
    yield from (".".join(parts[:i]) for i in range(1, len(parts)))


def _configs(
    updates: Mapping[str, Mapping[str, Tensor]], config: PeftLoraConfig
) -> tuple[dict[str, LoRAConfig], list[str]]:
    """Return the config at each site, and where the file's patterns and tensors contradict each other."""
    placed: dict[str, LoRAConfig] = {}
    problems: dict[str, list[str]] = {}
    for site, tensors in updates.items():
        if not config.names_all_linear() and not config.matches(site):
            problems.setdefault("it has tensors, but the config does not target it", []).append(site)
        r, ranks = config.rank_of(site), {tensors["A"].shape[0]} if "A" in tensors else set()
        if ranks - {r}:
            text = f"the config gives it rank {r}, its tensors have rank {ranks.pop()}"
            problems.setdefault(text, []).append(site)
            continue
        wide = any(tensor.dtype == torch.float64 for tensor in tensors.values())
        try:
            placed[site] = LoRAConfig(
                r=r,
                alpha=config.alpha_of(site),
                dropout=config.lora_dropout,
                rslora=config.use_rslora,
                init=config.init,  # type: ignore[arg-type]
                dtype=torch.float64 if wide else None,
            )
        except MiniLoRAError as error:
            problems.setdefault(str(error), []).append(site)
    return placed, [f"{described(sites)}: {text}" for text, sites in problems.items()]


def _layout_only(config: PeftLoraConfig, updates: Iterable[str]) -> Fingerprint:
    """Return what the config tells of the base: whether its weights are stored transposed."""
    return Fingerprint(transposed=frozenset(updates if config.fan_in_fan_out else ()))


def _disagreements(config: PeftLoraConfig, updates: set[str], heads: set[str], sites: Sites) -> list[str]:
    """Return where the config's patterns, applied to a model, say something else than the tensors do."""
    targeted, saved = config.sites(sites), config.saved_modules(sites)
    inner = {m for m in saved if any(m.startswith(outer + ".") for outer in saved)}
    found = {
        "targeted by the config on this model, but without tensors in the file": targeted - updates,
        "with tensors in the file, but not targeted by the config on this model": (updates & set(sites))
        - targeted,
        "caught by modules_to_save on this model, but without tensors in the file": saved - inner - heads,
        "caught by modules_to_save inside a module that it catches too": inner,
        "shared by several parents, where PEFT adapts the first alone": (updates | heads) & sites.shared(),
    }
    return [f"{described(sorted(names, key=natural))}: {text}" for text, names in found.items() if names]


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
    for field in ("dropout", "rslora", "init"):
        if len(values := {getattr(config, field) for config in configs}) > 1:
            shown = ", ".join(sorted(map(repr, values)))
            yield f"{field}: PEFT has one value for all sites, and here are {shown}"


def _caught_otherwise(manifest: Manifest, sites: Sites) -> Iterator[str]:
    """Yield where PEFT, by its own rules of matching, would adapt other modules than these."""
    injected = [site for _, names in manifest.injections for site in names]
    if shared := sites.shared() & {*injected, *manifest.trainable}:
        yield f"{described(sorted(shared))}: shared by several parents; PEFT would adapt the first alone"
    for name in manifest.trainable:
        left_out = [site for site in injected if re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", site)]
        if left_out:
            yield f"{described(left_out)}: PEFT leaves it out, because {name!r} is trained in full"
        caught = [other for other in sites if other.endswith(name) and other != name]
        for other in caught:
            within = [s for s in (*injected, *caught, name) if s != other and s.startswith(f"{other}.")]
            if other in injected or other.startswith(f"{name}.") or within:
                yield f"{other!r}: PEFT would train it in full along with {name!r}, whose end its name has"


def _frozen_but_caught(manifest: Manifest, sites: Sites | None) -> dict[str, Tensor]:
    """Return the state of modules that PEFT will take for trained ones, because of how their names end.

    "classifier" catches DistilBERT's "pre_classifier". PEFT finds the base's own values for it in the
    file, and computes the same.
    """
    if sites is None:
        return {}
    return {
        f"{name}.{key}": tensor
        for name, site in sites.items()
        if name not in manifest.trainable and any(name.endswith(module) for module in manifest.trainable)
        for key, tensor in site.bare.state_dict().items()
    }


def _config(contents: Contents, names: list[str] | None) -> dict[str, Any]:
    """Return the JSON of `adapter_config.json`; `names` are those of all the model's modules."""
    placed = {
        site: config
        for config, sites in contents.manifest.injections
        for site in sites
        if isinstance(config, LoRAConfig)
    }
    ranks = {site: config.r for site, config in placed.items()}
    alphas = {site: _integral(config.alpha) for site, config in placed.items()}
    first = next(iter(placed.values()))
    transposed = contents.base.transposed if contents.base else frozenset()
    return {
        "peft_type": "LORA",
        "task_type": None,
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
        "fan_in_fan_out": bool(transposed & set(placed)),
        "target_modules": _target_names(set(placed), names),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": _patterns(ranks),
        "alpha_pattern": _patterns(alphas),
        "modules_to_save": list(contents.manifest.trainable) or None,
    }


def _target_names(sites: set[str], names: list[str] | None) -> list[str] | str:
    """Return targets that match the sites and, among the names, nothing else."""
    if names is None:
        return sorted(sites, key=natural)
    chosen = {_shortest(site, sites, names) for site in sites}
    if any(name not in sites and _ends_with(name, target) for target in chosen for name in names):
        # A full name is the end of a longer one: only an expression, matched in full, tells them apart.
        return "|".join(re.escape(site) for site in sorted(sites, key=natural))
    return sorted(chosen, key=natural)


def _patterns(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return PEFT's pattern of the values that are not the most common one."""
    common = _most_common(values)
    pattern = {}
    for value in dict.fromkeys(values.values()):
        sites = {site for site in values if values[site] == value}
        for site in sorted(sites, key=natural) if value != common else ():
            name = _shortest(site, sites, values)
            pattern[f"^{re.escape(site)}" if name == site else re.escape(name)] = value
    return pattern


def _shortest(site: str, sites: set[str], names: Iterable[str]) -> str:
    """Return the shortest end of a site's name, free of indices, that only sites have; or the full name."""
    parts = site.split(".")
    for i in range(len(parts) - 1, -1, -1):
        if parts[i].isdigit():
            break
        end = ".".join(parts[i:])
        if all(name in sites for name in names if _ends_with(name, end)):
            return end
    return site


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _integral(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha
