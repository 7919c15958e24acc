"""`Mergeable`: a substitution whose values can be formed, and swapped in for a time or for good.

merge       W_eff takes the parameter's place; the original is kept, untouched
unmerge     the very same original comes back
fused       W_eff stays, and the original is let go
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MergeError, MiniLoRAError
from .linear import is_managed, is_plain
from .module import InjectedModule, signable
from .torch_internals import own_parameters, own_tensors, put_parameter
from .view import Substitution


class Mergeable(Substitution):
    """A substitution whose value, `effective_weight`, can take the parameter's place as a tensor."""

    _originals: dict[str, nn.Parameter | None] | None = None
    """The parameters that were there before merging. In a dictionary: a bare one would register itself."""

    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return what the base computes with, as a new tensor of the parameter's shape.

        Args:
            dtype: that it is rounded to, once; None means the parameter's own.
        """
        raise NotImplementedError

    def effective_values(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return `effective_weight`, and what else takes a parameter's place, by their names in the base."""
        return {self.parameter: self.effective_weight(dtype)}

    def reach(self) -> Tensor:
        """Return a bound on how far the values of `effective_weight` are from the parameter's, in float64."""
        raise NotImplementedError

    def listen_to_state_dicts(self) -> None:
        """Register what keeps a merged weight out of `state_dict` and of `load_state_dict`."""
        self.register_load_state_dict_pre_hook(_refuse_to_load_when_merged)  # type: ignore[no-untyped-call]
        self.register_state_dict_post_hook(_show_original)  # type: ignore[no-untyped-call]

    def require_unmerged_to_train(self) -> None:
        """Raise where a merged layer would be trained.

        Raises:
            MiniLoRAError: in training mode with gradients.
        """
        if self.merged and self.training and torch.is_grad_enabled():
            raise MiniLoRAError(
                "a merged layer does not train: call minilora.unmerge(model) before training, or "
                "model.eval() or torch.no_grad() to run it merged"
            )

    def unmerged_weight(self) -> Tensor:
        """Return W, whether merged or not."""
        kept = None if self._originals is None else self._originals[self.parameter]
        weight: Tensor = getattr(self.bare, self.parameter) if kept is None else kept
        return weight

    def unmerged(self, name: str) -> nn.Parameter | None:
        """Return what the base has, or had before merging, under a parameter's name."""
        return (self._originals or own_parameters(self.bare)).get(name)

    @property
    def merged(self) -> bool:
        """Whether the base computes with W_eff at present."""
        return self._originals is not None

    @torch.no_grad()
    def merge_problem(self, dtype: torch.dtype | None = None) -> str | None:
        """Return why W_eff cannot be formed and take W's place, or None.

        Args:
            dtype: that W_eff would be rounded to; None means W's own.
        """
        weight = self.replaced_by_merging().get(self.parameter)
        if weight is None:
            return self.weight_problem()
        if not self.merged and is_merged(weight):
            return "it is merged in another model, which shares the layer: unmerge that one first"
        if weight.is_meta and is_managed(self.bare):
            return (
                "its weight is offloaded and has no values here: merge or fuse before dispatching the model"
            )
        return self._overflow(weight, dtype or weight.dtype)

    def weight_problem(self) -> str:
        """Return why the base's weight is not one that W_eff can be formed from and take the place of."""
        return f"{self.parameter!r} of {type(self.bare).__name__} is no longer a parameter of its own"

    def _overflow(self, weight: Tensor, dtype: torch.dtype) -> str | None:
        """Return how many merged values are infinite or NaN where the base's are not, in words, or None.

        They are formed only where a bound on them says that it may be needed.
        """
        reach = self.reach()
        if weight.is_meta or reach.is_meta or not weight.numel():
            return None
        low, high = torch.aminmax(weight)
        bound = torch.maximum(low.double().abs(), high.double().abs()) + reach.to(weight.device)
        if bound.item() < torch.finfo(dtype).max / 2:
            return None
        for name, value in self.effective_values(dtype).items():
            lost, original = ~torch.isfinite(value), self.unmerged(name)
            if count := int((lost if original is None else lost & torch.isfinite(original)).sum()):
                what = "W + scaling B A" if name == self.parameter else f"the merged {name!r}"
                return (
                    f"{count} of {value.numel()} values of {what} are not finite in {dtype}: A or B holds "
                    "NaN or inf, or the values are too large for it"
                )
        return None

    def replaced_by_merging(self) -> dict[str, nn.Parameter]:
        """Return W in the base's layout, and what else is replaced; nothing where W is no plain parameter."""
        found = {name: p for name in self.replaces if (p := self.unmerged(name)) is not None}
        return found if is_plain(found.get(self.parameter)) else {}

    @torch.no_grad()
    def merge(self) -> None:
        """Swap W_eff in as the base's weight; W itself is kept, untouched. Inverse: `unmerge`.

        Merging a merged layer changes nothing. Interrupted at any point, `unmerge` sets it right.

        Raises:
            MergeError: when the base's weight is quantised or otherwise not a plain tensor.
        """
        if self.merged:
            return
        if not self.replaced_by_merging():
            raise MergeError(self.weight_problem())
        merged = self._as_parameters()
        for parameter in merged.values():
            parameter.minilora_merged = True  # type: ignore[attr-defined]  # for a model that shares the layer
        self._originals = {name: self.unmerged(name) for name in merged}
        self._put(merged)

    def unmerge(self) -> None:
        """Put the very same W back. Inverse: `merge`. On an unmerged layer nothing happens."""
        if self._originals is not None:
            self._put(self._originals)
            self._originals = None

    def _put(self, parameters: Mapping[str, nn.Parameter | None]) -> None:
        for name, parameter in parameters.items():
            put_parameter(self.bare, name, parameter)

    def _as_parameters(self, dtype: torch.dtype | None = None) -> dict[str, nn.Parameter]:
        """Return the merged values as new parameters, since writing into the old would reach what is tied."""
        trains = {name: p.requires_grad for name, p in self.replaced_by_merging().items()}
        values = self.effective_values(dtype).items()
        return {name: nn.Parameter(value, requires_grad=trains.get(name, False)) for name, value in values}

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Compute with W for the time of a block. The merged weight is kept, so its return cannot fail."""
        if self._originals is None:
            yield
            return
        originals = self._originals
        merged = {name: own_parameters(self.bare)[name] for name in originals}
        before = self._versions(originals)
        self.unmerge()
        try:
            yield
        finally:
            if self._versions(originals) == before:
                self._originals = originals
                self._put(merged)
            else:  # moved, cast, tied, loaded or trained meanwhile
                self.merge()

    def _versions(self, names: Iterable[str]) -> list[tuple[object, ...] | None]:
        """Return what tells whether a part of the merged values was replaced, moved or written to since."""
        parts = [*self.saved_state().values(), *map(self.unmerged, names)]
        return [
            t if t is None else (id(t), t.device, t.dtype, 0 if t.is_inference() else t._version)
            for t in parts
        ]

    @torch.no_grad()
    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the base with W_eff as its weight, rounded once to `dtype`; W and the update are let go."""
        parameters = self._as_parameters(dtype)
        self._originals = None
        self._put(parameters)
        return self.base

    def signed_weight(self) -> Tensor | str | None:
        """Return the parameter as it is without any injection, merged or not; or why it has no values."""
        return signable((self._originals or own_tensors(self.bare)).get(self.parameter))

    # torch has no public hook for what is moved and cast.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mergeable:
        """Move or cast the kept originals with the rest, so that unmerging needs no second thought."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._originals is not None:
            # By torch's own rules: the object stays, and its ties, wherever they would stay in a module.
            self._originals = dict(nn.ParameterDict(self._originals)._apply(fn).items())  # type: ignore[no-untyped-call]
        return self


def is_merged(weight: Tensor | None) -> bool:
    """Return whether a weight is one that `LoRA.merge` put in place."""
    return getattr(weight, "minilora_merged", False)


def _show_original(layer: Mergeable, state_dict: dict[str, Any], prefix: str, _: object) -> None:
    """Let `state_dict` have the originals even when merged, so that no update counts twice."""
    below, base = f"{prefix}base.", layer.base
    while isinstance(base, InjectedModule):
        below, base = f"{below}base.", base.base
    for name, original in (layer._originals or {}).items():
        if original is None:
            state_dict.pop(below + name, None)
        elif (shown := state_dict.get(below + name)) is not None:
            state_dict[below + name] = original if isinstance(shown, nn.Parameter) else original.detach()


def _refuse_to_load_when_merged(
    layer: Mergeable, state_dict: dict[str, Any], prefix: str, *rest: Any
) -> None:
    """Keep `load_state_dict` from writing into a merged weight, which `unmerge` would throw away."""
    if layer.merged:
        error_msgs: list[str] = rest[-1]
        error_msgs.append(f"{prefix[:-1]!r} is merged: call minilora.unmerge(model), then load")
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]  # or torch would go on and write
