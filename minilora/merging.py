"""`merge`, `unmerge` and `fuse` over a whole model: loops only, the maths is with the layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .config import is_float_dtype, plain_dtype
from .errors import MergeError, MiniLoRAError, quoted, several
from .followers import tell_followers
from .mergeable import Mergeable
from .module import InjectedModule
from .names import described
from .problems import Problems
from .quantized.layers import dequantized
from .quantized.weights import is_quantized
from .sites import Site, Sites, replace_modules, require_enabled, require_injected, require_whole
from .torch_internals import own_tensors, persistent_buffers, put_buffer


def merge(model: nn.Module, *, skip_adapters: bool = False) -> nn.Module:
    """Let every LoRA layer compute with W_eff = W + scaling B A, at the base's own speed.

    The originals are kept, untouched; merging twice is merging once. A merged layer does not train: its
    forward raises in training mode with gradients. Inverse: `unmerge`.

    Args:
        model: an injected model; changed in place.
        skip_adapters: leave bottleneck adapters, which cannot be merged, as they are.

    Returns:
        The model itself.

    Raises:
        MergeError: naming each site that cannot be merged; the model is as it was.
        MiniLoRAError: when the model carries no injection, is sharded, or is inside `minilora.disabled`.

    Example:
        >>> model = minilora.inject(nn.Sequential(nn.Linear(8, 8)), "0").eval()
        >>> minilora.merge(model)[0].merged
        True
    """
    require_whole(model, "merge before fully_shard; merged_weights(model) yields what a merged model holds")
    found = mergeable(require_enabled(model, "merge").items(), skip_adapters)
    wrappers = [wrapper for wrapper in found if not wrapper.merged]
    try:
        for wrapper in wrappers:
            wrapper.merge()
    except BaseException:  # out of memory, or Ctrl-C: whole or not at all
        for wrapper in wrappers:
            wrapper.unmerge()
        raise
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Put every original weight back, the very same objects. Inverse: `merge`.

    On a model that is not merged nothing happens.

    Returns:
        The model itself.

    Raises:
        MiniLoRAError: when the model carries no injection, or is sharded.

    Example:
        >>> model = minilora.inject(nn.Sequential(nn.Linear(8, 8)), "0")
        >>> weight = model[0].base.weight
        >>> minilora.unmerge(minilora.merge(model))[0].base.weight is weight
        True
    """
    require_whole(model, "unmerge before fully_shard")
    for site in require_injected(model).values():
        for wrapper in site.wrappers:
            wrapper.unmerge()
    return model


def fuse(
    model: nn.Module,
    *,
    dtype: torch.dtype | str | None = None,
    skip_adapters: bool = False,
    dequantize: bool = False,
) -> nn.Module:
    """Make the model plain again with the training in its weights, for serving. Final.

    Each LoRA layer gives way to its base with W_eff as weight, accumulated in float32 and rounded once;
    each module that `trainable` named, to its trained copy. No second copy of a weight is kept. The keys
    of `state_dict` are the bare model's. To go back later, use `merge` instead.

    Args:
        model: an injected model; changed in place.
        dtype: a floating-point dtype or its name. None keeps each weight's own. Otherwise floating
            parameters and buffers of the whole model are cast to it, but for quantised ones; buffers that are
            not part of `state_dict`, such as tables of rotary frequencies, keep the precision that they were
            computed in.
        skip_adapters: leave bottleneck adapters, which cannot be fused, as they are.
        dequantize: put a plain `nn.Linear` in the place of each quantised layer with LoRA, with the weight
            that its library gives back, in the dtype from before it was quantised: bitsandbytes' 4 and 8
            bits (of 8 the dtype is not known: float32), torchao's tensors. What quantising took stays lost,
            the layer takes the memory of a plain one, and other layers stay quantised. Where the
            quantised layer rounds its input as well, the plain one answers differently by that.

    Returns:
        The model itself.

    Raises:
        MergeError: naming each site that cannot be fused, and each tensor with values beyond the dtype; the
            model is as it was.
        MiniLoRAError: when the model carries no injection, is sharded, is inside `minilora.disabled`, or the
            dtype is not a floating-point one.

    Warns:
        UserWarning: when a fused weight was tied to another one, from which it now differs; when a layer
            that had no bias has one once fused, being that of B; when transformers' config of a dequantised
            model still says that it is quantised.

    Example:
        >>> model = minilora.inject(nn.Sequential(nn.Linear(8, 8)), "0")
        >>> minilora.fuse(model, dtype="bfloat16")[0]
        Linear(in_features=8, out_features=8, bias=True)
    """
    to: torch.dtype | None = plain_dtype(dtype)
    if to is not None and not is_float_dtype(to):
        raise MiniLoRAError(
            f"fuse casts to floating-point dtypes, not to {dtype!r}; the model has not been changed"
        )
    require_whole(model, "fuse before fully_shard; merged_weights(model) yields what a fused model holds")
    with dequantized(model) if dequantize else nullcontext():
        injected = require_enabled(model, "fuse")
        wrappers = mergeable(injected.items(), skip_adapters, to)
        if to is not None and (problems := _beyond(model, to, wrappers)):
            raise MergeError(several(problems, outcome="the model has not been changed"))
        for unknown in _unknown_to_loaders(model, injected, wrappers):
            warnings.warn(unknown, UserWarning, stacklevel=2)
    plain: dict[nn.Module, nn.Module] = {}
    try:
        for wrapper in wrappers:
            plain[wrapper] = wrapper.fused(to)
    finally:  # also when memory runs out: a base with W_eff must not stay inside its wrapper
        replace_modules(model, plain)
    if to is not None:
        _cast(model, to)
    tell_followers(model)
    return model


