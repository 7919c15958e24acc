"""From a PEFT folder to what it announces: the tensors tell the sites, the config must say the same."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ....config import LoRAConfig
from ....errors import CheckpointError, MiniLoRAError, quoted, several
from ....manifest import Manifest, grouped
from ....names import above, described, ends, natural, outermost_of
from ....problems import Problems
from ....sites import Sites
from ....torch_internals import own_parameters
from ...atomic import one_at_a_time
from ...contents import Announced
from ...fingerprint import Fingerprint
from ...pickles import unpickled
from ...tensors import Entry, opened, read_json
from .. import native
from ..recognise import conversion, what_a_folder_is
from .config import CONFIG_FILE, PeftLoraConfig
from .keys import PREFIX, Found, sorted_out
from .places import WITHOUT_DROPOUT, Place, within, wrappers_of
from .resolve import resolve
from .tokens import key_of, read_tokens
from .versions import times_added_at_out_proj

TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

MEANING_KEY = "minilora_config"
"""In the tensors' header: what the config beside them means, so that no other takes its place unseen."""


@contextlib.contextmanager
def reading(path: Path, sites: Sites | None = None, *, allow_pickle: bool = False) -> Iterator[Announced]:
    """Open a PEFT folder and give what it says that it holds. Inverse: `write`.

    Args:
        path: of the folder.
        sites: of the model that it is meant for; None goes by names and shapes, which do not tell parameters
            apart. `Announced.disagreements` checks the rest.
        allow_pickle: read a pickle where there is no safetensors file.

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
            config = _read_config(path, allow_pickle)
            entries, metadata = _opened(path, stack)
        yield announced(path, config, entries, metadata, sites)


def tensor_file(path: Path) -> Path:
    """Return where a PEFT folder has its tensors; of a file, itself."""
    return path / TENSOR_FILE if path.is_dir() else path


def announced(
    path: Path,
    config: PeftLoraConfig,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str],
    sites: Sites | None,
) -> Announced:
    """Return what a config and the tensors beside it hold.

    Args:
        path: of the folder, for messages.
        config: of the folder.
        entries: its tensors, by PEFT's names.
        metadata: of the tensors' header.
        sites: of the model, or None.

    Raises:
        CheckpointError: listing every tensor that cannot be honoured, or that the config contradicts.
    """
    found, problems = sorted_out(entries, config)
    at, more = resolve(found, config, sites)
    problems += more
    configs, pairs, more = _configs(found, at, config)
    tokens, of_tokens = read_tokens(config.trainable_token_indices, found.rows, sites)
    if problems := problems + more + of_tokens:
        raise CheckpointError(several(problems, outcome=f"{str(path)!r} was not read"))
    places = tuple(at.values())
    targets = [place.target for place in places if place.kind != "attention output"]
    if MEANING_KEY in metadata and metadata[MEANING_KEY] != config.meaning(targets):
        raise CheckpointError(
            f"{str(path)!r} was not read: its {CONFIG_FILE!r} gives other ranks, scales or dropout than the "
            "one that these tensors were saved with. Either two adapters were mixed, or it was edited. Save "
            "the adapter again; or, if the edit is meant, write the tensors without that record: f = "
            f"{str(path / TENSOR_FILE)!r}; safetensors.torch.save_file(safetensors.torch.load_file(f), f)"
        )
    ours = {f"{site}.lora_{name}": entry for site, own in pairs.items() for name, entry in own.items()}
    lora = [(configs[site], site) for site in sorted(configs, key=natural)]
    return Announced(
        Manifest(
            grouped([*lora, *((rows, site) for site, rows in tokens.configs.items())]),
            (*found.heads, *found.biases),
        ),
        ours | tokens.entries | found.ours(),
        base=native.base_of(metadata) or _layout_only(config, places, found),
        base_values=tokens.compared(found.base, sites),
        disagreements=partial(_disagreements, config, places, found),
        damage=partial(_damage, metadata, places),
        rounds_heads=True,
        notes=tuple(_notes(path, config, found)),
    )


def peft_tensors(tensors: Mapping[str, Tensor], places: Iterable[Place]) -> dict[str, Tensor]:
    """Return tensors by PEFT's names and in its layout, for tensors by minilora's."""
    places, rest = tuple(places), dict(tensors)
    wrapped = wrappers_of(places)
    theirs: dict[str, Tensor] = {}
    for place in places:
        ours = {side: rest.pop(f"{place.site}.lora_{side}") for side in ("A", "B")}
        packed, keys = place.packing.theirs(ours), place.keys(wrapped)
        theirs |= {PREFIX + key: packed[side] for side, key in keys.items()}
        if (magnitude := rest.pop(f"{place.site}.lora_magnitude", None)) is not None:
            shape = (1, -1, *(1 for _ in place.packing.kernel)) if place.kind == "convolution" else (-1,)
            path = keys["A"].rpartition(".lora_")[0]
            theirs[f"{PREFIX}{path}.lora_magnitude_vector"] = magnitude.view(shape)
        if (bias := rest.pop(f"{place.site}.lora_bias", None)) is not None:
            theirs[PREFIX + keys["B"].removesuffix("weight") + "bias"] = bias
    return theirs | {PREFIX + key_of(within(name, wrapped)): tensor for name, tensor in rest.items()}


def _opened(path: Path, stack: contextlib.ExitStack) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return a folder's tensors and their header's metadata; a pickle, which is allowed by now, has none."""
    if not (path / TENSOR_FILE).exists():
        return unpickled(path / PICKLE_FILE), {}
    file = stack.enter_context(opened(path / TENSOR_FILE))
    return file.entries(), file.metadata()


