"""`LoRALinear`: low-rank adaptation of a linear layer (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    x ──┬──────────── base: W (out, in), b ────────────┬── y
        └── dropout ── A (r, in) ── B (out, r) ── · s ─┘

    y = x W^T + b + s (dropout(x) A^T) B^T        W_eff = W + s B A        s = alpha / r

W and b belong to the base and stay as they are; A and B are trained. B starts at zero, so that injection
changes nothing until a step is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LoRAConfig
from .errors import MergeError, TargetError
from .functional import add_low_rank, effective_linear, effective_weight, prefers_weight_form
from .linear import computes_plainly, has_plain_weight, linear_shape
from .module import InjectedModule, adapter_dtype, device_of, generator_for


class LoRALinear(InjectedModule):
    """A linear layer with a trainable low-rank update beside it.

    Args:
        base: an `nn.Linear`, transformers' `Conv1D`, or any module with `in_features` and `out_features`.
        config: rank, scale, dropout, initialisation and dtype.
        site: the name from which A's initial values are drawn, with torch's seed.
        device: of the new parameters; None means the base's.

    Raises:
        TargetError: when the base is not linear, or the rank exceeds its smaller side.
    """

    kind = "lora"

    lora_A: nn.Parameter  # (r, in)
    lora_B: nn.Parameter  # (out, r)

    def __init__(
        self, base: nn.Module, config: LoRAConfig, *, site: str = "", device: torch.device | None = None
    ) -> None:
        shape = linear_shape(base)
        if shape is None:
            raise TargetError(f"{type(base).__name__} is not a linear layer")
        if config.r > min(shape.out_features, shape.in_features):
            raise TargetError(
                f"r = {config.r} exceeds the smaller side of a layer of "
                f"({shape.out_features}, {shape.in_features})"
            )
        super().__init__(base)
        self.config = config
        self.in_features, self.out_features = shape.in_features, shape.out_features
        self.scaling = config.scaling
        self._transposed = shape.transposed
        # In a tuple, because a Parameter as an attribute would register itself.
        self._original: tuple[nn.Parameter] | None = None
        device, dtype = device or device_of(base), adapter_dtype(base, config.dtype)
        self.lora_A = nn.Parameter(torch.empty(config.r, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, config.r, device=device, dtype=dtype))
        self.reset_parameters(site)

    @torch.no_grad()
    def reset_parameters(self, site: str = "") -> None:
        """Draw A anew, from torch's seed and the site's name, and set B to zero."""
        nn.init.zeros_(self.lora_B)
        if self.lora_A.is_meta:
            return
        # float32 on the CPU, so that all devices and dtypes start from one draw.
        draw = torch.empty(self.lora_A.shape, device="cpu", dtype=torch.float32)
        generator = generator_for(f"{site}.lora_A")
        if self.config.init == "kaiming":
            bound = 1 / math.sqrt(self.in_features)
            draw.uniform_(-bound, bound, generator=generator)
        else:
            draw.normal_(0.0, 1 / self.config.r, generator=generator)
        self.lora_A.copy_(draw)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the base's output dtype."""
        if self.merged or not self.enabled:
            return self.base(x)  # type: ignore[no-any-return]
        if self._takes_weight_form(x):
            weight, A, B = self._unmerged_weight(), self.lora_A, self.lora_B
            return effective_linear(x, weight, self.bias, A, B, self.scaling, transposed=self._transposed)
        y: Tensor = self.base(x)
        x = F.dropout(x, self.config.dropout, self.training)
        return add_low_rank(y, x, self.lora_A, self.lora_B, self.scaling)

    def _takes_weight_form(self, x: Tensor) -> bool:
        """Return whether W_eff may stand for the base's own call here, and is the cheaper way."""
        if self.training and self.config.dropout:
            return False
        if not prefers_weight_form(x.numel() // self.in_features, self.out_features, self.in_features):
            return False
        if not computes_plainly(self.base):
            return False
        weight, bias = self._unmerged_weight(), self.bias
        return (
            # In 16 bits W_eff would round small updates away; under autocast W itself is still whole.
            weight.dtype in (torch.float32, torch.float64)
            and (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type))
            # The weight form has no gradient for what somebody has thawed.
            and not (weight.requires_grad or (bias is not None and bias.requires_grad))
        )

    def delta_weight(self) -> Tensor:
        """Return s B A, (out, in), in A's dtype, whatever the base's layout."""
        return self.lora_B @ self.lora_A * self.scaling

    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W_eff = W + s B A in the base's layout, from the unmerged W; `functional` defines it.

        Raises:
            MergeError: when the base's weight is quantised or otherwise not a plain tensor.
        """
        if not has_plain_weight(self.base):
            raise MergeError(str(self.merge_problem()))
        return effective_weight(
            self._unmerged_weight(),
            self.lora_A,
            self.lora_B,
            self.scaling,
            transposed=self._transposed,
            dtype=dtype,
        )

    @property
    def weight(self) -> Tensor:
        """The weight that outside code may read and compute with: what this layer applies at present.

        It is built at each read, (out, in) or, on a `Conv1D`, (in, out); the forward pass never reads it.
        Dropout, which acts on activations, is not in it.

        Raises:
            MergeError: (a TypeError) when the base's weight is quantised or otherwise not a plain tensor.
        """
        if self.merged or not self.enabled:
            weight: Tensor = self.base.weight  # type: ignore[assignment]
            return weight
        return self.effective_weight()

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, (out,), or None."""
        bias: Tensor | None = getattr(self.base, "bias", None)
        return bias

    @property
    def merged(self) -> bool:
        """Whether the base computes with W_eff at present."""
        return self._original is not None

    def merge_problem(self) -> str | None:
        """Return why W_eff cannot be formed and take W's place, or None."""
        if has_plain_weight(self.base):
            if "weight" in self.base._parameters:
                return None
            return (
                f"the weight of {type(self.base).__name__} is a buffer, or computed from other parameters "
                "(a parametrization, pruning), so nothing can take its place; run it unmerged, or make it a "
                "plain parameter first: torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
            )
        weight = getattr(self.base, "weight", None)
        dtype = f" of {weight.dtype}" if isinstance(weight, Tensor) else ""
        return (
            f"the weight of {type(self.base).__name__}, a {type(weight).__name__}{dtype}, is not a plain "
            "floating-point tensor, so W + scaling B A cannot be formed; run it unmerged, or load the base "
            "in floating point"
        )

    @torch.no_grad()
    def merge(self) -> None:
        """Swap W_eff in as the base's weight; W itself is kept, untouched. Inverse: `unmerge`.

        Merging a merged layer changes nothing.

        Raises:
            MergeError: when the base's weight is quantised or otherwise not a plain tensor.
        """
        if self.merged:
            return
        original = self._unmerged_weight()
        merged = nn.Parameter(self.effective_weight(), requires_grad=original.requires_grad)
        self._original = (original,)
        # A new Parameter: writing into the old one would reach whatever is tied to it.
        self.base.weight = merged

    def unmerge(self) -> None:
        """Put the very same W back. Inverse: `merge`. On an unmerged layer nothing happens."""
        if self._original is not None:
            self.base.weight = self._original[0]
            self._original = None

    @torch.no_grad()
    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the base with W_eff as its weight, rounded once to `dtype`; W and the update are let go."""
        original = self._unmerged_weight()
        weight = self.effective_weight(dtype)
        self._original = None
        self.base.weight = nn.Parameter(weight, requires_grad=original.requires_grad)
        return self.base

    def base_weight(self) -> object:
        """Return W, (out, in) or, on a `Conv1D`, (in, out), whether merged or not."""
        return super().base_weight() if self._original is None else self._original[0]

    def _unmerged_weight(self) -> nn.Parameter:
        return self.base_weight()  # type: ignore[return-value]

    def description(self) -> str:
        """Return the kind, rank and scale in a few words."""
        details = [f"r={self.config.r}", f"alpha={self.config.alpha:g}"]
        details += ["rslora"] if self.config.rslora else []
        details += [f"dropout={self.config.dropout:g}"] if self.config.dropout else []
        return f"LoRA {' '.join(details)}"

    def extra_repr(self) -> str:
        """Return what `print(model)` shows beside the name."""
        return f"{self.description()}, merged={self.merged}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        """Move or cast the kept original with the rest, so that unmerging needs no second thought."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._original is not None:
            # By torch's own rules: the object stays, and its ties, wherever they would stay in a module.
            self._original = (nn.ParameterList(self._original)._apply(fn)[0],)  # type: ignore[no-untyped-call]
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state; `base.weight` is the original W even when merged, so no update counts twice."""
        state = super().state_dict(*args, **kwargs)
        if self._original is not None:
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            original = self._original[0]
            state[f"{prefix}base.weight"] = original if kwargs.get("keep_vars") else original.detach()
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.merged:
            error_msgs: list[str] = kwargs.get("error_msgs", args[-1] if args else [])
            error_msgs.append(f"{prefix[:-1]!r} is merged: call minilora.unmerge(model), then load")
            for key in [key for key in state_dict if key.startswith(prefix)]:
                del state_dict[key]  # or torch would go on and write into the merged weight
            return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
