"""`merge`, `unmerge` and `fuse` over a whole model: loops only, the maths is with the layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from .errors import MergeError, MiniLoRAError, quoted, several
from .module import InjectedModule, replace_modules, require_enabled, require_injected
from .targets import describe_sites


def merge(model: nn.Module, *, skip_adapters: bool = False) -> nn.Module:
    """Let every LoRA layer compute with W_eff = W + scaling B A, at the base's own speed.

    The originals are kept, untouched; merging twice is merging once. Inverse: `unmerge`.

    Args:
        model: an injected model; changed in place.
        skip_adapters: leave bottleneck adapters, which cannot be merged, as they are.

    Returns:
        The model itself.

    Raises:
        MergeError: naming each site that cannot be merged; the model is as it was.
        MiniLoRAError: when the model carries no injection, or is inside `minilora.disabled`.
    """
    layers = [layer for _, layer in _mergeable(model, skip_adapters) if not layer.merged]
    done: list[InjectedModule] = []
    try:
        for layer in layers:
            layer.merge()
            done.append(layer)
    except BaseException:  # out of memory, or Ctrl-C: whole or not at all
        for layer in done:
            layer.unmerge()
        raise
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Put every original weight back, the very same objects. Inverse: `merge`.

    On a model that is not merged nothing happens.

    Returns:
        The model itself.

    Raises:
        MiniLoRAError: when the model carries no injection.
    """
    for wrappers in require_injected(model).values():
        for wrapper in wrappers:
            wrapper.unmerge()
    return model


def fuse(model: nn.Module, *, dtype: torch.dtype | None = None, skip_adapters: bool = False) -> nn.Module:
    """Make the model plain again with the training in its weights, for serving. Final.

    Each LoRA layer gives way to its base with W_eff as weight, accumulated in float32 and rounded once;
    each module that `trainable` named, to its trained copy. No second copy of a weight is kept. The keys
    of `state_dict` are the bare model's. To go back later, use `merge` instead.

    Args:
        model: an injected model; changed in place.
        dtype: None keeps each weight's own. Otherwise floating parameters and buffers of the whole model
            are cast to it; buffers that are not part of `state_dict`, such as tables of rotary
            frequencies, keep the precision that they were computed in.
        skip_adapters: leave bottleneck adapters, which cannot be fused, as they are.

    Returns:
        The model itself.

    Raises:
        MergeError: naming each site that cannot be fused; the model is as it was.
        MiniLoRAError: when the model carries no injection, is inside `minilora.disabled`, or the dtype is
            not a floating-point one.

    Warns:
        UserWarning: when a fused weight was tied to another one, from which it now differs.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise MiniLoRAError(
            f"fuse casts to floating-point dtypes, not to {dtype}; the model has not been changed"
        )
    layers = _mergeable(model, skip_adapters)
    _warn_of_loosened_ties(model, layers)
    plain: dict[nn.Module, nn.Module] = {}
    try:
        for _, layer in layers:
            plain[layer] = layer.fused(dtype)
    finally:  # also when memory runs out: a base with W_eff must not stay inside its wrapper
        replace_modules(model, plain)
    if dtype is not None:
        _cast(model, dtype)
    return model


def _mergeable(model: nn.Module, skip_adapters: bool) -> list[tuple[str, InjectedModule]]:
    """Return the layers to merge with their sites, or raise with every reason why some cannot be."""
    layers: list[tuple[str, InjectedModule]] = []
    obstacles: dict[str, list[str]] = {}
    for site, wrappers in require_enabled(model, "merge and fuse").items():
        for wrapper in wrappers:
            if wrapper.kind == "adapter" and skip_adapters:
                continue
            if problem := wrapper.merge_problem():
                obstacles.setdefault(problem, []).append(site)
            layers.append((site, wrapper))
    if obstacles:
        problems = [f"{describe_sites(sites)}: {problem}" for problem, sites in obstacles.items()]
        raise MergeError(several(problems, outcome="the model has not been changed"))
    return layers


def _warn_of_loosened_ties(model: nn.Module, layers: Iterable[tuple[str, InjectedModule]]) -> None:
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), set()).add(module)
    tied = [
        f"{site}.weight"
        for site, layer in layers
        if layer.kind == "lora" and owners.get(id(layer.base_weight()), set()) - {layer.base}
    ]
    if tied:
        warnings.warn(
            f"{quoted(tied)} was tied to another weight and is one of its own once fused. Let no loader tie "
            "it again: with transformers, set model.config.tie_word_embeddings = False before saving",
            UserWarning,
            stacklevel=3,
        )


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(dtype)
