"""`Substitution`: a wrapper in which a module computes with another value in the place of a parameter.

    wrapper.forward(x)  ->  type(base).forward(view, x)        view.weight      the wrapper's value
                                                               view.anything    the base's own

The view is an object of a class derived from the base's, so that every method of the base runs on the view.
It is made once, and reads what it needs at each use: nothing is swapped while a module computes, so threads
do not meet, and it compiles where the base compiles. What a layer does with its parameter (stride, groups,
padding, routing) stays the base's business, and a kind of layer that nobody thought of works like the rest.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import Tensor, nn

from .errors import TargetError
from .linear import is_plain
from .module import InjectedModule, bare_module, require_called
from .torch_internals import has_hooks, is_compiling, own_parameters, own_tensors


class Substitution(InjectedModule):
    """A wrapper whose base computes with `value()` in the place of one of its parameters.

    Args:
        base: the module that owns the parameter, or wrappers around it.
        parameter: its name in the module.

    Raises:
        TargetError: when the module does not read the parameter as an attribute of its own.
    """

    parameter: str
    """The name, in the base, of the parameter in whose place the value stands."""
    replaces: tuple[str, ...]
    """That name, and those of other parameters in whose place the wrapper's own attributes stand."""
    site: str = ""
    """As a manifest has it, for messages."""

    def __init__(self, base: nn.Module, parameter: str) -> None:
        bare = bare_module(base)
        require_called(bare)
        if isinstance(bare, nn.RNNBase):
            raise TargetError(f"{type(bare).__name__} keeps its weights flat, and computes with those")
        if own_parameters(bare).get(parameter) is None:
            raise TargetError(
                f"{type(bare).__name__} has no parameter {parameter!r} of its own: it is none, a buffer, or "
                "computed from others (a parametrization), so nothing can take its place"
            )
        if "forward" in vars(bare):
            raise TargetError(
                f"the forward of this {type(bare).__name__} has been replaced on the instance (by "
                "accelerate's dispatch, most often), and would not see what is trained: inject first"
            )
        super().__init__(base)
        self.parameter, self.replaces = parameter, (parameter,)
        self.__dict__["_view"] = _view(self, type(bare))  # no child, though it is a module

    @property
    def bare(self) -> nn.Module:
        """The module that owns the parameter, inside all wrappers."""
        return bare_module(self.base)

    def placed_at(self, site: str) -> str:
        """Return the module's name for its `weight`, else the parameter's."""
        return site if self.parameter == "weight" else f"{site}.{self.parameter}"

    def saved_state(self) -> dict[str, Tensor]:
        """Return the wrapper's own tensors, below the parameter's name unless that is "weight"."""
        below = "" if self.parameter == "weight" else f"{self.parameter}."
        return {below + name: tensor for name, tensor in own_tensors(self).items()}

    def plain_parameter(self) -> Tensor:
        """Return the parameter.

        Raises:
            TargetError: when it is no ordinary tensor of floating-point numbers.
        """
        weight = own_tensors(self.bare)[self.parameter]
        if is_plain(weight):
            return weight
        kind = type(weight).__name__
        raise TargetError(
            f"{self.parameter!r} of {type(self.bare).__name__} is a {kind} of {weight.dtype}, no weight"
        )

    def tell_of_forming(self, function: str) -> None:
        """Warn, once for each function, that the whole value is formed for it."""
        if is_compiling() or function in (told := vars(self).setdefault("_told", set())):
            return
        told.add(function)
        warnings.warn(
            f"{self.called()}: {function} has no rule, so W_eff is formed, as large as W",
            UserWarning,
            stacklevel=6,
        )

    def called(self) -> str:
        """Return the parameter's name in the model, in quotes."""
        site = self.site or type(self.bare).__name__
        return repr(f"{site.removesuffix(f'.{self.parameter}')}.{self.parameter}")

    def value(self) -> Any:
        """Return what stands in the parameter's place while the base computes."""
        raise NotImplementedError

    def substituted(self) -> Tensor:
        """Return what code outside sees under the parameter's name: a tensor."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base's own forward with the value in the parameter's place."""
        if self.merged or not self.enabled:
            return self.base(*args, **kwargs)
        view = self.__dict__["_view"]
        # Hooks belong to a call; without any, the method alone is what torch.compile follows best.
        return view(*args, **kwargs) if has_hooks(self.bare) else view.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__
        if name == state.get("parameter") and not self.merged and self.enabled:
            return self.substituted()
        if name == "_qkv_same_embed_dim":  # which nn.TransformerEncoderLayer asks its attention for
            return getattr(self.bare, name)
        return super().__getattr__(name)

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__["_view"] = _view(replica, type(self.bare))
        return replica


def _view(wrapper: Substitution, kind: type[nn.Module]) -> nn.Module:
    view: nn.Module = object.__new__(_view_class(kind))  # type: ignore[arg-type]  # a class does hash
    view.__dict__["_wrapper"] = wrapper
    return view


@functools.cache
def _view_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of the views of a class of modules."""

    def read(view: Any, name: str) -> Any:
        wrapper = view.__dict__["_wrapper"]
        if name in wrapper.replaces and wrapper.enabled and not wrapper.merged:
            return wrapper.value() if name == wrapper.parameter else getattr(wrapper, name)
        return getattr(_behind(wrapper), name)

    def write(view: Any, name: str, value: Any) -> None:
        setattr(_behind(view.__dict__["_wrapper"]), name, value)

    def delete(view: Any, name: str) -> None:
        delattr(_behind(view.__dict__["_wrapper"]), name)

    def make_again(view: Any, *_: object) -> Any:  # of a copied or unpickled wrapper
        return _view, (view.__dict__["_wrapper"], kind)

    methods = {
        "__getattr__": read,
        "__setattr__": write,
        "__delattr__": delete,
        "__reduce_ex__": make_again,
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (kind,), methods)


def _behind(wrapper: Substitution) -> nn.Module:
    """Return what a view reads through to: the view of a substitution further in, or the bare module."""
    inner = wrapper.base
    while isinstance(inner, InjectedModule):
        if isinstance(inner, Substitution):
            behind: nn.Module = inner.__dict__["_view"]
            return behind
        inner = inner.base
    return inner
