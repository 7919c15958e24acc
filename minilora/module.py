"""`InjectedModule`: the one idea that everything rests on, and how injected modules are found and swapped.

A site is a place in a model. Injection puts a wrapper there, which owns the module it found as `base`:

    model.encoder.query            ->  model.encoder.query: InjectedModule
                                           .base            the very object that was there
                                           .lora_A, ...     what is trained

Everything else follows: the base is never written to, because nothing but the wrapper is new; removing
the wrapper gives the same object back; and a model's state is read off its modules, not off a registry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import MiniLoRAError, quoted


class InjectedModule(nn.Module):
    """A wrapper that stands at a site and owns the module it replaced.

    What a subclass adds beside `base`, as parameters or modules, is what is trained and saved. A public
    attribute that the wrapper does not have itself is looked up on the base, so that code which reads
    `layer.in_features` or `block.num_heads` goes on working.
    """

    kind: ClassVar[str]
    """The name of this kind of injection, in files and in summaries."""

    base: nn.Module
    """The module that was at the site before."""
    enabled: bool
    """Whether the wrapper has its effect; False only inside `minilora.disabled`."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.enabled = True
        self.training = base.training  # self.train(...) would also set the base's modules

    @property
    def merged(self) -> bool:
        """Whether the base computes with a merged weight at present."""
        return False

    def description(self) -> str:
        """Return a few words for `summary`: the kind and what sets it apart."""
        raise NotImplementedError

    def adapter_state(self) -> dict[str, Tensor]:
        """Return what is trained and saved here, by the names that a file uses below the site's own name."""
        return self._own_state()

    def load_adapter_state(self, values: dict[str, Tensor], *, assign: bool) -> None:
        """Take the values of `adapter_state` from a dictionary of the same names. Inverse: `adapter_state`.

        Args:
            values: tensors on the right device, of the right shapes and dtypes.
            assign: make the values themselves the parameters' data, instead of copying them in place.
        """
        self.load_state_dict(values, strict=False, assign=assign)

    def _own_state(self) -> dict[str, Tensor]:
        """Return the tensors beside the base, by their names in this module; the tensors themselves."""
        state: dict[str, Tensor] = dict(self._parameters)  # type: ignore[arg-type]
        for name, child in self._modules.items():
            if name != "base" and child is not None:
                state |= child.state_dict(prefix=f"{name}.", keep_vars=True)
        return state

    def base_weight(self) -> object:
        """Return the `weight` of the base as it is without any injection, or None where it has none."""
        return getattr(self.base, "weight", None)

    def merge_problem(self) -> str | None:
        """Return why this wrapper cannot be merged or fused, or None when it can."""
        return None

    def merge(self) -> None:
        """Compute with merged weights from now on. Nothing to do for most kinds. Inverse: `unmerge`."""

    def unmerge(self) -> None:
        """Put the original weights back. Inverse: `merge`."""

    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the plain module that computes what this wrapper does. Final; `minilora.fuse` calls it."""
        raise NotImplementedError

    def _answering(self) -> nn.Module:
        """Return the module that answers for attributes which the wrapper does not have."""
        return self.base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Private names are the business of whoever set them, on that very module.
            if name.startswith("_") or "base" not in self._modules:
                raise
            return getattr(self._answering(), name)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Let a checkpoint of the bare model load: its keys have no `base.`, and nothing of the adapter."""
        own = self._own_state()
        bare = [
            key
            for key in state_dict
            if key.startswith(prefix)
            and not key.startswith(prefix + "base.")
            and key[len(prefix) :] not in own
            and not key.endswith("_extra_state")
        ]
        if bare:
            for name, tensor in own.items():
                state_dict.setdefault(prefix + name, self._initial(name, tensor, state_dict, prefix))
            for key in bare:
                state_dict[f"{prefix}base.{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _initial(self, name: str, tensor: Tensor, state_dict: dict[str, Any], prefix: str) -> Tensor:
        """Return the value that an own tensor takes when a bare checkpoint is loaded: the one it has."""
        return tensor


def named_sites(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, list[nn.Module]]]:
    """Yield every place in a model under its name in the bare model, with the modules that stand there.

    The list goes from the outermost wrapper to the bare module; it has one element where nothing was
    injected. What wrappers added is left out. A shared module comes under each of its names.
    """
    for name, child in module._modules.items():
        if child is None:
            continue
        chain = [child]
        while isinstance(chain[-1], InjectedModule):
            chain.append(chain[-1].base)
        yield prefix + name, chain
        yield from named_sites(chain[-1], f"{prefix}{name}.")


