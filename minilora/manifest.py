"""`Manifest`: which configs stand at which sites; and `Contents`: all that an adapter file holds.

Every format is read into `Contents` and written from them, so that what formats have in common is said
once, in `checkpoint`, and what sets them apart stays in the file of the format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .config import AdapterConfig, Config, LoRAConfig
from .errors import CheckpointError, MiniLoRAError
from .fingerprint import Fingerprint
from .head import TrainableHead
from .module import InjectedModule

FORMAT_VERSION = 1

CONFIGS: dict[str, type[Config]] = {config.kind: config for config in (LoRAConfig, AdapterConfig)}


@dataclass(frozen=True)
class Manifest:
    """Which configs stand at which sites, and which modules are trained in full."""

    injections: tuple[tuple[Config, tuple[str, ...]], ...]
    trainable: tuple[str, ...]

    @classmethod
    def of(cls, found: Mapping[str, list[InjectedModule]]) -> Manifest:
        """Return the manifest of a model's wrappers, as `injected_modules` gives them."""
        configs: dict[tuple[str, str], Config] = {}
        trainable = []
        for site, wrappers in found.items():
            for wrapper in reversed(wrappers):  # LoRA first, then the adapter around it
                if isinstance(wrapper, TrainableHead):
                    trainable.append(site)
                else:
                    configs[site, wrapper.kind] = wrapper.config
        return cls(grouped((config, site) for (site, _), config in configs.items()), tuple(trainable))

    def placed(self) -> dict[tuple[str, str], Config | None]:
        """Return what stands where: (site, kind) -> config, or None for a module trained in full."""
        placed: dict[tuple[str, str], Config | None] = {
            (site, config.kind): config for config, sites in self.injections for site in sites
        }
        return placed | {(name, TrainableHead.kind): None for name in self.trainable}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values. Inverse: `from_dict`."""
        return {
            "format_version": FORMAT_VERSION,
            "injections": [
                {"kind": config.kind, "config": config.to_dict(), "sites": list(sites)}
                for config, sites in self.injections
            ],
            "trainable": list(self.trainable),
        }

    @classmethod
    def from_dict(cls, header: object) -> Manifest:
        """Build the manifest from plain JSON values. Inverse: `to_dict`.

        Raises:
            CheckpointError: for whatever `to_dict` would not have written.
        """
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
            kind = entry["kind"]
            if not isinstance(kind, str) or kind not in CONFIGS or not isinstance(entry["config"], dict):
                raise CheckpointError(f"an injection is of the unknown kind {kind!r:.200}")
            try:
                config = CONFIGS[kind].from_dict(entry["config"])
            except (MiniLoRAError, TypeError) as error:
                raise CheckpointError(f"a config in the header is not valid: {error}") from error
            injections.append((config, _names(entry["sites"])))
        return cls(tuple(injections), _names(header["trainable"]))


@dataclass(frozen=True)
class Contents:
    """All that an adapter file holds, whatever its format."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    """By minilora's names: `<site>.lora_A`, ..., and trainable modules' tensors under their own."""
    base: Fingerprint | None = None
    """Of the base that it was trained on; None where the file says nothing about it."""
    disagreements: Callable[[nn.Module], list[str]] = lambda model: []
    """What else the file says of the model that it belongs to, and this model contradicts."""
    damage: str | None = None
    """How the file is seen not to be what was written; None where it is whole, or cannot tell."""
    notes: tuple[str, ...] = ()
    """What a user should hear about this file, though nothing is wrong with it."""


def grouped(placed: Iterable[tuple[Config, str]]) -> tuple[tuple[Config, tuple[str, ...]], ...]:
    """Return the sites of each config, in the order in which they come."""
    groups: dict[Config, list[str]] = {}
    for config, site in placed:
        groups.setdefault(config, []).append(site)
    return tuple((config, tuple(sites)) for config, sites in groups.items())


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts `layer.2` before `layer.10`, as a model does."""
    return [
        (int(part) if part.isdecimal() and len(part) < 10 else -1, part) for part in re.split(r"\.", name)
    ]


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"the header has no list of names where one must be: {value!r:.200}")
    return tuple(value)
