"""`LoRA`: low-rank adaptation of any layer (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    x ──┬──────────── base: W (out, in), b ────────────┬── y
        └── dropout ── A (r, in) ── B (out, r) ── · s ─┘

    y = x W^T + b + s (dropout(x) A^T) B^T        W_eff = W + s B A        s = alpha / r

W and b belong to the base and stay as they are; A and B are trained. B starts at zero, so that injection
changes nothing until a step is taken. Here the base runs its own forward with W_eff as a value in W's place;
`lora_linear` has the fast path for linear layers.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .config import LoRAConfig, is_float_dtype
from .errors import MergeError, MiniLoRAError, TargetError
from .functional import effective_weight
from .layout import Layout, layout_of
from .module import InjectedModule, bare_module, device_of, dtype_for, generator_for, signable
from .torch_internals import is_compiling, own_tensors, put_parameter
from .view import Substitution
from .weight import EffectiveWeight


class LoRA(Substitution):
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
        weight = own_tensors(bare)[parameter]
        if not is_formable(weight):
            kind = type(weight).__name__
            raise TargetError(
                f"{parameter!r} of {type(bare).__name__} is a {kind} of {weight.dtype}, no weight"
            )
        if config.dropout and isinstance(bare, (nn.MultiheadAttention, nn.Bilinear, nn.ConvTranspose2d)):
            raise TargetError(f"dropout has no input to act on inside {type(bare).__name__}; set dropout=0")
        self._set_up(config, layout_of(bare, parameter, weight), site, device)

    def _set_up(self, config: LoRAConfig, layout: Layout, site: str, device: torch.device | None) -> None:
        if is_merged(own_tensors(self.bare).get(self.parameter)):
            raise TargetError("it is merged in another model, which shares the layer: unmerge that one first")
        self.config = config
        self.site = site
        self.layout = layout
        self.scaling = config.scaling
        # In a tuple, because a Parameter as an attribute would register itself.
        self._original: tuple[nn.Parameter] | None = None
        self._told: set[str] = set()
        device, dtype = device or device_of(self.bare), dtype_for(self.bare, config.torch_dtype)
        shapes = (*layout.leading, config.r, layout.inputs), (*layout.leading, layout.outputs, config.r)
        for name, shape in zip(("lora_A", "lora_B"), shapes, strict=True):
            # Registering would find the A and B of a wrapper further in, and take them for its own.
            put_parameter(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.register_load_state_dict_pre_hook(_refuse_to_load_when_merged)  # type: ignore[no-untyped-call]
        self.register_state_dict_post_hook(_show_original_weight)  # type: ignore[no-untyped-call]
        self.reset_parameters(site)

    @property
    def bare(self) -> nn.Module:
        """The module that owns the weight, inside all wrappers."""
        return bare_module(self.base)

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
            bound = 1 / math.sqrt(self.layout.fan_in or self.layout.inputs)
            draw.uniform_(-bound, bound, generator=generator)
        else:
            draw.normal_(0.0, 1 / self.config.r, generator=generator)
        if isinstance(padding := getattr(self.bare, "padding_idx", None), int):
            draw[:, padding] = 0.0  # no gradient reaches it, so its look-up stays what it is
        self.lora_A.copy_(draw)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base with W_eff in the place of W.

        Raises:
            MiniLoRAError: when the layer is merged and would be trained, which could have no effect; or
                dropout has nothing to act on in what the base computes.
        """
        self.require_unmerged_to_train()
        return super().forward(*args, **kwargs)

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

    def value(self) -> EffectiveWeight:
        """Return W + s B A as a value that need not be formed."""
        transposed = self.layout.transposed
        left, right = (self.lora_A.mT, self.lora_B.mT) if transposed else (self.lora_B, self.lora_A)
        dropout = self.config.dropout if self.training else 0.0
        return EffectiveWeight(getattr(self.bare, self.parameter), left, right, self.scaling, self, dropout)

    def tell_of_forming(self, function: str) -> None:
        """Warn, once for each function, that W_eff is formed for it.

        Raises:
            MiniLoRAError: when dropout is on, which would have no effect.
        """
        where = f"{self.site or type(self.bare).__name__!r}.{self.parameter}"
        if self.training and self.config.dropout:
            raise MiniLoRAError(
                f"{where}: dropout has nothing to act on in {function}, which computes with the whole weight; "
                "set dropout=0"
            )
        if is_compiling() or function in self._told:
            return
        self._told.add(function)
        warnings.warn(
            f"{where}: {function} has no low-rank rule, so W + scaling B A is formed, as large as W",
            UserWarning,
            stacklevel=5,
        )

    def placed_at(self, site: str) -> str:
        """Return the module's name for its `weight`, else the parameter's."""
        return site if self.parameter == "weight" else f"{site}.{self.parameter}"

    def saved_state(self) -> dict[str, Tensor]:
        """Return A and B, below the parameter's name unless that is "weight"."""
        below = "" if self.parameter == "weight" else f"{self.parameter}."
        return {f"{below}lora_A": self.lora_A, f"{below}lora_B": self.lora_B}

    def delta_weight(self) -> Tensor:
        """Return s B A, (..., out, in), in A's dtype, whatever the base's layout."""
        return self.lora_B @ self.lora_A * self.scaling

    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W_eff = W + s B A in the base's layout, from the unmerged W; `functional` defines it.

        Raises:
            MergeError: when the base's weight is quantised or otherwise not a plain tensor.
        """
        weight = self.unmerged_weight()
        if not is_formable(weight):
            raise MergeError(self.weight_problem())
        A, B = self.lora_A, self.lora_B
        return effective_weight(weight, A, B, self.scaling, transposed=self.layout.transposed, dtype=dtype)

    def substituted(self) -> Tensor:
        """Return the weight that outside code may read and compute with: what this layer applies at present.

        It is built at each read, in the base's layout; the forward pass never reads it. Dropout, which acts
        on activations, is not in it.

        Raises:
            MergeError: (a TypeError) when the base's weight is quantised or otherwise not a plain tensor.
        """
        return self.effective_weight()

    def unmerged_weight(self) -> Tensor:
        """Return W, whether merged or not."""
        weight: Tensor = getattr(self.bare, self.parameter)
        return self._original[0] if self._original else weight

    @property
    def merged(self) -> bool:
        """Whether the base computes with W_eff at present."""
        return self.__dict__.get("_original") is not None

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
        if weights[0].is_meta and "_hf_hook" in vars(self.bare):
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
        if weight.is_meta or self.lora_A.is_meta or not weight.numel():
            return None
        reach = (
            abs(self.scaling) * self.lora_B.double().abs().sum(-1).max() * self.lora_A.double().abs().max()
        )
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
        return (weight,) if isinstance(weight, nn.Parameter) and is_formable(weight) else ()

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
        self.unmerge()
        try:
            yield
        finally:
            now = own_tensors(self.bare).get(self.parameter)
            if now is original and (now.device, now.dtype) == (merged.device, merged.dtype):
                self._original = (original,)
                put_parameter(self.bare, self.parameter, merged)  # type: ignore[arg-type]
            else:  # moved, cast or tied meanwhile
                self.merge()

    @torch.no_grad()
    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the base with W_eff as its weight, rounded once to `dtype`; W and the update are let go."""
        original = self.unmerged_weight()
        weight = nn.Parameter(self.effective_weight(dtype), requires_grad=original.requires_grad)
        self._original = None
        put_parameter(self.bare, self.parameter, weight)
        return self.base

    def signed_weight(self) -> Tensor | str | None:
        """Return W in the base's layout, merged or not; or why it has no values."""
        weight = self._original[0] if self._original else own_tensors(self.bare).get(self.parameter)
        return signable(weight)

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
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRA:
        """Move or cast the kept original with the rest, so that unmerging needs no second thought."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._original is not None:
            # By torch's own rules: the object stays, and its ties, wherever they would stay in a module.
            self._original = (nn.ParameterList(self._original)._apply(fn)[0],)  # type: ignore[no-untyped-call]
        return self


def is_formable(weight: object) -> bool:
    """Return whether W + s B A can be formed from a weight: an ordinary tensor of a dtype for weights."""
    return type(weight) in (Tensor, nn.Parameter) and is_float_dtype(weight.dtype)  # type: ignore[attr-defined]


def is_merged(weight: Tensor | None) -> bool:
    """Return whether a weight is one that `LoRA.merge` put in place."""
    return getattr(weight, "minilora_merged", False)


def _show_original_weight(layer: LoRA, state_dict: dict[str, Any], prefix: str, _: object) -> None:
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


def _refuse_to_load_when_merged(layer: LoRA, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Keep `load_state_dict` from writing into a merged weight, which `unmerge` would throw away."""
    if layer.merged:
        error_msgs: list[str] = rest[-1]
        error_msgs.append(f"{prefix[:-1]!r} is merged: call minilora.unmerge(model), then load")
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]  # or torch would go on and write
