"""`TrainableHead`, `TrainedParameter`: trained in full, as a copy, while the original stays as it was.

model.classifier: TrainableHead             model.norm: TrainedParameter, of "bias"
    .base       the original, frozen            .base       the module that owns the original
    .trained    its copy                        .trained    the copy, which stands in its place

The copy is trained, saved, and left behind by `fuse`; `eject` and `disabled` give the original back. As long
as it has learnt nothing, it takes the values of a bare model's checkpoint that is loaded; then it stays.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import TargetError, listed
from .frozen import thaw
from .module import InjectedModule, bare_module, require_called
from .quantized.weights import quantized_layers
from .torch_internals import own_parameters, put_parameter
from .view import Substitution


class TrainableHead(InjectedModule):
    """A trainable copy of a module, in its place. Made by the `trainable` argument of `minilora.inject`.

    Args:
        base: the module to be trained in full; a classifier head, most often.

    Raises:
        TargetError: when there is nothing in it that could be trained.

    Example:
        >>> model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
        >>> model = minilora.inject(model, "body", trainable=["head"])
        >>> type(model["head"]).__name__, model["head"].base.weight.requires_grad
        ('TrainableHead', False)
        >>> model["head"].trained.weight.requires_grad
        True
    """

    kind = "trainable"
    trains_whole_module = True

    def __init__(self, base: nn.Module) -> None:
        require_called(base)
        if not any(parameter.is_floating_point() for parameter in base.parameters()):
            raise TargetError("trainable names a module without floating-point parameters")
        if quantized_layers(base):
            raise TargetError("it is quantised, so only biases could be trained: keep it in floating point")
        super().__init__(base)
        self.trained = thaw(copy.deepcopy(base))
        for parameter in self.trained.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the copy, or the original inside `minilora.disabled`."""
        return self.answering()(*args, **kwargs)

    def saved_state(self) -> dict[str, Tensor]:
        """Return the copy's state under the names that the module itself has."""
        state: dict[str, object] = self.trained.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def signed_weight(self) -> None:
        """Return nothing: the head of a fresh base is random, and tells nothing of it."""

    def merge_problem(self, dtype: torch.dtype | None = None) -> str | None:
        """Return which values of the copy are not finite where the original's are, or None."""
        original: dict[str, object] = bare_module(self.base).state_dict(keep_vars=True)
        return not_finite(self.saved_state(), original)

    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the trained copy, which takes the original's place."""
        return self.trained

    def description(self) -> str:
        """Return the kind in a few words."""
        return f"trained in full ({type(bare_module(self.base)).__name__})"

    def answering(self) -> nn.Module:
        """Return the copy, or the original inside `minilora.disabled`."""
        return self.trained if self.enabled else self.base

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each tensor of the copy with the original's."""
        copies, originals = (m.state_dict(keep_vars=True).values() for m in (self.trained, self.base))
        yield from ((t, o) for t, o in zip(copies, originals, strict=True) if isinstance(t, Tensor))

    def reset_parameters(self, site: str = "") -> None:
        """Begin anew, from the original."""
        for copied, original in self._pairs():
            copied.data.copy_(original)

    def initial_value(self, name: str, tensor: Tensor, bare: dict[str, Tensor]) -> Tensor:
        """Keep what was learnt; a copy that has learnt nothing starts from what a bare checkpoint brings."""
        value = bare.get(name.removeprefix("trained."))
        # A copy, because load_state_dict(assign=True) would have both share the memory of one tensor.
        return tensor if value is None or _has_learnt(self._pairs()) else value.detach().clone()


class TrainedParameter(Substitution):
    """A trainable copy of one parameter, in its place: a bias, a norm, an embedding of positions.

    Args:
        base: the module that owns the parameter, or wrappers around it.
        parameter: its name in the module.

    Raises:
        TargetError: when the parameter is no floating-point tensor, or cannot be substituted.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> model = minilora.inject(model, "0", minilora.LoRAConfig(r=1), trainable=["1.bias"])
        >>> type(model[1]).__name__, model[1].bias is model[1].trained
        ('TrainedParameter', True)
    """

    kind = "trainable"
    position = 1

    trained: nn.Parameter
    """The copy, which is trained."""

    def __init__(self, base: nn.Module, parameter: str) -> None:
        super().__init__(base, parameter)
        original = own_parameters(self.bare)[parameter]
        if original is None or not original.is_floating_point():
            raise TargetError(f"trainable names {parameter!r}, which is no floating-point parameter")
        # Registering would find the copy of a wrapper further in, and take it for its own.
        put_parameter(self, "trained", nn.Parameter(original.detach().clone()))

    def placed_at(self, site: str) -> str:
        """Return the parameter's own name."""
        return f"{site}.{self.parameter}"

    def value(self) -> Tensor:
        """Return the copy."""
        return self.trained

    def substituted(self) -> Tensor:
        """Return the copy."""
        return self.trained

    def saved_state(self) -> dict[str, Tensor]:
        """Return the copy under the parameter's own name."""
        return {self.parameter: self.trained}

    def merge_problem(self, dtype: torch.dtype | None = None) -> str | None:
        """Return how many values of the copy are not finite where the original's are, or None."""
        return not_finite(self.saved_state(), own_parameters(self.bare), dtype)

    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the base with the copy as its parameter."""
        put_parameter(self.bare, self.parameter, self.trained)
        return self.base

    def description(self) -> str:
        """Return the kind in a few words."""
        return f"trained in full ({self.parameter})"

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the copy with the original."""
        yield self.trained, own_parameters(self.bare)[self.parameter]  # type: ignore[misc]

    def reset_parameters(self, site: str = "") -> None:
        """Begin anew, from the original."""
        for copied, original in self._pairs():
            copied.data.copy_(original)

    def initial_value(self, name: str, tensor: Tensor, bare: dict[str, Tensor]) -> Tensor:
        """Keep what was learnt, as `TrainableHead` does."""
        value = bare.get(self.parameter)
        return tensor if value is None or _has_learnt(self._pairs()) else value.detach().clone()


@torch.no_grad()
def _has_learnt(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Return whether a copy differs from its original; what has no values (meta) has learnt nothing."""
    return any(not (t.is_meta or o.is_meta) and not torch.equal(t.to(o), o) for t, o in pairs)


@torch.no_grad()
def not_finite(
    trained: Mapping[str, Tensor], original: Mapping[str, object], dtype: torch.dtype | None = None
) -> str | None:
    """Return in words what is infinite or NaN in trained copies, but not in the originals; or None.

    Args:
        trained: the copies, by name.
        original: what they are copies of, by the same names.
        dtype: that floating-point values would be rounded to; None means their own.
    """
    found = []
    for name, value in trained.items():
        if value.is_meta or not value.is_floating_point():
            continue
        to, before = dtype or value.dtype, original.get(name)
        lost = ~torch.isfinite(value.to(to))
        if isinstance(before, Tensor) and not before.is_meta and before.shape == lost.shape:
            lost &= torch.isfinite(before).to(lost.device)
        if count := int(lost.sum()):
            found.append(
                f"{count} of {value.numel()} values of {name!r}, trained in full, are not finite in {to}"
            )
    if not found:
        return None
    return f"{listed(found)}: the training brought NaN or inf, or the values are too large for it"
