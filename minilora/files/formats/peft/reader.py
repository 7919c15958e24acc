"""From a PEFT folder to what it announces: the tensors tell the sites, the config must say the same."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ....config import LoRAConfig
from ....errors import CheckpointError, MiniLoRAError, quoted, several
from ....linear import linear_shape
from ....manifest import Manifest, grouped
from ....names import above, described, ends, natural
from ....problems import Problems
from ....sites import Sites
from ...atomic import one_at_a_time
from ...contents import Announced
from ...fingerprint import Fingerprint
from ...tensors import Entry, opened, read_json
from .. import native
from ..recognise import conversion, what_a_folder_is
from .config import CONFIG_FILE, PeftLoraConfig

TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."

MEANING_KEY = "minilora_config"
"""In the tensors' header: what the config beside them means, so that no other takes its place unseen."""

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

Pairs = dict[str, dict[str, Entry]]
Heads = dict[str, dict[str, Entry]]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Announced]:
    """Open a PEFT folder and give what it says that it holds. Inverse: `write`.

    The modules' own names are all that is known of the model; `Announced.disagreements` checks the rest.

    Raises:
        CheckpointError: listing every field and tensor that is unsound or cannot be honoured.
        OSError: when there is no such folder, or its files cannot be read.
    """
    if not path.is_dir():
        path.stat()  # FileNotFoundError where there is nothing at all
        raise CheckpointError(
            f"{str(path)!r} is a file; a PEFT adapter is the folder with {CONFIG_FILE!r} in it"
        )
    with contextlib.ExitStack() as stack:
        with one_at_a_time(path):  # so that no save comes between the two files
            config = _read_config(path)
            file = stack.enter_context(opened(path / TENSOR_FILE))
        yield announced(path, config, file.entries(), file.metadata())


def announced(
    path: Path, config: PeftLoraConfig, entries: Mapping[str, Entry], metadata: Mapping[str, str]
) -> Announced:
    """Return what a config and the tensors beside it hold.

    Args:
        path: of the folder, for messages.
        config: of the folder.
        entries: its tensors, by PEFT's names.
        metadata: of the tensors' header.

    Raises:
        CheckpointError: listing every tensor that cannot be honoured, or that the config contradicts.
    """
    pairs, heads, problems = _sorted_out(entries, config)
    configs, more = _configs(pairs, config)
    if problems := problems + more:
        raise CheckpointError(several(problems, outcome=f"{str(path)!r} was not read"))
    if MEANING_KEY in metadata and metadata[MEANING_KEY] != config.meaning(pairs):
        raise CheckpointError(
            f"{str(path)!r} was not read: its {CONFIG_FILE!r} gives other ranks, scales or dropout than the "
            "one that these tensors were saved with. Either two adapters were mixed, or it was edited. Save "
            "the adapter again; or, if the edit is meant, write the tensors without that record: f = "
            f"{str(path / TENSOR_FILE)!r}; safetensors.torch.save_file(safetensors.torch.load_file(f), f)"
        )
    ours = {f"{site}.lora_{side}": entry for site, pair in pairs.items() for side, entry in pair.items()}
    for module, state in heads.items():
        ours |= {f"{module}.{name}": entry for name, entry in state.items()}
    return Announced(
        Manifest(grouped((configs[site], site) for site in sorted(configs, key=natural)), tuple(heads)),
        ours,
        base=native.base_of(metadata) or _layout_only(config, pairs),
        disagreements=partial(_disagreements, config, set(pairs), set(heads)),
        damage=partial(_damage, metadata, set(pairs)),
        rounds_heads=True,
        notes=tuple(_notes(path, config, heads)),
    )


def peft_name(name: str, pairs: set[str]) -> str:
    """Return PEFT's name of a tensor from minilora's, given the sites that carry LoRA."""
    site, _, part = name.rpartition(".")
    is_lora = part in ("lora_A", "lora_B") and site in pairs
    return f"{PREFIX}{name}.weight" if is_lora else PREFIX + name


def _read_config(path: Path) -> PeftLoraConfig:
    present = {file.name for file in path.iterdir()}
    if CONFIG_FILE not in present:
        raise CheckpointError(
            f"{str(path)!r} has no {CONFIG_FILE!r}, so it is no PEFT adapter. {what_a_folder_is(path)}"
        )
    try:
        config = PeftLoraConfig.from_dict(read_json(path / CONFIG_FILE))
    except CheckpointError as error:
        raise CheckpointError(f"{str(path / CONFIG_FILE)!r} cannot be honoured: {error}") from error
    if TENSOR_FILE not in present and PICKLE_FILE in present:
        raise CheckpointError(
            f"{str(path)!r} has its tensors as a pickle ({PICKLE_FILE!r}), which can run code when read "
            f"and is never opened here. If you trust it: {conversion(path / PICKLE_FILE, path / TENSOR_FILE)}"
        )
    if TENSOR_FILE not in present:
        raise CheckpointError(f"{str(path)!r} has no {TENSOR_FILE!r}")
    return config