def _read_config(path: Path, allow_pickle: bool) -> PeftLoraConfig:
    present = {file.name for file in path.iterdir()}
    if CONFIG_FILE not in present:
        raise CheckpointError(
            f"{str(path)!r} has no {CONFIG_FILE!r}, so it is no PEFT adapter. {what_a_folder_is(path)}"
        )
    try:
        config = PeftLoraConfig.from_dict(read_json(path / CONFIG_FILE))
    except CheckpointError as error:
        raise CheckpointError(f"{str(path / CONFIG_FILE)!r} cannot be honoured: {error}") from error
    if TENSOR_FILE not in present and PICKLE_FILE in present and not allow_pickle:
        raise CheckpointError(
            f"{str(path)!r} has its tensors as a pickle ({PICKLE_FILE!r}), which can run code when read "
            "and is not opened here. If you trust it: minilora.load(model, folder, allow_pickle=True), or "
            f"{conversion(path / PICKLE_FILE, path / TENSOR_FILE)}"
        )
    if not present & {TENSOR_FILE, PICKLE_FILE}:
        raise CheckpointError(f"{str(path)!r} has no {TENSOR_FILE!r}")
    return config


def _configs(
    found: Found, at: Mapping[str, Place], config: PeftLoraConfig
) -> tuple[dict[str, LoRAConfig], dict[str, dict[str, Entry]], list[str]]:
    """Return the config, and A and B as they are here, at each site; and what contradicts each other."""
    configs: dict[str, LoRAConfig] = {}
    pairs: dict[str, dict[str, Entry]] = {}
    problems = Problems()
    for path, place in at.items():
        if place.kind != "parameter" and not config.names_all_linear() and not config.targets(place.target):
            problems.add(place.site, "it has tensors, but the config does not target it")
        r, pair = config.rank_of(place.target), found.pairs[path]
        try:
            ours = place.packing.ours(pair)
        except ValueError as error:
            problems.add(place.site, str(error))
            continue
        if ours["A"].shape[-2] != ours["B"].shape[-1]:
            problems.add(
                place.site, f"A and B, {pair['A'].shape} and {pair['B'].shape}, have no rank in common"
            )
            continue
        if (rank := ours["A"].shape[-2]) != r:
            problems.add(place.site, f"the config gives it rank {r}, its tensors have rank {rank}")
            continue
        problem = _add_magnitude(ours, path, place, found, config) or _add_bias(
            ours, path, place, found, config
        )
        if problem:
            problems.add(place.site, problem)
            continue
        twice = place.kind == "attention output"
        wide = any(entry.dtype == torch.float64 for entry in pair.values())
        try:
            configs[place.site] = LoRAConfig(
                r=r,
                alpha=config.alpha_of(place.target)
                * (times_added_at_out_proj(config.peft_version) if twice else 1),
                dropout=0.0 if place.kind in WITHOUT_DROPOUT else config.lora_dropout,
                rslora=config.use_rslora,
                dora=config.use_dora,
                lora_bias=config.lora_bias,
                init=config.init,  # type: ignore[arg-type]
                dtype=torch.float64 if wide else None,
            )
            pairs[place.site] = ours
        except (MiniLoRAError, ValueError) as error:
            problems.add(place.site, str(error))
    return configs, pairs, problems.lines()


def _add_magnitude(
    pair: dict[str, Entry], path: str, place: Place, found: Found, config: PeftLoraConfig
) -> str | None:
    """Add DoRA's magnitude to A and B, as (out,), where the config says so; return what is wrong with it."""
    if not config.use_dora:
        return None
    if place.kind not in ("linear", "convolution", "embedding"):
        return "use_dora: DoRA is known for linear layers, convolutions and embeddings"
    if (entry := found.magnitudes.get(path)) is None:
        return "use_dora: no lora_magnitude_vector in the file"
    if (outputs := math.prod(entry.shape)) != pair["B"].shape[-2]:
        return f"use_dora: lora_magnitude_vector has {outputs} values, and B {pair['B'].shape[-2]} outputs"
    pair["magnitude"] = Entry(entry.dtype, (outputs,), lambda: entry.read().reshape(-1))
    return None


