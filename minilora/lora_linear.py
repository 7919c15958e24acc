"""`LoRALinear`: the fast path of `LoRA` for linear layers, quantised ones included.

It calls the base as it is and adds the low-rank product, or, where that moves less memory, computes with
W_eff formed for the call (`functional` tells when). A quantised layer has no weight to substitute, and needs
none here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .config import LoRAConfig
from .errors import TargetError
from .functional import add_low_rank, prefers_weight_form
from .layout import Layout
from .linear import call_problem, computes_plainly, is_plain, linear_shape
from .lora import LoRA
from .module import InjectedModule, bare_module
from .torch_internals import AttentionOutput, is_compiling, own_tensors
from .variants.dora_linear import magnitude_linear
from .variants.plain_linear import effective_linear


class LoRALinear(LoRA):
    """A linear layer with a trainable low-rank update beside it.

    Args:
        base: an `nn.Linear`, transformers' `Conv1D`, or any module with `in_features` and `out_features`.
        config: rank, scale, dropout, initialisation and dtype.
        site: the name from which A's initial values are drawn, with torch's seed.
        device: of the new parameters; None means the base's.

    Raises:
        TargetError: when the base is not linear, or computes with the merged weight of another model.

    Example:
        >>> layer = minilora.LoRALinear(nn.Linear(8, 6), minilora.LoRAConfig(r=2))
        >>> layer.lora_A.shape, layer.lora_B.shape
        (torch.Size([2, 8]), torch.Size([6, 2]))
        >>> torch.equal(layer.weight, layer.base.weight)    # B is zero at first
        True
    """

    def __init__(
        self, base: nn.Module, config: LoRAConfig, *, site: str = "", device: torch.device | None = None
    ) -> None:
        shape = linear_shape(bare_module(base))
        if shape is None:
            raise TargetError(f"{type(bare_module(base)).__name__} is not a linear layer")
        # Past `Substitution`: the base is called as it is, whatever its weight may be.
        InjectedModule.__init__(self, base)
        self.parameter = "weight"
        self.in_features, self.out_features = shape.in_features, shape.out_features
        layout = Layout(shape.out_features, shape.in_features, transposed=shape.transposed)
        self._set_up(config, layout, site, device)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., in) to (..., out), in the base's output dtype; called just as the base is.

        Raises:
            MiniLoRAError: when the layer is merged and would be trained, which could have no effect.
        """
        if self.merged or not self.enabled:
            self.require_unmerged_to_train()
            return self.base(*args, **kwargs)  # type: ignore[no-any-return]
        if len(args) == 1 and not kwargs and self._takes_weight_form(args[0]):
            return self._in_weight_form(args[0])
        y: Tensor = self.base(*args, **kwargs)  # which knows whether it can be called so
        x = args[0] if args else next(iter(kwargs.values()))
        x = F.dropout(x, self.config.dropout, self.training)
        bias = self.lora_bias if self.config.lora_bias else None
        return self.rescaled(add_low_rank(y, x, *self.factors(), self.scaling, bias))  # type: ignore[no-any-return]

    def _in_weight_form(self, x: Tensor) -> Tensor:
        weight, (A, B), transposed = self.unmerged_weight(), self.factors(), self.layout.transposed
        if self.config.dora:
            m = self.lora_magnitude
            return magnitude_linear(x, weight, self.bias, A, B, self.scaling, m, transposed=transposed)
        return effective_linear(x, weight, self.bias, A, B, self.scaling, transposed=transposed)

    def _takes_weight_form(self, x: Tensor) -> bool:
        """Return whether W_eff may stand for the base's own call here, and is the cheaper way."""
        if self.training and self.config.dropout:
            return False
        return fits_weight_form(self.base, x, self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:
        """What `LoRA.substituted` says, or the base's own weight while merged or disabled.

        Raises:
            MiniLoRAError: when the layer is merged and would be trained by reading its weight, as
                `nn.MultiheadAttention` does with its `out_proj`.
        """
        if self.merged or not self.enabled:
            if isinstance(self.bare, AttentionOutput):
                self.require_unmerged_to_train()
            return self.base.weight  # type: ignore[return-value]
        return self.substituted()

    def merge_problem(self, dtype: torch.dtype | None = None) -> str | None:
        """Return why W_eff cannot take W's place, as `LoRA` does, or would not do what this layer does."""
        if self.replaced_by_merging() and (problem := call_problem(self.bare)):
            return f"{problem}; merged, it may not do the same: run it unmerged"
        return super().merge_problem(dtype)

    def weight_problem(self) -> str:
        """Return why the base's weight is not one that W_eff can be formed from and take the place of."""
        name, weight = type(self.bare).__name__, own_tensors(self.bare).get("weight")
        computed = is_parametrized(self.bare, "weight") or isinstance(vars(self.bare).get("weight"), Tensor)
        if computed or is_plain(weight):
            return (
                f"the weight of {name} is a buffer, or computed from other parameters (a parametrization, "
                "pruning), so nothing can take its place; run it unmerged, or make it a plain parameter "
                "first: torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
            )
        weight = getattr(self.bare, "weight", None) if weight is None else weight
        dtype = f" of {weight.dtype}" if isinstance(weight, Tensor) else ""
        return (
            f"the weight of {name}, a {type(weight).__name__}{dtype}, is not a plain floating-point tensor, "
            "so W + scaling B A cannot be formed; run it unmerged, or load the base in floating point"
        )


def fits_weight_form(layer: nn.Module, x: Tensor, out_features: int, in_features: int) -> bool:
    """Return whether a linear layer called with W_eff in W's place does what is meant, and more cheaply.

    Args:
        layer: unmerged.
        x: (..., in), which it would be called with.
        out_features: of the layer.
        in_features: of the layer.
    """
    # A choice by the number of tokens would be a graph for each side of it, at every layer shape.
    if is_compiling() or x.is_nested:
        return False
    if not prefers_weight_form(x.numel() // in_features, out_features, in_features):
        return False
    if not computes_plainly(layer):
        return False
    weight, bias = own_tensors(layer)["weight"], own_tensors(layer).get("bias")
    return (
        # In 16 bits W_eff would round small updates away; under autocast W itself is still whole.
        weight.dtype in (torch.float32, torch.float64)
        and (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type))
        # The weight form has no gradient for what somebody has thawed.
        and not (weight.requires_grad or (bias is not None and bias.requires_grad))
    )
