"""`Manifest`: which configs stand at which sites, and what is trained in full.

`inject` makes one from what the user names, `load` reads one from a file, `save` writes one that it takes
from a model; `plan` builds what it says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .config import AdapterConfig, Config, LoRAConfig, RowsConfig
from .sites import Site
from .trained import TrainableHead

CONFIGS: dict[str, type[Config]] = {config.kind: config for config in (LoRAConfig, AdapterConfig, RowsConfig)}
"""The config of each kind that has one, by the kind's name."""


@dataclass(frozen=True)
class Manifest:
    """Which configs stand at which sites, and which modules and parameters are trained in full."""

    injections: tuple[tuple[Config, tuple[str, ...]], ...]
    trainable: tuple[str, ...]

    @classmethod
    def of(cls, injected: Mapping[str, Site]) -> Manifest:
        """Return the manifest of a model's wrappers, as `sites.injected_sites` gives them."""
        placed: list[tuple[Config, str]] = []
        trainable = []
        for name, site in injected.items():
            for wrapper in reversed(site.wrappers):  # LoRA first, then the adapter around it
                if wrapper.config is not None:
                    placed.append((wrapper.config, wrapper.placed_at(name)))
                elif wrapper.trains:
                    trainable.append(wrapper.placed_at(name))
        return cls(grouped(placed), tuple(trainable))

    def placed(self) -> dict[tuple[str, str], Config | None]:
        """Return what stands where: (site, kind) -> config, or None for a module trained in full."""
        placed: dict[tuple[str, str], Config | None] = {
            (site, config.kind): config for config, sites in self.injections for site in sites
        }
        return placed | {(name, TrainableHead.kind): None for name in self.trainable}


def grouped(placed: Iterable[tuple[Config, str]]) -> tuple[tuple[Config, tuple[str, ...]], ...]:
    """Return the sites of each config, in the order in which they come."""
    groups: dict[Config, list[str]] = {}
    for config, site in placed:
        groups.setdefault(config, []).append(site)
    return tuple((config, tuple(sites)) for config, sites in groups.items())
