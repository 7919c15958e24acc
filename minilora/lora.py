"""`LoRA`: low-rank adaptation of any layer (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    x ──┬──────────── base: W (out, in), b ────────────┬── y
        └── dropout ── A (r, in) ── B (out, r) ── · s ─┘

    y = x W^T + b + s (dropout(x) A^T) B^T        W_eff = W + s B A        s = alpha / r

W and b belong to the base and stay as they are; A and B are trained. B starts at zero, so that injection
changes nothing until a step is taken. Where B has a bias, b + s beta stands in the place of b. Here the base
runs its own forward with W_eff as a value in W's place; `lora_linear` has the fast path for linear layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .config import LoRAConfig
from .errors import MergeError, MiniLoRAError, TargetError
from .functional import effective_weight
from .layout import Layout, layout_of
from .linear import is_plain
from .mergeable import Mergeable, is_merged
from .module import bare_module, device_of, dtype_for, generator_for
from .torch_internals import TransposedConvolution, own_tensors, put_parameter
from .variants import dora
from .variants.bias import effective_bias, shape_of_bias
from .variants.initial import change_since, initial_values
from .weight import EffectiveWeight


class LoRA(Mergeable):
    """A layer of any kind with a trainable low-rank update beside one of its weights.

    Args:
        base: the module that owns the weight, or wrappers around it.
        config: rank, scale, dropout, initialisation and dtype.
        site: the name from which A's initial values are drawn, with torch's seed.
        device: of the new parameters; None means the weight's.
        parameter: the weight's name in the module.

    Raises:
        TargetError: when the weight is no matrix of floating-point numbers, or cannot be substituted, or
            dropout has nothing to act on in a layer of this kind.

    Example:
        >>> layer = minilora.LoRA(nn.Conv2d(3, 8, 5), minilora.LoRAConfig(r=2))
        >>> layer.lora_A.shape, layer.lora_B.shape
        (torch.Size([2, 75]), torch.Size([8, 2]))
        >>> torch.equal(layer.weight, layer.base.weight)    # B is zero at first
        True
    """

    kind = "lora"
    position = 2

    config: LoRAConfig
    lora_A: nn.Parameter  # (..., r, in)
    lora_B: nn.Parameter  # (..., out, r)
    lora_A_start: nn.Parameter  # A0, frozen, where the update is the change since A0 and B0
    lora_B_start: nn.Parameter  # B0, frozen
    lora_magnitude: nn.Parameter  # (out,), where the config says DoRA
    lora_bias: nn.Parameter  # (out,), where the config says so

    def __init__(
        self,
        base: nn.Module,
        config: LoRAConfig,
        *,
        site: str = "",
        device: torch.device | None = None,
        parameter: str = "weight",
    ) -> None:
        bare = bare_module(base)
        super().__init__(base, parameter)
        weight = self.plain_parameter()
        if config.dropout and isinstance(bare, (nn.MultiheadAttention, nn.Bilinear, TransposedConvolution)):
            raise TargetError(f"dropout has no input to act on inside {type(bare).__name__}; set dropout=0")
        self._set_up(config, layout_of(bare, parameter, weight), site, device)

    def _set_up(self, config: LoRAConfig, layout: Layout, site: str, device: torch.device | None) -> None:
        if is_merged(own_tensors(self.bare).get(self.parameter)):
            raise TargetError("it is merged in another model, which shares the layer: unmerge that one first")
        self.config = config
        self.site = site
        self.layout = layout
        self.scaling = config.scaling
        self._originals = None
        device, dtype = device or device_of(self.bare), dtype_for(self.bare, config.torch_dtype)
        shapes = (*layout.leading, config.r, layout.inputs), (*layout.leading, layout.outputs, config.r)
        for name, shape in zip(("lora_A", "lora_B"), shapes, strict=True):
            # Registering would find the A and B of a wrapper further in, and take them for its own.
            put_parameter(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            if self.config.begins_at_weight:
                start = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
                put_parameter(self, f"{name}_start", start)
        self._outputs_lie_in = dora.dimension_of_outputs(self.bare) if config.dora else None
        if config.dora:
            if self._outputs_lie_in is None or self.parameter != "weight":
                raise TargetError(
                    f"DoRA scales the outputs of a layer one by one, and {type(self.bare).__name__} is none "
                    "that it is known for (linear layers, convolutions and embeddings, with plain weights); "
                    "leave it out, or set dora=False"
                )
            magnitude = torch.empty(layout.outputs, device=device, dtype=dtype)
            put_parameter(self, "lora_magnitude", nn.Parameter(magnitude))
        self.replaces = (self.parameter, *(("bias",) if config.lora_bias else ()))
        if config.lora_bias:
            shape = shape_of_bias(self.bare, self.base, self.parameter, layout.outputs)
            put_parameter(self, "lora_bias", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.listen_to_state_dicts()
        self.reset_parameters(site)

    @torch.no_grad()
    def reset_parameters(self, site: str = "") -> None:
        """Begin anew, as `initial` says, from torch's seed and the site's name; the magnitude is W's own."""
        if self.lora_A.is_meta:
            return
        weight = own_tensors(self.bare).get(self.parameter)
        generator = generator_for(f"{site}.lora_A")
        A, B = initial_values(self.config, self.layout, weight if is_plain(weight) else None, generator)
        if isinstance(padding := getattr(self.bare, "padding_idx", None), int):
            A[:, padding] = 0.0  # no gradient reaches it, so its look-up stays what it is
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        if self.config.begins_at_weight:
            self.lora_A_start.copy_(self.lora_A)
            self.lora_B_start.copy_(self.lora_B)
        if self.config.lora_bias:
            self.lora_bias.zero_()
        if self.config.dora and not self.unmerged_weight().is_meta:
            self.lora_magnitude.copy_(self._norms(self.unmerged_weight()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base with W_eff in the place of W.

        Raises:
            MiniLoRAError: when the layer is merged and would be trained, which could have no effect; or
                dropout has nothing to act on in what the base computes.
        """
        self.require_unmerged_to_train()
        return self.rescaled(super().forward(*args, **kwargs))

    def rescaled(self, y: Any) -> Any:
        """Return the layer's output with each output scaled by its magnitude, where the config says DoRA."""
        if self._outputs_lie_in is None or self.merged or not self.enabled:
            return y
        bias = getattr(self, "bias", None)
        factors = dora.factors(self.lora_magnitude, self._norms(self.unmerged_weight()))
        return dora.rescaled(y, factors, bias, self._outputs_lie_in)

    def _norms(self, weight: Tensor) -> Tensor:
        A, B = self.factors()
        return dora.norms(weight, A, B, self.scaling, transposed=self.layout.transposed)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return what the layer computes with as A and B.

        Where the update is the change since A0 and B0, these are [A; A0] and [B, -B0], of rank 2r.
        """
        if not self.config.begins_at_weight:
            return self.lora_A, self.lora_B
        return change_since(self.lora_A, self.lora_B, self.lora_A_start, self.lora_B_start)

    def value(self) -> EffectiveWeight:
        """Return W + s B A as a value that need not be formed."""
        transposed = self.layout.transposed
        A, B = self.factors()
        left, right = (A.mT, B.mT) if transposed else (B, A)
        dropout = self.config.dropout if self.training else 0.0
        return EffectiveWeight(getattr(self.bare, self.parameter), left, right, self.scaling, self, dropout)

    def tell_of_forming(self, function: str) -> None:
        """Warn, once for each function, that W_eff is formed for it.

        Raises:
            MiniLoRAError: when dropout is on, which would have no effect.
        """
        if self.training and self.config.dropout:
            raise MiniLoRAError(
                f"{self.called()}: dropout has nothing to act on in {function}, which computes with the "
                "whole weight; set dropout=0"
            )
        super().tell_of_forming(function)

    def delta_weight(self) -> Tensor:
        """Return s B A, (..., out, in), in A's dtype, whatever the base's layout."""
        A, B = self.factors()
        return B @ A * self.scaling

    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W_eff = W + s B A in the base's layout, from the unmerged W; with DoRA, that scaled.

        `functional` and `dora` define them.

        Raises:
            MergeError: when the base's weight is quantised or otherwise not a plain tensor.
        """
        weight = self.unmerged_weight()
        if not is_plain(weight):
            raise MergeError(self.weight_problem())
        (A, B), transposed = self.factors(), self.layout.transposed
        if self.config.dora:
            m = self.lora_magnitude
            return dora.effective_weight(weight, A, B, self.scaling, m, transposed=transposed, dtype=dtype)
        return effective_weight(weight, A, B, self.scaling, transposed=transposed, dtype=dtype)

    def effective_bias(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return b + s beta, from the unmerged b; in b's dtype, or W's, unless another is given."""
        bias = self.unmerged("bias")
        own = next(filter(is_plain, (bias, self.unmerged_weight(), self.lora_bias)))  # W may be quantised
        return effective_bias(bias, self.lora_bias, self.scaling, dtype or own.dtype)

    def effective_values(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return W_eff, and the effective bias where B has one, by their names in the base."""
        values = super().effective_values(dtype)
        return {**values, "bias": self.effective_bias(dtype)} if self.config.lora_bias else values

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, (out,), or None; where B has one, what this layer applies at present."""
        if self.config.lora_bias and self.enabled and not self.merged:
            return self.effective_bias()
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]  # perhaps an AttributeError, as is right
        return bias

    def reach(self) -> Tensor:
        """Return a bound on the values of s B A: the largest sum of a row of |B|, times the largest |A|.

        With DoRA, on those of c V - W: no value of c V exceeds the largest magnitude. Where B has a bias, on
        b + s beta, too.
        """
        moved = self.effective_bias(torch.float64).abs().max() if self.config.lora_bias else 0.0
        if self.config.dora:
            m = self.lora_magnitude.detach().double().abs().max()
            return m + self.unmerged_weight().abs().max().double() + moved
        A, B = (factor.detach().double().abs() for factor in self.factors())
        return abs(self.scaling) * B.sum(-1).max() * A.max() + moved

    def substituted(self) -> Tensor:
        """Return the weight that outside code may read and compute with: what this layer applies at present.

        It is built at each read, in the base's layout; the forward pass never reads it. Dropout, which acts
        on activations, is not in it.

        Raises:
            MergeError: (a TypeError) when the base's weight is quantised or otherwise not a plain tensor.
        """
        return self.effective_weight()

    def initial_value(self, name: str, tensor: Tensor, bare: dict[str, Tensor]) -> Tensor:
        """Keep what is trained; a magnitude that is not trained yet is that of the weight that comes."""
        if name == "lora_magnitude" and "weight" in bare and not self.lora_B.any():
            return self._norms(bare["weight"]).to(tensor)
        return tensor

    def description(self) -> str:
        """Return the kind, rank and scale in a few words."""
        details = [f"r={self.config.r}", f"alpha={self.config.alpha:g}"]
        details += ["rslora"] if self.config.rslora else []
        details += [f"dropout={self.config.dropout:g}"] if self.config.dropout else []
        details += ["lora_bias"] if self.config.lora_bias else []
        return f"{'DoRA' if self.config.dora else 'LoRA'} {' '.join(details)}"

    def extra_repr(self) -> str:
        """Return what `print(model)` shows beside the name."""
        return f"{self.description()}, merged={self.merged}"
