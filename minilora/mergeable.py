"""`Mergeable`: a substitution whose value can be formed, and swapped in for a time or for good.

merge       W_eff takes the parameter's place; the original is kept, untouched
unmerge     the very same original comes back
fused       W_eff stays, and the original is let go
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MergeError, MiniLoRAError
from .linear import is_managed, is_plain
from .module import InjectedModule, signable
from .torch_internals import own_tensors, put_parameter
from .view import Substitution


class Mergeable(Substitution):
    """A substitution whose value, `effective_weight`, can take the parameter's place as a tensor."""

    _original: tuple[nn.Parameter] | None = None
    """The parameter that was there before merging. In a tuple: a bare one would register itself."""

    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return what the base computes with, as a new tensor of the parameter's shape.

        Args:
            dtype: that it is rounded to, once; None means the parameter's own.
        """
        raise NotImplementedError

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
        if self._original is not None:
            return self._original[0]
        weight: Tensor = getattr(self.bare, self.parameter)
        return weight

    @property
    def merged(self) -> bool:
        """Whether the base computes with W_eff at present."""
        return self._original is not None

    @torch.no_grad()
    def merge_problem(self, dtype: torch.dtype | None = None) -> str | None:
        """Return why W_eff cannot be formed and take W's place, or None.

        Args:
            dtype: that W_eff would be rounded to; None means W's own.
        """
        weights = self.replaced_by_merging()
        if not weights:
            return self.weight_problem()
        if not self.merged and is_merged(weights[0]):
            return "it is merged in another model, which shares the layer: unmerge that one first"
        if weights[0].is_meta and is_managed(self.bare):
            return (
                "its weight is offloaded and has no values here: merge or fuse before dispatching the model"
            )
        return self._overflow(weights[0], dtype or weights[0].dtype)

    def weight_problem(self) -> str:
        """Return why the base's weight is not one that W_eff can be formed from and take the place of."""
        return f"{self.parameter!r} of {type(self.bare).__name__} is no longer a parameter of its own"

    def _overflow(self, weight: Tensor, dtype: torch.dtype) -> str | None:
        """Return how many values of W_eff are infinite or NaN where W's are not, in words, or None.

        W_eff is formed only where a bound on its values says that it may be needed.
        """
        reach = self.reach()
        if weight.is_meta or reach.is_meta or not weight.numel():
            return None
        low, high = torch.aminmax(weight)
        bound = torch.maximum(low.double().abs(), high.double().abs()) + reach.to(weight.device)
        if bound.item() < torch.finfo(dtype).max / 2:
            return None
        lost = ~torch.isfinite(self.effective_weight(dtype)) & torch.isfinite(weight)
        if not (count := int(lost.sum())):
            return None
        return (
            f"{count} of {weight.numel()} values of W + scaling B A are not finite in {dtype}: A or B holds "
            "NaN or inf, or the values are too large for it"
        )

    def replaced_by_merging(self) -> tuple[nn.Parameter, ...]:
        """Return W in the base's layout; nothing where it is no plain parameter."""
        weight = self._original[0] if self._original else own_tensors(self.bare).get(self.parameter)
        return (weight,) if is_plain(weight) and isinstance(weight, nn.Parameter) else ()

    @torch.no_grad()
    def merge(self) -> None:
        """Swap W_eff in as the base's weight; W itself is kept, untouched. Inverse: `unmerge`.

        Merging a merged layer changes nothing. Interrupted at any point, `unmerge` sets it right.

        Raises:
            MergeError: when the base's weight is quantised or otherwise not a plain tensor.
        """
        if self.merged:
            return
        originals = self.replaced_by_merging()
        if not originals:
            raise MergeError(self.weight_problem())
        merged = nn.Parameter(self.effective_weight(), requires_grad=originals[0].requires_grad)
        merged.minilora_merged = True  # type: ignore[attr-defined]  # for another model that shares the layer
        self._original = (originals[0],)
        # A new Parameter: writing into the old one would reach whatever is tied to it.
        put_parameter(self.bare, self.parameter, merged)

    def unmerge(self) -> None:
        """Put the very same W back. Inverse: `merge`. On an unmerged layer nothing happens."""
        if self._original is not None:
            put_parameter(self.bare, self.parameter, self._original[0])
            self._original = None

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Compute with W for the time of a block. The merged weight is kept, so its return cannot fail."""
        if self._original is None:
            yield
            return
        (original,), merged = self._original, own_tensors(self.bare)[self.parameter]
        trained = self._versions()
        self.unmerge()
        try:
            yield
        finally:
            now = own_tensors(self.bare).get(self.parameter)
            same = now is original and (now.device, now.dtype) == (merged.device, merged.dtype)
            if same and self._versions() == trained:
                self._original = (original,)
                put_parameter(self.bare, self.parameter, merged)  # type: ignore[arg-type]
            else:  # moved, cast, tied, loaded or trained meanwhile
                self.merge()

    def _versions(self) -> list[tuple[int, int]]:
        """Return what tells whether something that is trained here was replaced or written to since."""
        return [(id(t), 0 if t.is_inference() else t._version) for t in self.saved_state().values()]

    @torch.no_grad()
    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the base with W_eff as its weight, rounded once to `dtype`; W and the update are let go."""
        original = self.unmerged_weight()
        weight = nn.Parameter(self.effective_weight(dtype), requires_grad=original.requires_grad)
        self._original = None
        put_parameter(self.bare, self.parameter, weight)
        return self.base

    def signed_weight(self) -> Tensor | str | None:
        """Return the parameter as it is without any injection, merged or not; or why it has no values."""
        return signable(self._original[0] if self._original else own_tensors(self.bare).get(self.parameter))

    # torch has no public hook for what is moved and cast.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mergeable:
        """Move or cast the kept original with the rest, so that unmerging needs no second thought."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._original is not None:
            # By torch's own rules: the object stays, and its ties, wherever they would stay in a module.
            self._original = (nn.ParameterList(self._original)._apply(fn)[0],)  # type: ignore[no-untyped-call]
        return self


def is_merged(weight: Tensor | None) -> bool:
    """Return whether a weight is one that `LoRA.merge` put in place."""
    return getattr(weight, "minilora_merged", False)


def _show_original(layer: Mergeable, state_dict: dict[str, Any], prefix: str, _: object) -> None:
    """Let `state_dict` have the original W even when merged, so that no update counts twice."""
    if layer._original is None:
        return
    below, base = f"{prefix}base.", layer.base
    while isinstance(base, InjectedModule):
        below, base = f"{below}base.", base.base
    key = f"{below}{layer.parameter}"
    if key in state_dict:
        original = layer._original[0]
        state_dict[key] = original if isinstance(state_dict[key], nn.Parameter) else original.detach()


def _refuse_to_load_when_merged(
    layer: Mergeable, state_dict: dict[str, Any], prefix: str, *rest: Any
) -> None:
    """Keep `load_state_dict` from writing into a merged weight, which `unmerge` would throw away."""
    if layer.merged:
        error_msgs: list[str] = rest[-1]
        error_msgs.append(f"{prefix[:-1]!r} is merged: call minilora.unmerge(model), then load")
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]  # or torch would go on and write
