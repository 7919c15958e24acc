"""Files that hold what was trained and how: `adapter_state_dict`, `save`, `load`.

One `.safetensors` file holds everything. Its tensors are named `<site>.lora_A`, `<site>.lora_B`,
`<site>.adapter_down.weight`, ..., and trainable modules' own tensors under their own names. Its header's
metadata has an entry "minilora", JSON:

    {"format_version": 1,
     "injections": [{"kind": "lora", "config": {...}, "sites": ["encoder.layer.0.query", ...]}, ...],
     "trainable": ["classifier"]}
"""

from __future__ import annotations

import difflib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .config import AdapterConfig, Config, LoRAConfig
from .errors import CheckpointError, MiniLoRAError, TargetError, quoted, several
from .head import TrainableHead
from .inject import build, require_trainable_in_full
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

FORMAT_VERSION = 1
METADATA_KEY = "minilora"

CONFIGS: dict[str, type[Config]] = {config.kind: config for config in (LoRAConfig, AdapterConfig)}


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return what was trained, by the names that `save` writes; detached, sharing memory with the model.

    Raises:
        MiniLoRAError: when the model carries no injection.
    """
    return {key: tensor.detach() for key, tensor in _live_state(require_injected(model)).items()}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write what was trained, with its configuration, to one `.safetensors` file. Inverse: `load`.

    The file is written beside its final place, flushed to disk, and then renamed: a good file that stood
    there is replaced whole or not at all. Merged or not, the same bytes are written.

    Args:
        model: an injected model.
        path: of the file; its folder exists.

    Raises:
        CheckpointError: when a tensor is not finite, or has no values (meta); nothing is written.
        MiniLoRAError: when the model carries no injection, or is wrapped in DDP, FSDP or `torch.compile`.
        OSError: when the file cannot be written.
    """
    found = require_injected(model)
    tensors = {key: tensor.detach() for key, tensor in _live_state(found).items()}
    problems = [f"{key!r} is on the meta device and has no values" for key, t in tensors.items() if t.is_meta]
    problems += [f"{key!r} is not finite" for key, t in tensors.items() if not t.is_meta and not _finite(t)]
    if problems:
        raise CheckpointError(several(problems, outcome="nothing has been written"))
    header = {"format": "pt", METADATA_KEY: json.dumps(_Manifest.of(found).to_dict())}
    contiguous = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    _write_whole(Path(path), safetensors.torch.save(contiguous, metadata=header))


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Inject what a file describes and give it the file's values. Inverse: `save`.

    On a bare model, the sites are injected and the base is frozen. On a model that already carries the
    same injections, the values alone are replaced.

    Args:
        model: the same architecture as the one that was saved; changed in place.
        path: of a file written by `save`.

    Returns:
        The model itself.

    Raises:
        CheckpointError: listing everything that is wrong with the file, or in which it does not fit the
            model; the model is as it was.
        MiniLoRAError: when the model is wrapped in DDP, FSDP or `torch.compile`.
        OSError: when there is no such file, or it cannot be read.
    """
    require_unwrapped(model)
    manifest, tensors = _read(Path(path))
    outcome = f"{os.fspath(path)!r} was not loaded and the model has not been changed"
    replacements: dict[nn.Module, nn.Module] = {}
    if layers := injected_modules(model):
        problems = list(_differences(manifest, layers))
    else:
        layers, replacements, problems = _build(manifest, model)
    if problems:
        raise CheckpointError(several(problems, outcome=outcome))
    if problems := list(_misfits(_live_state(layers), tensors)):
        raise CheckpointError(several(problems, outcome=outcome))
    default = device_of(model)
    for site, wrappers in layers.items():
        device = device_of(wrappers[-1].base, default)
        for wrapper in wrappers:
            values = {
                name: tensors[f"{site}.{name}"].to(device, target.dtype)
                for name, target in wrapper.adapter_state().items()
            }
            # New wrappers take the file's tensors; an optimizer may hold those of older ones.
            wrapper.load_adapter_state(values, assign=bool(replacements))
    if replacements:
        replace_modules(model, replacements)
        freeze(model)
    return model


@dataclass(frozen=True)
class _Manifest:
    """What the header says: which configs at which sites, and which modules in full."""

    injections: tuple[tuple[Config, tuple[str, ...]], ...]
    trainable: tuple[str, ...]

    @classmethod
    def of(cls, found: dict[str, list[InjectedModule]]) -> _Manifest:
        sites: dict[Config, list[str]] = {}
        trainable = []
        for site, wrappers in found.items():
            for wrapper in reversed(wrappers):  # LoRA first, then the adapter around it
                if isinstance(wrapper, TrainableHead):
                    trainable.append(site)
                else:
                    sites.setdefault(wrapper.config, []).append(site)
        injections = tuple((config, tuple(names)) for config, names in sites.items())
        return cls(injections, tuple(trainable))

    def to_dict(self) -> dict[str, Any]:
        """Inverse: `from_dict`."""
        return {
            "format_version": FORMAT_VERSION,
            "injections": [
                {"kind": config.kind, "config": config.to_dict(), "sites": list(sites)}
                for config, sites in self.injections
            ],
            "trainable": list(self.trainable),
        }

    @classmethod
    def from_dict(cls, header: object) -> _Manifest:
        """Inverse: `to_dict`. Raises CheckpointError for whatever `to_dict` would not have written."""
        if not isinstance(header, dict) or not isinstance(header.get("format_version"), int):
            raise CheckpointError("the header has no format_version")
        if header["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"it has format version {header['format_version']} and this minilora reads version "
                f"{FORMAT_VERSION}: upgrade minilora"
            )
        if set(header) != {"format_version", "injections", "trainable"}:
            raise CheckpointError(f"the header's entries are {sorted(header)}, which is not this format")
        if not isinstance(header["injections"], list):
            raise CheckpointError("the header's injections are not a list")
        injections = []
        for entry in header["injections"]:
            if not isinstance(entry, dict) or set(entry) != {"kind", "config", "sites"}:
                raise CheckpointError(f"an injection is not made of kind, config and sites: {entry!r:.200}")
            if entry["kind"] not in CONFIGS or not isinstance(entry["config"], dict):
                raise CheckpointError(f"an injection is of the unknown kind {entry['kind']!r:.200}")
            try:
                config = CONFIGS[entry["kind"]].from_dict(entry["config"])
            except (MiniLoRAError, TypeError) as error:
                raise CheckpointError(f"a config in the header is not valid: {error}") from error
            injections.append((config, _names(entry["sites"])))
        return cls(tuple(injections), _names(header["trainable"]))


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"the header has no list of names where one must be: {value!r:.200}")
    return tuple(value)


def _read(path: Path) -> tuple[_Manifest, dict[str, Tensor]]:
    """Return a file's manifest and tensors, on the CPU and owning their memory."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if METADATA_KEY not in metadata:
                raise CheckpointError(
                    f"{str(path)!r} is no minilora file: its header has no {METADATA_KEY!r} entry"
                )
            manifest = _Manifest.from_dict(json.loads(metadata[METADATA_KEY]))
            names = file.keys()  # the file is no dictionary: it has keys, and nothing to iterate over
            return manifest, {name: file.get_tensor(name).clone() for name in names}
    except CheckpointError as error:
        raise CheckpointError(f"{str(path)!r} cannot be loaded: {error}") from error
    except (safetensors.SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not a sound safetensors file, or was cut or altered on its way: {error}"
        ) from error