def _sorted_out(entries: Mapping[str, Entry], config: PeftLoraConfig) -> tuple[Pairs, Heads, list[str]]:
    """Return A and B by site, the state of modules trained in full by module, and problems."""
    pairs: Pairs = {}
    heads: Heads = {}
    others = Problems()
    for key, entry in sorted(entries.items(), key=lambda item: natural(item[0])):
        name = key.removeprefix(PREFIX)
        site, _, side = name.removesuffix(".weight").rpartition(".lora_")
        if name == key:
            others.add(key, f"the key does not begin with {PREFIX!r}")
        elif module := next((m for m in above(name) if config.saves(m)), None):
            heads.setdefault(module, {})[name.removeprefix(f"{module}.")] = entry
        elif (
            site
            and name == f"{site}.lora_{side}.weight"
            and side in ("A", "B")
            and "base_layer" not in site.split(".")
        ):
            pairs.setdefault(site, {})[side] = entry
        else:
            reason = next(
                (why for pattern, why in FOREIGN_KEYS if re.search(pattern, name)),
                "neither LoRA nor part of a module that modules_to_save names",
            )
            others.add(key, reason)
    misfits = Problems()
    for site, pair in pairs.items():
        if problem := _pair_problem(pair):
            misfits.add(site, problem)
    return (
        pairs,
        heads,
        others.lines() + misfits.lines() + ([] if pairs else ["there is no LoRA tensor in it"]),
    )


def _pair_problem(pair: Mapping[str, Entry]) -> str | None:
    """Return what is wrong with A and B of a site, or None."""
    if missing := {"A", "B"} - set(pair):
        return f"no lora_{missing.pop()} in the file"
    shape_a, shape_b = pair["A"].shape, pair["B"].shape
    if not len(shape_a) == len(shape_b) == 2:
        return f"A has {len(shape_a)} dimensions; convolutions are not supported yet"
    if shape_a[0] != shape_b[1]:
        return f"A and B, {shape_a} and {shape_b}, have no rank in common"
    return None


def _configs(
    pairs: Mapping[str, Mapping[str, Entry]], config: PeftLoraConfig
) -> tuple[dict[str, LoRAConfig], list[str]]:
    """Return the config at each site, and where the file's patterns and tensors contradict each other."""
    configs: dict[str, LoRAConfig] = {}
    problems = Problems()
    for site, pair in pairs.items():
        if not config.names_all_linear() and not config.targets(site):
            problems.add(site, "it has tensors, but the config does not target it")
        r, rank = config.rank_of(site), pair["A"].shape[0] if "A" in pair and pair["A"].shape else None
        if rank not in (None, r):
            problems.add(site, f"the config gives it rank {r}, its tensors have rank {rank}")
            continue
        wide = any(entry.dtype == torch.float64 for entry in pair.values())
        try:
            configs[site] = LoRAConfig(
                r=r,
                alpha=config.alpha_of(site),
                dropout=config.lora_dropout,
                rslora=config.use_rslora,
                init=config.init,  # type: ignore[arg-type]
                dtype=torch.float64 if wide else None,
            )
        except MiniLoRAError as error:
            problems.add(site, str(error))
    return configs, problems.lines()


def _layout_only(config: PeftLoraConfig, pairs: Mapping[str, object]) -> Fingerprint:
    """Return what the config tells of the base: whether its weights are stored transposed."""
    return Fingerprint(transposed=frozenset(pairs if config.fan_in_fan_out else ()))


def _damage(metadata: Mapping[str, str], pairs: set[str], tensors: Mapping[str, Tensor]) -> str | None:
    """Return how the tensors are seen to be damaged; those that PEFT wrote have no checksum to tell."""
    if native.DIGEST_KEY not in metadata:
        return None
    return native.damage({peft_name(name, pairs): tensor for name, tensor in tensors.items()}, metadata)


def _notes(path: Path, config: PeftLoraConfig, heads: Mapping[str, object]) -> Iterator[str]:
    """Yield what a user should hear of modules that are trained in full because of how their names end."""
    entries = set(config.modules_to_save)
    loose = [module for module in heads if entries.isdisjoint(ends(module))]
    if loose:
        yield (
            f"modules_to_save of {str(path)!r} is [{quoted(config.modules_to_save)}]; by PEFT's rule, the "
            f"end of any name, that trains {quoted(loose)} in full as well. Write full names there to "
            "exclude such catches"
        )


def _disagreements(config: PeftLoraConfig, pairs: set[str], heads: set[str], sites: Sites) -> list[str]:
    """Return where the config's patterns, applied to a model, say something else than the tensors do."""
    targeted, saved = config.sites(sites), config.saved_modules(sites)
    inner = {name for name in saved if not saved.isdisjoint(above(name))}
    found = {
        "targeted by the config on this model, but without tensors in the file": targeted - pairs,
        "with tensors in the file, but not targeted by the config on this model": (pairs & set(sites))
        - targeted,
        "caught by modules_to_save on this model, but without tensors in the file": saved - inner - heads,
        "caught by modules_to_save inside a module that it catches too": inner,
        "LoRA on what is no linear layer, which PEFT lays out in a way that is not read yet": {
            name
            for name in pairs
            if name in sites and (sites[name].parameter or linear_shape(sites[name].bare) is None)
        },
        "shared by several parents, where PEFT adapts the first alone": (pairs | heads) & sites.shared(),
    }
    return [f"{described(sorted(names, key=natural))}: {text}" for text, names in found.items() if names]
