"""`LoRALinear`: the fast path of `LoRA` for linear layers, quantised ones included.

Where the base's call does nothing but y = x W^T + b, the layer computes in its stead, with a backward of its
own: in the weight form or in the delta form, whichever moves less memory (`variants.choice` tells). Else, and
while torch.compile is tracing, it calls the base as it is and adds the low-rank product. A quantised layer
has no weight to substitute, and needs none here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .config import LoRAConfig
from .errors import TargetError
from .functional import add_low_rank
from .layout import Layout
from .linear import call_problem, is_plain, linear_shape
from .lora import LoRA
from .module import InjectedModule, bare_module
from .quantized.layers import require_gradient, why_not_merged
from .torch_internals import AttentionOutput, own_tensors
from .variants.choice import can_stand_in, takes_weight_form
from .variants.delta_linear import delta_linear
from .variants.dora_linear import magnitude_linear
from .variants.dropout import dropped
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
            MiniLoRAError: when the layer is merged and would be trained, which could have no effect; when a
                quantised base in training cuts the gradient of its input.
        """
        if self.merged or not self.enabled:
            self.require_unmerged_to_train()
            return self.base(*args, **kwargs)  # type: ignore[no-any-return]
        dropout = self.config.dropout if self.training else 0.0
        if len(args) == 1 and not kwargs and self._can_stand_in(args[0]):
            return self._in_its_stead(args[0], dropout)
        y: Tensor = self.base(*args, **kwargs)  # which knows whether it can be called so
        x = args[0] if args else next(iter(kwargs.values()))
        require_gradient(self, x, y)
        bias = self.lora_bias if self.config.lora_bias else None
        return self.rescaled(add_low_rank(y, dropped(x, dropout), *self.factors(), self.scaling, bias))  # type: ignore[no-any-return]

    def _can_stand_in(self, x: Tensor) -> bool:
        # In 16 bits b + s beta would be rounded, and small changes with it.
        rounded = self.config.lora_bias and self.unmerged_weight().dtype.itemsize == 2
        return can_stand_in(self.base, x) and not rounded

    def _in_its_stead(self, x: Tensor, dropout: float) -> Tensor:
        weight, transposed = self.unmerged_weight(), self.layout.transposed
        known = x, weight, self.bias, *self.factors(), self.scaling
        if dropout or not takes_weight_form(x, weight.dtype, self.layout):
            return self.rescaled(delta_linear(*known, transposed=transposed, dropout=dropout))  # type: ignore[no-any-return]
        if self.config.dora:
            return magnitude_linear(*known, self.lora_magnitude, transposed=transposed)
        return effective_linear(*known, transposed=transposed)

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
        return why_not_merged(self.bare)