def _add_bias(
    pair: dict[str, Entry], path: str, place: Place, found: Found, config: PeftLoraConfig
) -> str | None:
    """Add the bias of B to A and B where the config says so, and return what is wrong with it."""
    if not config.lora_bias:
        return None
    if place.kind not in ("linear", "convolution"):
        return (
            "lora_bias: PEFT has it for linear layers and convolutions; in attention it has no effect or no "
            "gradient there"
        )
    if (entry := found.biases_of_B.get(path)) is None:
        return "lora_bias: no lora_B.bias in the file"
    pair["bias"] = entry
    return None


def _layout_only(config: PeftLoraConfig, places: Iterable[Place], found: Found) -> Fingerprint:
    """Return what the file tells of the base: which weights are transposed, or no linear layer's."""
    transposed, layers = set(), {}
    for place in places:
        if place.kind == "embedding" or (place.kind == "linear" and config.fan_in_fan_out):
            transposed.add(place.site)
        if place.kind == "convolution":
            layers[place.site] = f"Conv{len(place.packing.kernel)}d"
        elif place.kind == "embedding":
            layers[place.site] = "Embedding"
        elif place.kind == "attention input":
            layers[place.site] = "MultiheadAttention"
    return Fingerprint(transposed=frozenset(transposed), layers=layers)


def _damage(
    metadata: Mapping[str, str], places: Iterable[Place], tensors: Mapping[str, Tensor]
) -> str | None:
    """Return how the tensors are seen to be damaged; those that PEFT wrote have no checksum to tell."""
    if native.DIGEST_KEY not in metadata:
        return None
    return native.damage(peft_tensors(tensors, places), metadata)


def _notes(path: Path, config: PeftLoraConfig, found: Found) -> Iterator[str]:
    """Yield what a user should hear of modules that are trained in full because of how their names end."""
    entries = set(config.modules_to_save)
    loose = [module for module in found.heads if entries.isdisjoint(ends(module))]
    if loose:
        yield (
            f"modules_to_save of {str(path)!r} is [{quoted(config.modules_to_save)}]; by PEFT's rule, the "
            f"end of any name, that trains {quoted(loose)} in full as well. Write full names there to "
            "exclude such catches"
        )


def _disagreements(
    config: PeftLoraConfig, places: tuple[Place, ...], found: Found, sites: Sites
) -> list[str]:
    """Return where the config's patterns, applied to a model, say something else than the tensors do."""
    modules = {p.target for p in places if p.kind not in ("parameter", "attention output")}
    parameters = {place.target for place in places if place.kind == "parameter"}
    targeted, saved = config.sites(sites), config.saved_modules(sites)
    targeted_parameters, heads = config.parameter_sites(sites), set(found.heads)
    inner = {name for name in saved if not saved.isdisjoint(above(name))}
    biases = trained_biases(config.bias, places, sites, heads)
    differing = {
        "targeted by the config on this model, but without tensors in the file": (targeted - modules)
        | (targeted_parameters - parameters),
        "with tensors in the file, but not targeted by the config on this model": (modules & set(sites))
        - targeted,
        "caught by modules_to_save on this model, but without tensors in the file": saved - inner - heads,
        "caught by modules_to_save inside a module that it catches too": inner,
        f"trained by bias={config.bias!r} on this model, but without tensors in the file": biases
        - set(found.biases),
        f"with tensors in the file, but not trained by bias={config.bias!r}": set(found.biases) - biases,
        "shared by several parents, where PEFT adapts the first alone": (modules | heads) & sites.shared(),
    }
    return [f"{described(sorted(names, key=natural))}: {text}" for text, names in differing.items() if names]


def trained_biases(bias: str, places: Iterable[Place], sites: Sites, heads: Collection[str]) -> set[str]:
    """Return the biases of a model that PEFT trains along with LoRA, by their full names.

    Args:
        bias: "none", "all", or "lora_only", which is those of adapted modules.
        places: where LoRA is.
        sites: of the model.
        heads: modules trained in full, whose biases are theirs.
    """
    if bias == "none":
        return set()
    adapted = {place.module for place in places}
    return {
        f"{site.name}.bias"
        for site in sites.unique()
        if own_parameters(site.bare).get("bias") is not None
        and (bias == "all" or site.name in adapted)
        and outermost_of(site.name, heads) is None
    }
