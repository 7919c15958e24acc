"""From model to file and back: `adapter_state_dict`, `save`, `load`.

What the formats look like is told in `minilora.formats`; here is what they have in common: everything is
checked before anything changes, and every problem is in one error.
"""

from __future__ import annotations

import difflib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .config import LoRAConfig
from .errors import CheckpointError, MiniLoRAError, TargetError, quoted, several
from .files import FLOAT_DTYPES
from .fingerprint import Fingerprint, compare
from .formats import adapters, loralib, native, peft
from .head import TrainableHead
from .inject import build, require_trainable_in_full
from .manifest import Contents, Manifest
from .module import (
    InjectedModule,
    device_of,
    injected_modules,
    named_sites,
    replace_modules,
    require_injected,
    require_unwrapped,
)
from .targets import describe_sites
from .training import freeze

ReadFormat = Literal["auto", "minilora", "peft", "loralib", "adapters"]
WriteFormat = Literal["minilora", "peft"]

logger = logging.getLogger("minilora")


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return what was trained, by the names that `save` writes; detached, sharing memory with the model.

    Raises:
        MiniLoRAError: when the model carries no injection.
    """
    return {key: tensor.detach() for key, tensor in _live_state(require_injected(model)).items()}


def save(model: nn.Module, path: str | os.PathLike[str], *, format: WriteFormat = "minilora") -> None:
    """Write what was trained, with its configuration and a fingerprint of its base. Inverse: `load`.

    "minilora" is one `.safetensors` file. It is written beside its final place, flushed to disk, and then
    renamed: a good file that stood there is replaced whole or not at all. Merged or not, the same bytes
    are written.

    "peft" is a folder that PEFT and vLLM read: `adapter_config.json` and `adapter_model.safetensors`. A
    new folder appears whole or not at all. In one that exists the two files are replaced, others stay; if
    the process dies meanwhile, the old adapter, the new one, or no `adapter_config.json` is found, never
    the config of one with the tensors of the other.

    Args:
        model: an injected model.
        path: of the file or the folder; the folder it goes in exists.
        format: "minilora" or "peft".

    Raises:
        CheckpointError: when a tensor is not finite, or has no values (meta), or the format cannot express
            what the model carries; nothing is written.
        MiniLoRAError: when the model carries no injection, or is wrapped in DDP, FSDP or `torch.compile`.
        OSError: when the file cannot be written.
    """
    if format not in get_args(WriteFormat):
        raise MiniLoRAError(f"format must be one of {quoted(get_args(WriteFormat))}, not {format!r}")
    found = require_injected(model)
    tensors = {key: tensor.detach() for key, tensor in _live_state(found).items()}
    problems = [f"{key!r} is on the meta device and has no values" for key, t in tensors.items() if t.is_meta]
    problems += [f"{key!r} is not finite" for key, t in tensors.items() if not t.is_meta and not _finite(t)]
    if problems:
        raise CheckpointError(several(problems, outcome="nothing has been written"))
    contents = Contents(Manifest.of(found), tensors, base=Fingerprint.of(found))
    if format == "peft":
        peft.write(Path(path), contents, model)
    else:
        native.write(Path(path), contents)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: ReadFormat = "auto",
    config: LoRAConfig | None = None,
    check_base: bool = True,
) -> nn.Module:
    """Inject what a file describes and give it the file's values. Inverse: `save`.

    On a bare model, the sites are injected and the base is frozen. On a model that already carries the
    same injections, the values alone are replaced.

    Args:
        model: the same architecture as the one that was saved; changed in place.
        path: of a file written by `save`, a PEFT folder, or what `format` says.
        format: "auto" takes a folder for PEFT's and a file for minilora's own. "loralib" is a
            `.safetensors` file of `loralib.lora_state_dict(model)`; "adapters" a folder that the adapters
            library saved for a BERT, with `use_safetensors=True`.
        config: for "loralib" alone, whose files hold neither r nor alpha.
        check_base: refuse a base other than the one that the file was trained on, where the file tells.

    Returns:
        The model itself.

    Raises:
        CheckpointError: listing everything that is wrong with the file, or in which it does not fit the
            model or its base; the model is as it was.
        MiniLoRAError: when the model is wrapped in DDP, FSDP or `torch.compile`, or an argument is wrong.
        OSError: when there is no such file, or it cannot be read.

    Warns:
        UserWarning: when a PEFT file trains modules that its config names in part only.
    """
    require_unwrapped(model)
    contents = read(Path(path), format=format, config=config)
    outcome = f"{os.fspath(path)!r} was not loaded and the model has not been changed"
    replacements: dict[nn.Module, nn.Module] = {}
    problems = contents.disagreements(model)
    if layers := injected_modules(model):
        problems += _differences(contents.manifest, layers)
    else:
        layers, replacements, more = _build(contents.manifest, model)
        problems += more
    if problems:
        raise CheckpointError(several(problems, outcome=outcome))
    if problems := list(_misfits(_live_state(layers), contents.tensors)):
        raise CheckpointError(several(problems, outcome=outcome))
    if contents.damage:
        raise CheckpointError(several([contents.damage], outcome=outcome))
    if check_base and contents.base is not None:
        _require_same_base(contents.base, layers, outcome)
    default = device_of(model)
    values: dict[InjectedModule, dict[str, Tensor]] = {}  # all on their devices before the first is given
    for site, wrappers in layers.items():
        device = device_of(wrappers[-1].base, default)
        for wrapper in wrappers:
            values[wrapper] = {
                name: contents.tensors[f"{site}.{name}"].to(device, target.dtype)
                for name, target in wrapper.adapter_state().items()
            }
    for note in contents.notes:  # before anything changes: a warning may be turned into an error
        warnings.warn(note, UserWarning, stacklevel=2)
    for wrapper, state in values.items():
        # New wrappers take the file's tensors; an optimizer may hold those of older ones.
        wrapper.load_adapter_state(state, assign=bool(replacements))
    if replacements:
        replace_modules(model, replacements)
        freeze(model)
    return model


def read(path: Path, *, format: ReadFormat = "auto", config: LoRAConfig | None = None) -> Contents:
    """Return what an adapter file holds, in whatever format, without a model.

    Raises:
        CheckpointError: when the file is not sound, or holds what minilora does not do.
        MiniLoRAError: when `format` is none that is read, or `config` is given or left out wrongly.
        OSError: when there is no such file, or it cannot be read.
    """
    if format not in get_args(ReadFormat):
        raise MiniLoRAError(f"format must be one of {quoted(get_args(ReadFormat))}, not {format!r}")
    if (config is not None) != (format == "loralib"):
        raise MiniLoRAError(
            'config goes with format="loralib", whose files hold neither r nor alpha, and with no other: '
            'minilora.load(model, path, format="loralib", config=LoRAConfig(r=8, alpha=16))'
        )
    if config is not None:
        return loralib.read(path, config)
    if format == "adapters":
        return adapters.read(path)
    if format == "peft" or (format == "auto" and path.is_dir()):
        return peft.read(path)
    return native.read(path)


def _require_same_base(
    recorded: Fingerprint, layers: Mapping[str, list[InjectedModule]], outcome: str
) -> None:
    concerned = {site: wrappers for site, wrappers in layers.items() if site in recorded.signatures}
    comparison = compare(recorded, Fingerprint.of(concerned))
    if comparison.different:
        raise CheckpointError(
            several(
                [f"this is not the base that the adapter was trained on: {comparison}"],
                outcome=outcome,
                footer="Load it into the base that it was trained on, or pass check_base=False.",
            )
        )
    logger.info("base of the adapter: %s", comparison)


def _build(
    manifest: Manifest, model: nn.Module
) -> tuple[dict[str, list[InjectedModule]], dict[nn.Module, nn.Module], list[str]]:
    """Return new wrappers for all that a manifest asks for, without values, and the problems met.

    They come as `injected_modules` would give them, and as the replacements that put them in place.
    """
    bare = {name: chain[-1] for name, chain in named_sites(model)}
    first_names = {module: name for name, module in reversed(bare.items())}
    layers: dict[str, list[InjectedModule]] = {}
    problems: dict[str, list[str]] = {}

    def missing(site: str) -> str | None:
        if site not in bare:
            # Comparing names is slow, and after a few hints the next ones tell nothing new.
            near = difflib.get_close_matches(site, bare, n=1) if len(problems) < 8 else []
            return "the model has no such module" + (f"; nearest: {near[0]!r}" if near else "")
        if (first := first_names[bare[site]]) != site:
            return f"the model has this module first as {first!r}, and files name it so"
        return None

    chosen = [site for _, sites in manifest.injections for site in sites]
    meta = torch.device("meta")
    for config, sites in sorted(manifest.injections, key=lambda entry: entry[0].kind != LoRAConfig.kind):
        for site in sites:
            if problem := missing(site):
                problems.setdefault(problem, []).append(site)
            elif any(wrapper.kind == config.kind for wrapper in layers.get(site, ())):
                problems.setdefault(f"listed twice for {config.kind}", []).append(site)
            else:
                base = layers[site][0] if site in layers else bare[site]
                try:
                    wrapper = build(base, config, site=site, device=meta)
                    layers.setdefault(site, []).insert(0, wrapper)
                except TargetError as error:
                    problems.setdefault(str(error), []).append(site)
    for name in manifest.trainable:
        if problem := missing(name):
            problems.setdefault(f"to be trained in full, but {problem}", []).append(name)
        elif manifest.trainable.count(name) > 1:
            problems.setdefault("listed twice to be trained in full", []).append(name)
        else:
            try:
                others = {*chosen, *manifest.trainable} - {name} | ({name} & set(chosen))
                require_trainable_in_full(model, name, bare[name], others)
                layers[name] = [TrainableHead(bare[name])]
            except TargetError as error:
                problems.setdefault(str(error), []).append(name)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        problems["the model is on the meta device; give it its weights first, then load"] = [
            type(model).__name__
        ]
    replacements: dict[nn.Module, nn.Module] = {bare[site]: wrappers[0] for site, wrappers in layers.items()}
    return layers, replacements, [f"{describe_sites(names)}: {text}" for text, names in problems.items()]


def _differences(manifest: Manifest, carried: dict[str, list[InjectedModule]]) -> Iterator[str]:
    """Yield how a file's injections differ from those that a model carries already."""
    merged = [site for site, wrappers in carried.items() if any(wrapper.merged for wrapper in wrappers)]
    if merged:
        yield f"{describe_sites(merged)}: merged; call minilora.unmerge(model), then load"
    wanted, present = manifest.placed(), Manifest.of(carried).placed()
    advice = "call minilora.eject(model) first to load this file into the base"
    for what, names in (
        (
            "in the file, but not injected in the model",
            sorted(site for site, _ in wanted.keys() - present.keys()),
        ),
        (
            "injected in the model, but not in the file",
            sorted(site for site, _ in present.keys() - wanted.keys()),
        ),
        (
            "injected with another configuration than the file's",
            sorted(key[0] for key in wanted.keys() & present.keys() if wanted[key] != present[key]),
        ),
    ):
        if names:
            yield f"{describe_sites(names)}: {what}; {advice}"


