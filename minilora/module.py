"""`InjectedModule`: the one idea that everything rests on.

A site is a place in a model. Injection puts a wrapper there, which owns the module it found as `base`:

    model.encoder.query            ->  model.encoder.query: InjectedModule
                                           .base            the very object that was there
                                           .lora_A, ...     what is trained

Everything else follows: the base is never written to, because nothing but the wrapper is new; removing
the wrapper gives the same object back; and a model's state is read off its modules, not off a registry.
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .config import Config
from .errors import MiniLoRAError, TargetError
from .linear import is_plain, linear_shape
from .torch_internals import own_parameters, own_tensors, put_parameter


class InjectedModule(nn.Module):
    """A wrapper that stands at a site and owns the module it replaced.

    What a subclass adds beside `base`, as parameters or modules, is what is trained and saved. A public
    attribute that the wrapper does not have itself is looked up on the base, so that code which reads
    `layer.in_features` or `block.num_heads` goes on working.

    Example:
        >>> model = minilora.inject(nn.Sequential(nn.Linear(16, 8)), "0")
        >>> isinstance(model[0], minilora.InjectedModule), type(model[0].base).__name__
        (True, 'Linear')
        >>> model[0].in_features
        16
    """

    kind: ClassVar[str]
    """The name of this kind of injection, in files and in summaries."""
    position: ClassVar[int] = 3
    """The order of wrappers at one site: those of a lower position stand further in, next to the module."""
    mergeable: ClassVar[bool] = True
    """Whether this kind can be merged and fused at all; `merge_problem` knows the exceptions."""
    trains: ClassVar[bool] = True
    """Whether this kind brings something that is trained, saved, and written down in a file's manifest."""
    trains_whole_module: ClassVar[bool] = False
    """Whether what is inside the site is trained as it is, so that nothing else can be injected there."""

    base: nn.Module
    """The module that was at the site before."""
    config: Config | None = None
    """What the wrapper was built from; None for kinds that have nothing to configure."""
    enabled: bool
    """Whether the wrapper has its effect; False only inside `minilora.disabled`."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.enabled = True
        self.training = base.training  # self.train(...) would also set the base's modules
        # A function of this file, not a bound method: a copy of the wrapper must not load into the original.
        self.register_load_state_dict_pre_hook(_take_bare_checkpoint)  # type: ignore[no-untyped-call]

    @property
    def merged(self) -> bool:
        """Whether the base computes with a merged weight at present."""
        return False

    def placed_at(self, site: str) -> str:
        """Return the name by which a manifest knows this wrapper: the site's, or a parameter's below it."""
        return site

    def begin(self) -> None:
        """Do what remains to be done once the wrapper stands in the model. Nothing for most kinds."""

    def description(self) -> str:
        """Return a few words for `summary`: the kind and what sets it apart."""
        raise NotImplementedError

    def saved_state(self) -> dict[str, Tensor]:
        """Return what is trained and saved here, by the names that a file uses below the site's own name.

        The tensors themselves, not copies.
        """
        return self.own_state()

    @torch.no_grad()
    def load_saved_state(self, values: dict[str, Tensor]) -> None:
        """Take the values of `saved_state` from a dictionary of the same names. Inverse: `saved_state`.

        Nothing but these tensors is written; the base's own loading code does not run.

        Args:
            values: tensors on the right device, of the right shapes and dtypes. Where a parameter has no
                values yet (it is on the meta device), the tensor given becomes its data.
        """
        owners = {
            id(parameter): (module, name)
            for module in self.modules()
            for name, parameter in own_parameters(module).items()
        }
        for key, live in self.saved_state().items():
            if live.is_meta and not values[key].is_meta:
                new = nn.Parameter(values[key], requires_grad=live.requires_grad)
                put_parameter(*owners[id(live)], new)
            else:
                live.copy_(values[key])

    def own_state(self) -> dict[str, Tensor]:
        """Return the tensors beside the base, by their names in this module; the tensors themselves."""
        state = own_tensors(self)
        for name, child in self.named_children():
            if child is not self.base:
                state |= child.state_dict(prefix=f"{name}.", keep_vars=True)
        return state

    def save_problem(self) -> str | None:
        """Return why `minilora.save` cannot write what is trained here, or None when it can."""
        return None

    def parameter_count(self) -> int:
        """Return how many parameters the injection added here."""
        return sum(value.numel() for value in self.saved_state().values() if isinstance(value, nn.Parameter))

    def signed_weight(self) -> Tensor | str | None:
        """Return the weight of the base by which a file knows the base again.

        Returns:
            The weight as it is without any injection; or why it cannot be told, in words; or None where
            this site says nothing about the base.
        """
        if isinstance(self.base, InjectedModule):
            return self.base.signed_weight()
        weight = own_tensors(self.base).get("weight")
        if weight is None and not (linear_shape(self.base) or is_parametrized(self.base, "weight")):
            return None
        return signable(weight)

    def replaced_by_merging(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the base that a merged one takes the place of, by their names there."""
        return {}

    def merge_problem(self, dtype: torch.dtype | None = None) -> str | None:
        """Return why this wrapper cannot be merged or fused, in `dtype` if given, or None when it can."""
        return None

    def merge(self) -> None:
        """Compute with merged weights from now on. Nothing to do for most kinds. Inverse: `unmerge`."""

    def unmerge(self) -> None:
        """Put the original weights back. Inverse: `merge`."""

    def set_aside(self) -> AbstractContextManager[None]:
        """Return a context in which the original weights are back; on the way out, the merged ones are."""
        return nullcontext()

    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the plain module that computes what this wrapper does. Final; `minilora.fuse` calls it."""
        raise NotImplementedError

    def ejected(self) -> nn.Module:
        """Return the base as it was. Final; `minilora.eject` calls it."""
        self.unmerge()
        return self.base

    def answering(self) -> nn.Module:
        """Return the module that answers for attributes which the wrapper does not have."""
        return self.base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Private names are the business of whoever set them, on that very module.
            if name.startswith("_") or "base" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.answering(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a parameter under a name that the base has goes where it is read: to the base.

        So code that ties weights by assignment, as transformers' `tie_weights` does, reaches the layer.
        """
        if isinstance(value, nn.Parameter) and "base" in self.__dict__.get("_modules", ()):
            layer = self.answering()
            if name in own_parameters(bare_module(layer)):
                if self.merged:
                    raise MiniLoRAError(
                        f"{name!r} cannot be set on a merged layer; call minilora.unmerge first"
                    )
                setattr(layer, name, value)
                return
        super().__setattr__(name, value)

    def initial_value(self, name: str, tensor: Tensor, bare: dict[str, Tensor]) -> Tensor:
        """Return the value that an own tensor takes when a checkpoint of the bare model is loaded.

        Args:
            name: of the tensor, as in `own_state`.
            tensor: its present value, which it keeps.
            bare: the checkpoint's tensors for this site, by their names below it.
        """
        return tensor