def injected_modules(model: nn.Module) -> dict[str, list[InjectedModule]]:
    """Return the wrappers of a model by site, outermost first; a shared module under its first name."""
    found: dict[str, list[InjectedModule]] = {}
    seen: set[nn.Module] = set()
    for name, chain in named_sites(model):
        wrappers = [layer for layer in chain if isinstance(layer, InjectedModule)]
        if wrappers and chain[-1] not in seen:
            seen.add(chain[-1])
            found[name] = wrappers
    return found


def require_injected(model: nn.Module) -> dict[str, list[InjectedModule]]:
    """Return `injected_modules`, or raise where there are none.

    Raises:
        MiniLoRAError: when the model carries no injection, or is itself inside a wrapper of torch's.
    """
    require_unwrapped(model)
    found = injected_modules(model)
    if not found:
        raise MiniLoRAError(
            f"this {type(model).__name__} carries no injection (none yet, or ejected or fused): "
            'call minilora.inject(model, targets=["query", "value"]) or minilora.load(model, path) first'
        )
    return found


def require_enabled(model: nn.Module, act: str) -> dict[str, list[InjectedModule]]:
    """Return `injected_modules`, or raise where there are none, or where they are disabled at present.

    Raises:
        MiniLoRAError: as `require_injected` does, and inside `minilora.disabled`, naming the act.
    """
    found = require_injected(model)
    if not all(wrapper.enabled for wrappers in found.values() for wrapper in wrappers):
        raise MiniLoRAError(f"{act} cannot work inside minilora.disabled; leave its block first")
    return found


def require_unwrapped(model: nn.Module) -> None:
    """Raise where the model is inside DDP, FSDP or torch.compile, whose names and copies are not ours.

    And where it has lazy modules without a shape yet, whose parameters cannot even be frozen.

    Raises:
        MiniLoRAError: naming the wrapper, or the parameters, and what to write instead.
    """
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise MiniLoRAError(f"{quoted(lazy)} have no shape yet (lazy modules): call the model once first")
    fixes = {
        "DistributedDataParallel": "work on the model inside, `ddp.module`; wrap in DDP after injecting",
        "DataParallel": "work on the model inside, `parallel.module`; wrap after injecting",
        "FullyShardedDataParallel": "inject or load first, then wrap in FSDP; gather a full model to save",
        "FSDPModule": "inject or load first, then call fully_shard; gather a full model to save",
        "OptimizedModule": "work on the model inside, `compiled._orig_mod`; compile after injecting",
    }
    for kind in {type(module) for module in model.modules()}:
        for parent in kind.__mro__:
            # By name: importing torch.distributed.fsdp for an isinstance check takes seconds.
            if parent.__name__ in fixes and parent.__module__.startswith("torch."):
                name = next(name for name, module in model.named_modules() if type(module) is kind)
                where = f"{name!r} is" if name else "the model is"
                raise MiniLoRAError(f"{where} wrapped in {parent.__name__}: {fixes[parent.__name__]}")


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module in the place of the old one, under all of the old one's parents."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def device_of(module: nn.Module, default: torch.device | None = None) -> torch.device:
    """Return the device of the module's first tensor; where it has none, the default, or the CPU."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return default or torch.device("cpu")


def adapter_dtype(module: nn.Module, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of new parameters at a module: as asked, else float32, float64 on a float64 base.

    float32 masters under a 16-bit base lose no small updates; they cost little, being small.
    """
    if dtype is not None:
        return dtype
    return torch.float64 if any(p.dtype == torch.float64 for p in module.parameters()) else torch.float32


def generator_for(name: str) -> torch.Generator:
    """Return a CPU generator seeded by torch's own seed and a name.

    So `torch.manual_seed` decides every draw, no draw depends on the order of sites, and the global
    random state is left where it was.
    """
    digest = hashlib.sha256(f"{torch.initial_seed()}:{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