def _live_state(layers: Mapping[str, list[InjectedModule]]) -> dict[str, Tensor]:
    return {
        f"{site}.{name}": tensor
        for site, wrappers in layers.items()
        for wrapper in wrappers
        for name, tensor in wrapper.adapter_state().items()
    }


def _misfits(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield everything in which a file's tensors are not the ones that its own manifest calls for."""
    if missing := [key for key in expected if key not in given]:
        yield f"missing from the file: {quoted(missing)}"
    if extra := [key for key in given if key not in expected]:
        yield f"in the file, but called for by nothing: {quoted(extra)}"
    for key, target in expected.items():
        if (value := given.get(key)) is None:
            continue
        if value.shape != target.shape:
            yield f"{key!r} has shape {tuple(value.shape)}, the model needs {tuple(target.shape)}"
        elif not _holds(target.dtype, value.dtype):
            yield (
                f"{key!r} is {value.dtype}, which {target.dtype} cannot hold without loss; load into a model "
                f"of {value.dtype} and cast it afterwards"
            )
        elif not _finite(value):
            yield f"{key!r} is not finite"


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Return whether every value of one dtype has its place in another."""
    if {wide, narrow} <= set(FLOAT_DTYPES.values()):
        return torch.promote_types(wide, narrow) == wide
    return wide == narrow


def _finite(tensor: Tensor) -> bool:
    return tensor.dtype not in FLOAT_DTYPES.values() or bool(torch.isfinite(tensor).all())