def mergeable(
    injected: Iterable[tuple[str, Site]], skip_adapters: bool, dtype: torch.dtype | None = None
) -> list[InjectedModule]:
    """Return the wrappers to merge, or raise with every reason why some cannot be."""
    wrappers: list[InjectedModule] = []
    obstacles, some_stay = Problems(), False
    for name, site in injected:
        for wrapper in site.wrappers:
            if not wrapper.mergeable and skip_adapters:
                some_stay = True
                continue
            if problem := wrapper.merge_problem(dtype):
                obstacles.add(wrapper.placed_at(name), problem)
            wrappers.append(wrapper)
    if obstacles:
        raise MergeError(several(obstacles.lines(), outcome="the model has not been changed"))
    if some_stay:
        # What stays goes on training, and the base's statistics must not.
        wrappers = [wrapper for wrapper in wrappers if wrapper.trains]
    return wrappers


def _beyond(model: nn.Module, dtype: torch.dtype, wrappers: Iterable[InjectedModule]) -> list[str]:
    """Return the tensors with values too large for a dtype, but for those that fusing replaces or lets go."""
    replaced = [tensor for wrapper in wrappers for tensor in wrapper.replaced_by_merging().values()]
    gone = {id(t) for t in (*replaced, *(t for w in wrappers for t in own_tensors(w).values()))}
    largest = torch.finfo(dtype).max
    found = [
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
        and not is_quantized(tensor)
        and torch.finfo(tensor.dtype).max > largest
        and id(tensor) not in gone
        and not tensor.is_meta
        and tensor.numel()
        and bool((torch.isfinite(tensor) & (tensor.abs() > largest)).any())
    ]
    return [f"{quoted(found)}: values beyond {largest:g}, the largest of {dtype}"] if found else []


def _unknown_to_loaders(
    model: nn.Module, injected: dict[str, Site], wrappers: Iterable[InjectedModule]
) -> Iterator[str]:
    """Yield in what the fused model differs from what a loader of the bare model takes for granted."""
    sites, fused, tied, grown = Sites(model), set(wrappers), [], []
    for name, site in injected.items():
        for wrapper in fused.intersection(site.wrappers):
            replaced = wrapper.replaced_by_merging()
            owners = {n: {module for _, module in sites.owners_of(p)} for n, p in replaced.items()}
            tied += [f"{name}.{n}" for n in replaced if owners[n] - {site.bare}]
            grows = isinstance(wrapper, Mergeable) and len(wrapper.replaces) > len(replaced)
            grown += [name] if grows else []
    if tied:
        yield (
            f"{quoted(tied)} was tied to another weight and is one of its own once fused. Let no loader tie "
            "it again: with transformers, set model.config.tie_word_embeddings = False before saving"
        )
    if grown:
        yield (
            f"{described(grown)}: had no bias, and has that of B once fused. What makes the bare model anew "
            "leaves it out: give the layers a bias there, before it loads the values"
        )


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and not is_quantized(parameter):
                parameter.data = parameter.data.to(dtype)
        tensors = own_tensors(module)
        for name in list(persistent_buffers(module)):
            if name in tensors and tensors[name].is_floating_point():
                put_buffer(module, name, tensors[name].to(dtype))
