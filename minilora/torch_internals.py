"""What is needed of torch beyond its public API, in one place, each with its reason.

Everything else in the package goes through public names, but for two methods that have no public hook and
can only be overridden in their classes: `_apply` (`mergeable`: what is moved and cast) and
`_replicate_for_data_parallel` (`view`). When a new release of torch breaks something, this is the file to
read; `tests/test_torch_contracts.py` holds what is taken for granted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch._functorch.utils as functorch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrizations import _SpectralNorm

# Families of layers that torch has a class for, but no public name.
Convolution = _ConvNd
TransposedConvolution = _ConvTransposeNd
BatchNorm = _NormBase
"""`nn.BatchNorm1d` and its like, instance norms included."""
SpectralNorm = _SpectralNorm
"""The parametrization that `nn.utils.parametrizations.spectral_norm` registers."""
AttentionOutput = NonDynamicallyQuantizableLinear
"""What `nn.MultiheadAttention` has as `out_proj`: it reads the weight and never calls the layer."""

is_lazy = torch.nn.parameter.is_lazy
"""Whether a parameter has no shape before the first call."""
is_compiling = torch.compiler.is_compiling
"""Whether `torch.compile` or `torch.export` is tracing."""
is_transforming = torch._C._are_functorch_transforms_active
"""Whether a transformation of `torch.func` is at work: `vmap`, `grad`, `jvp`."""


def children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children of a module under each of their names.

    `named_children` leaves out the second name of a shared module, which is a place like the first.
    """
    yield from ((name, child) for name, child in module._modules.items() if child is not None)


def put_child(parent: nn.Module, name: str, child: nn.Module) -> None:
    """Put a module in the place of another.

    `setattr` would go through a `__setattr__` that somebody may have written, and fails on the numeric
    names in `nn.Sequential` subclasses with properties of their own.
    """
    parent._modules[name] = child


def put_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Put a parameter, or None, in the place of another; past any `__setattr__`, and never half-way."""
    module._parameters[name] = parameter


def shadow(module: nn.Module) -> nn.Module:
    """Return a module with the same parameters and children, in which others can be put in their place.

    Its class is the one from before `fully_shard`.
    """
    twin: nn.Module = object.__new__(class_unsharded(type(module)))  # copy.copy would have FSDP call __init__
    own = {name: dict(vars(module)[name]) for name in ("_parameters", "_buffers", "_modules")}
    vars(twin).update(vars(module), **own)
    return twin


def own_parameters(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """Return the parameters of a module itself, by name, a shared one under each of its names.

    And without calling anything: `getattr` runs a parametrization, which may write its buffers.
    """
    return module._parameters


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module itself, as `own_parameters` does."""
    return {name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}


def persistent_buffers(module: nn.Module) -> Iterator[str]:
    """Yield the names of the buffers of a module itself that are part of `state_dict`."""
    yield from (name for name in module._buffers if name not in module._non_persistent_buffers_set)


def put_buffer(module: nn.Module, name: str, buffer: Tensor) -> None:
    """Put a buffer in the place of another, persistent or not as that one was."""
    module._buffers[name] = buffer


def has_hooks(module: nn.Module) -> bool:
    """Return whether hooks may watch or change the call of a module."""
    of_forward = module._forward_pre_hooks or module._forward_hooks
    return bool(of_forward or module._backward_pre_hooks or module._backward_hooks)


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Return a model and all that is inside it, once each: as `modules()`, quicker, and level by level."""
    found = {model: None}
    for module in (in_order := [model]):
        for child in module._modules.values():
            if child is not None and child not in found:
                found[child] = None
                in_order.append(child)
    return in_order


def names_where(model: nn.Module, holds: Callable[[nn.Parameter], bool]) -> list[str]:
    """Return the names of the parameters that something holds of; where there are none, at a glance."""
    if any(p is not None and holds(p) for m in all_modules(model) for p in m._parameters.values()):
        return [name for name, parameter in model.named_parameters() if holds(parameter)]
    return []


def is_shard(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which this process may hold a part of the values only.

    By name: importing torch.distributed for its types takes seconds.
    """
    kind = type(tensor)
    return kind is not nn.Parameter and any(parent.__name__ == "DTensor" for parent in kind.__mro__)


def shards_in(model: nn.Module) -> list[str]:
    """Return the names of the modules that `fully_shard` was called on, or else of a model's DTensors."""
    return [name for name, _ in sharded_modules(model)] or names_where(model, is_shard)


def put_shards_back(model: nn.Module) -> None:
    """Let FSDP take away what it has gathered to compute with, cast perhaps, and lets go of at any time."""
    for _, module in sharded_modules(model):
        module.reshard()  # type: ignore[operator]  # its public method


def sharded_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules that `fully_shard` was called on, by name."""
    kinds = {kind for kind in set(map(type, all_modules(model))) if class_unsharded(kind) is not kind}
    return [found for found in model.named_modules() if type(found[1]) in kinds] if kinds else []


def class_unsharded(kind: type) -> type:
    """Return a module's class as it was before `fully_shard`, which puts one of torch's in front of it."""
    kinds = kind.__mro__
    put = [i for i, k in enumerate(kinds) if k.__name__ == "FSDPModule" and k.__module__.startswith("torch.")]
    return kinds[put[0] + 1 if put else 0]


def in_backward() -> bool:
    """Return whether this thread computes gradients at present, as when a checkpoint computes a block again.

    torch does so for a GPU in threads of its own, which know nothing of a thread-local.
    """
    return not is_compiling() and torch._C._current_graph_task_id() != -1


def is_deriving() -> bool:
    """Return whether what is computed now may have a derivative, by autograd or by `torch.func`."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or is_transforming()


def applied(function: type[torch.autograd.Function], arguments: tuple[object, ...]) -> object:
    """Return what a function's `apply` does, for all the arguments of its `forward`.

    `apply` would bind them to the signature first, which takes longer than all else that it does.
    """
    if is_transforming():
        return function.apply(*arguments)  # type: ignore[no-untyped-call]
    known = functorch.unwrap_dead_wrappers(arguments)  # a tensor that a transformation has left behind
    return super(torch.autograd.Function, function).apply(*known)  # type: ignore[misc]