def _build(
    manifest: _Manifest, model: nn.Module
) -> tuple[dict[str, list[InjectedModule]], dict[nn.Module, nn.Module], list[str]]:
    """Return new wrappers for all that a manifest asks for, without values, and the problems met.

    They come as `injected_modules` would give them, and as the replacements that put them in place.
    """
    bare = {name: chain[-1] for name, chain in named_sites(model)}
    layers: dict[str, list[InjectedModule]] = {}
    problems: dict[str, list[str]] = {}

    def add(site: str, wrapper: InjectedModule) -> None:
        layers.setdefault(site, []).insert(0, wrapper)

    chosen = [site for _, sites in manifest.injections for site in sites]
    meta = torch.device("meta")
    for config, sites in sorted(manifest.injections, key=lambda entry: entry[0].kind != LoRAConfig.kind):
        for site in sites:
            if site not in bare:
                near = difflib.get_close_matches(site, bare, n=1)
                hint = f"; nearest: {near[0]!r}" if near else ""
                problems.setdefault(f"the model has no such module{hint}", []).append(site)
            elif any(wrapper.kind == config.kind for wrapper in layers.get(site, ())):
                problems.setdefault(f"listed twice for {config.kind}", []).append(site)
            else:
                base = layers[site][0] if site in layers else bare[site]
                try:
                    add(site, build(base, config, site=site, device=meta))
                except TargetError as error:
                    problems.setdefault(str(error), []).append(site)
    for name in manifest.trainable:
        if name not in bare:
            problems.setdefault("the model has no such module to train in full", []).append(name)
            continue
        try:
            require_trainable_in_full(model, name, bare[name], chosen)
            add(name, TrainableHead(bare[name]))
        except TargetError as error:
            problems.setdefault(str(error), []).append(name)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        problems["the model is on the meta device; give it its weights first, then load"] = [
            type(model).__name__
        ]
    replacements: dict[nn.Module, nn.Module] = {bare[site]: wrappers[0] for site, wrappers in layers.items()}
    return layers, replacements, [f"{describe_sites(names)}: {text}" for text, names in problems.items()]


def _differences(manifest: _Manifest, carried: dict[str, list[InjectedModule]]) -> Iterator[str]:
    """Yield how a file's injections differ from those that a model carries already."""
    merged = [site for site, wrappers in carried.items() if any(wrapper.merged for wrapper in wrappers)]
    if merged:
        yield f"{describe_sites(merged)}: merged; call minilora.unmerge(model), then load"
    wanted, present = _placed(manifest), _placed(_Manifest.of(carried))
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


def _placed(manifest: _Manifest) -> dict[tuple[str, str], Config | None]:
    placed: dict[tuple[str, str], Config | None] = {
        (site, config.kind): config for config, sites in manifest.injections for site in sites
    }
    return placed | {(name, TrainableHead.kind): None for name in manifest.trainable}


def _live_state(layers: dict[str, list[InjectedModule]]) -> dict[str, Tensor]:
    return {
        f"{site}.{name}": tensor
        for site, wrappers in layers.items()
        for wrapper in wrappers
        for name, tensor in wrapper.adapter_state().items()
    }


def _misfits(expected: dict[str, Tensor], given: dict[str, Tensor]) -> Iterator[str]:
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
        elif torch.promote_types(value.dtype, target.dtype) != target.dtype:
            yield f"{key!r} is {value.dtype}, which {target.dtype} cannot hold without loss"
        elif not _finite(value):
            yield f"{key!r} is not finite"


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that, whenever the process dies, the old one or the new one stands there."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself is on disk only when its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
