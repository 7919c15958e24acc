"""`Adapter`: a bottleneck beside or behind a module (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751).

    sequential   x ── base ── h ──┬────────────────────────────┬── y = h + s up(act(down(h)))
                                  └── down ── act ── up ── · s ┘

    parallel     x ──┬── base ── h ────────────────────────────┬── y = h + s up(act(down(x)))
                     └── down ── act ── up ── · s ─────────────┘   (He et al. 2022, arXiv 2110.04366)

down is (m, d) and up (d, m), each with a bias. up starts at zero, so that injection changes nothing until
a step is taken. The bottleneck is not linear: it cannot be merged into a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import AdapterConfig
from .errors import MergeError, TargetError
from .linear import linear_shape
from .module import InjectedModule, adapter_dtype, device_of, generator_for

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Adapter(InjectedModule):
    """A module with a trainable bottleneck, around any base that returns one tensor of (..., d).

    Args:
        base: any module; the parallel placement also needs its first argument to be a tensor.
        config: bottleneck, activation, placement, scale and dtype.
        site: the name from which down's initial values, N(0, 0.02^2), are drawn, with torch's seed.
        device: of the new parameters; None means the base's.

    Raises:
        TargetError: when the base's width can neither be read off nor stands in the config.
    """

    kind = "adapter"

    def __init__(
        self, base: nn.Module, config: AdapterConfig, *, site: str = "", device: torch.device | None = None
    ) -> None:
        widths = _widths(base)
        if config.hidden_size is not None:
            # A linear layer knows its own input; other modules are taken to keep the width.
            widths = (widths[0] if widths else config.hidden_size, config.hidden_size)
        if widths is None:
            raise TargetError(
                f"the output width of {type(base).__name__} cannot be read off it: "
                "give AdapterConfig(hidden_size=...)"
            )
        super().__init__(base)
        self.config = config
        d_in, d_out = widths
        source = d_in if config.placement == "parallel" else d_out
        if config.bottleneck is not None:
            m = config.bottleneck
        else:
            m = max(1, int(d_out / config.reduction_factor))  # type: ignore[operator]
        device, dtype = device or device_of(base), adapter_dtype(base, config.dtype)
        # Made without values: nn.Linear's own draw would move torch's random state.
        self.adapter_down = nn.Linear(source, m, device="meta", dtype=dtype).to_empty(device=device)
        self.adapter_up = nn.Linear(m, d_out, device="meta", dtype=dtype).to_empty(device=device)
        self.adapter_down.training = self.adapter_up.training = base.training
        self.reset_parameters(site)

    @torch.no_grad()
    def reset_parameters(self, site: str = "") -> None:
        """Draw down anew, from torch's seed and the site's name; set up and both biases to zero."""
        for tensor in (self.adapter_down.bias, self.adapter_up.weight, self.adapter_up.bias):
            nn.init.zeros_(tensor)
        if not self.adapter_down.weight.is_meta:
            draw = torch.empty(self.adapter_down.weight.shape, device="cpu", dtype=torch.float32)
            draw.normal_(0.0, 0.02, generator=generator_for(f"{site}.adapter_down.weight"))
            self.adapter_down.weight.copy_(draw)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the base and add the bottleneck's output to its own, (..., d), in its dtype.

        Raises:
            TypeError: when what the bottleneck reads, or what the base returns, is not a tensor.
        """
        h = self.base(*args, **kwargs)
        if not self.enabled:
            return h  # type: ignore[no-any-return]
        x = h if self.config.placement == "sequential" else args[0] if args else None
        if not isinstance(h, Tensor) or not isinstance(x, Tensor):
            raise TypeError(
                f"an adapter stands around {type(self.base).__name__}, which takes {type(x).__name__} and "
                f"returns {type(h).__name__}: it must return one tensor (and, for the parallel placement, "
                "take one as its first positional argument). Choose a module inside it as the target"
            )
        if h.is_meta or not torch.is_autocast_enabled(h.device.type):
            x = x.to(self.adapter_down.weight.dtype)
        delta: Tensor = self.adapter_up(ACTIVATIONS[self.config.activation](self.adapter_down(x)))
        return h + (self.config.scale * delta).to(h.dtype)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for its dtype, device and shape only: computing with it raises a TypeError.

        No single weight does what base and bottleneck do together. Code that asks for the dtype (T5)
        is served; code that would compute with it past the adapter is stopped, or, like the fused path of
        `nn.TransformerEncoderLayer`, sees that it must call the layer.

        Raises:
            AttributeError: when the base has no weight.
        """
        layer = self.base
        while isinstance(layer, InjectedModule):
            layer = layer.base
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor):
            return getattr(layer, "weight")  # type: ignore[no-any-return]  # noqa: B009
        return weight.detach().as_subclass(_DescribedWeight)

    def merge_problem(self) -> str | None:
        """Return why an adapter has no merged form."""
        return (
            "a bottleneck adapter is not linear and cannot be merged; pass skip_adapters=True to leave it "
            "in place and merge the rest"
        )

    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Raise, since there is no plain module that does the same.

        Raises:
            MergeError: always.
        """
        raise MergeError(str(self.merge_problem()))

    def description(self) -> str:
        """Return the kind, bottleneck and placement in a few words."""
        m = self.adapter_down.out_features
        return f"adapter m={m} {self.config.activation} {self.config.placement}"

    def extra_repr(self) -> str:
        """Return what `print(model)` shows beside the name."""
        return self.description()


class _DescribedWeight(Tensor):
    """A weight that tells its dtype, device and shape, and refuses to be computed with."""

    _DESCRIBING = frozenset(
        {Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point}
    ).union(
        getattr(Tensor, name).__get__
        for name in ("dtype", "device", "shape", "layout", "ndim", "requires_grad", "is_cuda", "is_meta")
    )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in cls._DESCRIBING:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise TypeError(
            f"{getattr(func, '__name__', func)} was called on the `.weight` of a layer with a bottleneck "
            "adapter. No single weight does what the layer does: call the layer itself, or choose another "
            "target"
        )


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """Return the (input, output) widths of a module where they can be read off, else None."""
    if isinstance(module, InjectedModule):
        return _widths(module.base)
    if shape := linear_shape(module):
        return shape.in_features, shape.out_features
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return module.normalized_shape[-1], module.normalized_shape[-1]
    if isinstance(module, nn.Sequential):
        known = [widths for child in module if (widths := _widths(child))]
        keeping = (nn.Dropout, nn.Identity, nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh)
        if known and all(_widths(child) or isinstance(child, keeping) for child in module):
            return known[0][0], known[-1][1]
    return None
