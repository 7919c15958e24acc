"""`LoRALinear`: low-rank adaptation of a linear layer (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    x ──┬──────────── base: W (out, in), b ────────────┬── y
        └── dropout ── A (r, in) ── B (out, r) ── · s ─┘

    y = x W^T + b + s (dropout(x) A^T) B^T        W_eff = W + s B A        s = alpha / r

W and b belong to the base and stay as they are; A and B are trained. B starts at zero, so that injection
changes nothing until a step is taken.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .config import LoRAConfig, is_float_dtype
from .errors import MergeError, MiniLoRAError, TargetError
from .functional import add_low_rank, effective_linear, effective_weight, prefers_weight_form
from .linear import call_problem, computes_plainly, is_managed, linear_shape, plain_weight
from .module import InjectedModule, device_of, dtype_for, generator_for, signable
from .torch_internals import is_compiling, own_tensors, put_parameter


class LoRALinear(InjectedModule):
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

    kind = "lora"

    config: LoRAConfig
    lora_A: nn.Parameter  # (r, in)
    lora_B: nn.Parameter  # (out, r)

    def __init__(
        self, base: nn.Module, config: LoRAConfig, *, site: str = "", device: torch.device | None = None
    ) -> None:
        shape = linear_shape(base)
        if shape is None:
            raise TargetError(f"{type(base).__name__} is not a linear layer")
        if _is_merged(plain_weight(base)):
            raise TargetError("it is merged in another model, which shares the layer: unmerge that one first")
        super().__init__(base)
        self.config = config
        self.in_features, self.out_features = shape.in_features, shape.out_features
        self.scaling = config.scaling
        self._transposed = shape.transposed
        # In a tuple, because a Parameter as an attribute would register itself.
        self._original: tuple[nn.Parameter] | None = None
        device, dtype = device or device_of(base), dtype_for(base, config.torch_dtype)
        self.lora_A = nn.Parameter(torch.empty(config.r, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, config.r, device=device, dtype=dtype))
        self.register_load_state_dict_pre_hook(_refuse_to_load_when_merged)  # type: ignore[no-untyped-call]
        self.register_state_dict_post_hook(_show_original_weight)  # type: ignore[no-untyped-call]
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

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., in) to (..., out), in the base's output dtype; called just as the base is.

        Raises:
            MiniLoRAError: when the layer is merged and would be trained, which could have no effect.
        """
        if self.merged or not self.enabled:
            if self.merged and self.training and torch.is_grad_enabled():
                raise MiniLoRAError(
                    "a merged layer does not train: call minilora.unmerge(model) before training, or "
                    "model.eval() or torch.no_grad() to run it merged"
                )
            return self.base(*args, **kwargs)  # type: ignore[no-any-return]
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if self._takes_weight_form(x):
            weight, A, B = self._unmerged_weight(), self.lora_A, self.lora_B
            return effective_linear(x, weight, self.bias, A, B, self.scaling, transposed=self._transposed)
        y: Tensor = self.base(*args, **kwargs)
        x = F.dropout(x, self.config.dropout, self.training)
        return add_low_rank(y, x, self.lora_A, self.lora_B, self.scaling)

    def _takes_weight_form(self, x: Tensor) -> bool:
        """Return whether W_eff may stand for the base's own call here, and is the cheaper way."""
        if self.training and self.config.dropout:
            return False
        # A choice by the number of tokens would be a graph for each side of it, at every layer shape.
        if is_compiling() or x.is_nested:
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
        weight = self._unmerged_weight()
        if not _is_formable(weight):
            raise MergeError(self._weight_problem())
        return effective_weight(
            weight,
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
            return self.base.weight  # type: ignore[return-value]
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

    @torch.no_grad()
    def merge_problem(self, dtype: torch.dtype | None = None) -> str | None:
        """Return why W_eff cannot be formed and take W's place, or None.

        Args:
            dtype: that W_eff would be rounded to; None means W's own.
        """
        weight = self._original[0] if self._original else plain_weight(self.base)
        if weight is None:
            return self._weight_problem()
        if problem := call_problem(self.base):
            return f"{problem}; merged, it may not do the same: run it unmerged"
        if not self.merged and _is_merged(weight):
            return "it is merged in another model, which shares the layer: unmerge that one first"
        if weight.is_meta and is_managed(self.base):
            return (
                "its weight is offloaded and has no values here: merge or fuse before dispatching the model"
            )
        return self._overflow(weight, dtype or weight.dtype)

    def _weight_problem(self) -> str:
        """Return why the base's weight is not one that W_eff can be formed from and take the place of."""
        name, weight = type(self.base).__name__, own_tensors(self.base).get("weight")
        computed = is_parametrized(self.base, "weight") or isinstance(vars(self.base).get("weight"), Tensor)
        if computed or _is_formable(weight):
            return (
                f"the weight of {name} is a buffer, or computed from other parameters (a parametrization, "
                "pruning), so nothing can take its place; run it unmerged, or make it a plain parameter "
                "first: torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
            )
        weight = getattr(self.base, "weight", None) if weight is None else weight
        dtype = f" of {weight.dtype}" if isinstance(weight, Tensor) else ""
        return (
            f"the weight of {name}, a {type(weight).__name__}{dtype}, is not a plain floating-point tensor, "
            "so W + scaling B A cannot be formed; run it unmerged, or load the base in floating point"
        )

    def _overflow(self, weight: Tensor, dtype: torch.dtype) -> str | None:
        """Return how many values of W_eff are infinite or NaN where W's are not, in words, or None.

        W_eff is formed only where a bound on its values says that it may be needed.
        """
        if weight.is_meta or self.lora_A.is_meta or not weight.numel():
            return None
        reach = abs(self.scaling) * self.lora_B.double().abs().sum(1).max() * self.lora_A.double().abs().max()
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
        """Return W, (out, in) or, on a `Conv1D`, (in, out)."""
        weight = self._original[0] if self._original else plain_weight(self.base)
        return () if weight is None else (weight,)

    @torch.no_grad()
    def merge(self) -> None:
        """Swap W_eff in as the base's weight; W itself is kept, untouched. Inverse: `unmerge`.

        Merging a merged layer changes nothing. Interrupted at any point, `unmerge` sets it right.

        Raises:
            MergeError: when the base's weight is quantised or otherwise not a plain tensor.
        """
        if self.merged:
            return
        original = plain_weight(self.base)
        if original is None:
            raise MergeError(self._weight_problem())
        merged = nn.Parameter(self.effective_weight(), requires_grad=original.requires_grad)
        merged.minilora_merged = True  # type: ignore[attr-defined]  # for another model that shares the layer
        self._original = (original,)
        # A new Parameter: writing into the old one would reach whatever is tied to it.
        put_parameter(self.base, "weight", merged)

    def unmerge(self) -> None:
        """Put the very same W back. Inverse: `merge`. On an unmerged layer nothing happens."""
        if self._original is not None:
            put_parameter(self.base, "weight", self._original[0])
            self._original = None

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Compute with W for the time of a block. The merged weight is kept, so its return cannot fail."""
        if self._original is None:
            yield
            return
        (original,), merged, update = self._original, self.base.weight, self._update_state()
        self.unmerge()
        try:
            yield
        finally:
            now = plain_weight(self.base)
            same = now is original and (now.device, now.dtype) == (merged.device, merged.dtype)
            if same and self._update_state() == update:
                self._original = (original,)
                put_parameter(self.base, "weight", merged)  # type: ignore[arg-type]
            else:  # moved, cast, tied, loaded or trained meanwhile
                self.merge()

    def _update_state(self) -> list[tuple[int, int]]:
        """Return what tells whether A or B was replaced or written to since."""
        parameters = (self.lora_A, self.lora_B)
        return [(id(p), 0 if p.is_inference() else p._version) for p in parameters]

    @torch.no_grad()
    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the base with W_eff as its weight, rounded once to `dtype`; W and the update are let go."""
        original = self._unmerged_weight()
        weight = nn.Parameter(self.effective_weight(dtype), requires_grad=original.requires_grad)
        self._original = None
        put_parameter(self.base, "weight", weight)
        return self.base

    def signed_weight(self) -> Tensor | str | None:
        """Return W, (out, in) or, on a `Conv1D`, (in, out), merged or not; or why it has no values."""
        return signable(self._original[0]) if self._original else super().signed_weight()

    def _unmerged_weight(self) -> Tensor:
        """Return W, whether merged or not."""
        return self._original[0] if self._original else self.base.weight  # type: ignore[return-value]

    def description(self) -> str:
        """Return the kind, rank and scale in a few words."""
        details = [f"r={self.config.r}", f"alpha={self.config.alpha:g}"]
        details += ["rslora"] if self.config.rslora else []
        details += [f"dropout={self.config.dropout:g}"] if self.config.dropout else []
        return f"LoRA {' '.join(details)}"

    def extra_repr(self) -> str:
        """Return what `print(model)` shows beside the name."""
        return f"{self.description()}, merged={self.merged}"

    # torch has no public hook for what is moved and cast.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        """Move or cast the kept original with the rest, so that unmerging needs no second thought."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._original is not None:
            # By torch's own rules: the object stays, and its ties, wherever they would stay in a module.
            self._original = (nn.ParameterList(self._original)._apply(fn)[0],)  # type: ignore[no-untyped-call]
        return self


def _is_formable(weight: object) -> bool:
    """Return whether W + s B A can be formed from a weight: an ordinary tensor of a dtype for weights."""
    return type(weight) in (Tensor, nn.Parameter) and is_float_dtype(weight.dtype)  # type: ignore[attr-defined]


def _is_merged(weight: Tensor | None) -> bool:
    return getattr(weight, "minilora_merged", False)


def _show_original_weight(layer: LoRALinear, state_dict: dict[str, Any], prefix: str, _: object) -> None:
    """Let `state_dict` have the original W as `base.weight` even when merged, so no update counts twice."""
    key = f"{prefix}base.weight"
    if layer._original is not None and key in state_dict:
        original = layer._original[0]
        state_dict[key] = original if isinstance(state_dict[key], nn.Parameter) else original.detach()


def _refuse_to_load_when_merged(
    layer: LoRALinear, state_dict: dict[str, Any], prefix: str, *rest: Any
) -> None:
    """Keep `load_state_dict` from writing into a merged weight, which `unmerge` would throw away."""
    if layer.merged:
        error_msgs: list[str] = rest[-1]
        error_msgs.append(f"{prefix[:-1]!r} is merged: call minilora.unmerge(model), then load")
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]  # or torch would go on and write
