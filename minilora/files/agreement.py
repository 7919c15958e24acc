"""A file's injections and those that a model carries already: where they differ, and who gives way.

Sites, kinds and ranks are what the values fit into, and must be the same. What only says how a LoRA is
applied, or how it began, may come from either side, if the caller says from which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

from ..config import Config, LoRAConfig
from ..errors import MiniLoRAError
from ..lora import LoRA
from ..manifest import Manifest
from ..names import described
from ..sites import Site

ConfigFrom = Literal["file", "model"]

FREE = frozenset({"alpha", "dropout", "rslora", "init", "dtype"})
"""Fields of a `LoRAConfig` that no tensor's shape depends on."""


def require_side(config_from: object) -> None:
    """Raise for a side that there is not.

    Raises:
        MiniLoRAError: naming the two.
    """
    if config_from not in (None, *get_args(ConfigFrom)):
        raise MiniLoRAError(f'config_from must be "file", "model" or None, not {config_from!r:.100}')


def differences(
    manifest: Manifest, injected: Mapping[str, Site], config_from: ConfigFrom | None
) -> Iterator[str]:
    """Yield how a file's injections differ from those that a model carries already.

    Args:
        manifest: of the file.
        injected: the model's sites that carry wrappers.
        config_from: whose configs count where fields that are free differ; None lets nothing differ.
    """
    merged = [name for name, site in injected.items() if site.merged]
    if merged:
        yield f"{described(merged)}: merged; call minilora.unmerge(model), then load"
    wanted, present = manifest.placed(), Manifest.of(injected).placed()
    advice = "call minilora.eject(model) first to load this file into the base"
    for what, names in (
        ("in the file, but not injected in the model", [site for site, _ in wanted.keys() - present.keys()]),
        ("injected in the model, but not in the file", [site for site, _ in present.keys() - wanted.keys()]),
    ):
        if names:
            yield f"{described(sorted(names))}: {what}; {advice}"
    found: dict[str, list[str]] = {}
    for key in wanted.keys() & present.keys():
        fields = _differing(wanted[key], present[key])
        if fields and not (config_from and fields.keys() <= FREE):
            text = ", ".join(
                f"{name} is {ours!r} in the model and {theirs!r} in the file"
                for name, (theirs, ours) in fields.items()
            )
            either = ', or pass config_from="file" or "model"' if fields.keys() <= FREE else ""
            found.setdefault(
                f"injected with another configuration than the file's: {text}; {advice}{either}", []
            ).append(key[0])
    for text, names in found.items():
        yield f"{described(sorted(names))}: {text}"


def take_configs(manifest: Manifest, injected: Mapping[str, Site]) -> None:
    """Give each LoRA of a model the file's config, but for the dtype, which its tensors have already."""
    wanted = manifest.placed()
    for name, site in injected.items():
        for wrapper in site.wrappers:
            config = wanted.get((wrapper.placed_at(name), wrapper.kind))
            if isinstance(wrapper, LoRA) and isinstance(config, LoRAConfig):
                wrapper.config = dataclasses.replace(config, dtype=wrapper.config.dtype)
                wrapper.scaling = config.scaling


def _differing(theirs: Config | None, ours: Config | None) -> dict[str, tuple[object, object]]:
    """Return the fields in which two configs of one kind differ."""
    if theirs is None or ours is None:
        return {}
    pairs = {f.name: (getattr(theirs, f.name), getattr(ours, f.name)) for f in dataclasses.fields(theirs)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