def signable(weight: Tensor | None) -> Tensor | str:
    """Return a weight by which a base can be known again, or why it cannot."""
    if not is_plain(weight):
        return "quantised, or otherwise no plain weight"
    return "on the meta device, without values" if weight.is_meta else weight


def is_called(module: nn.Module) -> bool:
    """Return whether a module has something to be called, which `nn.ModuleList` and its like do not."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def require_called(base: nn.Module) -> None:
    """Raise for a container that is only read, as `nn.ModuleList` is: around it, nothing would be called.

    Raises:
        TargetError: naming its type.
    """
    if not is_called(base):
        instead = "modules inside it" if any(True for _ in base.children()) else "module that it belongs to"
        raise TargetError(f"a {type(base).__name__} is never called itself; choose the {instead}")


def bare_module(module: nn.Module) -> nn.Module:
    """Return the module that wrappers stand around, or the module itself."""
    while isinstance(module, InjectedModule):
        module = module.base
    return module


def _take_bare_checkpoint(
    wrapper: InjectedModule, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Let a checkpoint of the bare model load: its keys have no `base.`, and nothing of what is trained.

    A key that begins with "base." belongs to an injected model's checkpoint, unless the bare module has a
    child of that name and the checkpoint nothing of this wrapper's own.
    """
    own = wrapper.own_state()
    below = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
    has_own = any(name in own for name in below)
    bare_keys = set(bare_module(wrapper).state_dict(keep_vars=True)) if not has_own else set()
    bare = [
        name
        for name in below
        if name not in own
        and not name.endswith("_extra_state")
        and (not name.startswith("base.") or name in bare_keys)
    ]
    if bare:
        values = {name: state_dict[prefix + name] for name in bare}
        for name, tensor in own.items():
            state_dict.setdefault(prefix + name, wrapper.initial_value(name, tensor, values))
        for name in bare:
            state_dict[f"{prefix}base.{name}"] = state_dict.pop(prefix + name)


def device_of(module: nn.Module, default: torch.device | None = None) -> torch.device:
    """Return the device of the module's first tensor; where it has none, the default, or the CPU."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return default or torch.device("cpu")


def dtype_for(module: nn.Module, dtype: torch.dtype | None) -> torch.dtype:
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
