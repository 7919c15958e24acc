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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import WIDEST, AdapterConfig
from .describing import DescribedWeight
from .errors import MergeError, TargetError
from .linear import linear_shape
from .module import InjectedModule, bare_module, device_of, dtype_for, generator_for, require_called
from .torch_internals import BatchNorm, Convolution, own_parameters

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Adapter(InjectedModule):
    """A module with a trainable bottleneck, around any base that returns one tensor.

    The width d is the last dimension of what the base returns, or, for a stage of convolutions, the one
    before its k spatial dimensions: (b, d, h, w).

    Args:
        base: any module; the parallel placement also needs its first argument to be a tensor.
        config: bottleneck, activation, placement, scale and dtype.
        site: the name from which down's initial values, N(0, 0.02^2), are drawn, with torch's seed.
        device: of the new parameters; None means the base's.

    Raises:
        TargetError: when the base's width can neither be read off nor stands in the config, when the two
            differ, or when it cannot be told which dimension has it.

    Example:
        >>> adapter = minilora.Adapter(nn.Linear(8, 6), minilora.AdapterConfig(bottleneck=2))
        >>> x = torch.randn(3, 8)
        >>> torch.equal(adapter(x), adapter.base(x))        # up is zero at first
        True
    """

    kind = "adapter"
    mergeable = False

    config: AdapterConfig

    def __init__(
        self, base: nn.Module, config: AdapterConfig, *, site: str = "", device: torch.device | None = None
    ) -> None:
        require_called(base)
        widths = _widths(base)
        if config.hidden_size is not None:
            if widths and widths.out != config.hidden_size:
                raise TargetError(
                    f"hidden_size={config.hidden_size} is given, and the output of "
                    f"{type(bare_module(base)).__name__} has the width {widths.out}: leave hidden_size out"
                )
            # A linear layer knows its own input; other modules are taken to keep the width.
            source = widths.source if widths else config.hidden_size
            widths = Widths(source, config.hidden_size, widths.spatial if widths else _spatial_dims(base))
        if widths is None:
            raise TargetError(
                f"the output width of {type(bare_module(base)).__name__} cannot be read off it: "
                "give AdapterConfig(hidden_size=...)"
            )
        super().__init__(base)
        self.config = config
        self._spatial = widths.spatial
        source = widths.source if config.placement == "parallel" else widths.out
        if config.bottleneck is not None:
            m = config.bottleneck
        else:
            m = max(1, int(min(widths.out / config.reduction_factor, 2.0**63)))  # type: ignore[operator]
        if m > WIDEST:
            raise TargetError(f"a bottleneck of {m} is wider than {WIDEST}, the most there can be")
        if m * max(source, widths.out) > 2**59:  # torch counts bytes in 63 bits
            raise TargetError(f"a bottleneck of {m} at a width of {widths.out} is beyond any memory")
        device, dtype = device or device_of(base), dtype_for(base, config.torch_dtype)
        # Made without values: nn.Linear's own draw would move torch's random state.
        self.adapter_down = nn.Linear(source, m, device="meta", dtype=dtype).to_empty(device=device)
        self.adapter_up = nn.Linear(m, widths.out, device="meta", dtype=dtype).to_empty(device=device)
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
        """Call the base and add the bottleneck's output to its own, in its shape and dtype.

        Raises:
            TypeError: when what the bottleneck reads, or what the base returns, is not a tensor of its width.
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
        channels, width = -1 - self._spatial, self.adapter_down.in_features
        if x.dim() <= self._spatial or x.shape[channels] != width:
            raise TypeError(
                f"an adapter around {type(self.base).__name__} reads {width} values in dimension {channels}, "
                f"and was given a tensor of {tuple(x.shape)}. Choose a module inside it as the target"
            )
        x = x.movedim(channels, -1)
        if h.is_meta or not torch.is_autocast_enabled(h.device.type):
            x = x.to(self.adapter_down.weight.dtype)
        delta: Tensor = self.adapter_up(ACTIVATIONS[self.config.activation](self.adapter_down(x)))
        return h + (self.config.scale * delta).movedim(-1, channels).to(h.dtype)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for its dtype, device and shape only: computing with it raises a TypeError.

        No single weight does what base and bottleneck do together. Code that asks for the dtype (T5)
        is served; code that would compute with it past the adapter is stopped, or, like the fused path of
        `nn.TransformerEncoderLayer`, sees that it must call the layer.

        Raises:
            AttributeError: when the base has no weight.
        """
        layer = bare_module(self.base)
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor):
            return getattr(layer, "weight")  # type: ignore[no-any-return]  # noqa: B009
        return weight.detach().as_subclass(_AdaptedWeight)

    def merge_problem(self, dtype: torch.dtype | None = None) -> str | None:
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


class _AdaptedWeight(DescribedWeight):
    """The weight of a layer with a bottleneck beside it."""

    refusal = (
        "of a layer with a bottleneck adapter. No single weight does what the layer does: call the layer "
        "itself, or choose another target"
    )


class Widths(NamedTuple):
    """The widths of what a module takes and returns, and how many dimensions stand behind that one."""

    source: int
    out: int
    spatial: int = 0


def _widths(module: nn.Module) -> Widths | None:
    """Return the widths of a module where they can be read off, else None."""
    module = bare_module(module)
    if shape := linear_shape(module):
        return Widths(shape.in_features, shape.out_features)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return Widths(module.normalized_shape[-1], module.normalized_shape[-1])
    if isinstance(module, Convolution):
        return Widths(module.in_channels, module.out_channels, len(module.kernel_size))
    if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
        return Widths(
            module.num_features, module.num_features, 2 if isinstance(module, nn.BatchNorm2d) else 3
        )
    # One with a forward of its own may return anything: what goes in beside what comes out, say.
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        known = [widths for child in module if (widths := _widths(child))]
        keeping = (nn.Dropout, nn.Identity, nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh)
        alike = len({widths.spatial for widths in known}) == 1
        if alike and all(_widths(child) or isinstance(bare_module(child), keeping) for child in module):
            return Widths(known[0].source, known[-1].out, known[0].spatial)
    return None


def _spatial_dims(module: nn.Module) -> int:
    """Return how many dimensions follow the channels in what a module returns, told by its layers.

    Raises:
        TargetError: when convolutions over several dimensions stand beside layers of another kind, so that
            the channels may be the second dimension or the last.
    """
    layers = [layer for layer in module.modules() if own_parameters(layer)]
    dims = {len(layer.kernel_size) for layer in layers if isinstance(layer, Convolution)}
    if not dims:
        return 0
    if len(dims) == 1 and all(isinstance(layer, (Convolution, BatchNorm, nn.GroupNorm)) for layer in layers):
        return dims.pop()
    if dims == {1}:
        return 0  # a convolution between linear layers, as in Conformer: (b, t, d)
    raise TargetError(
        f"{type(module).__name__} holds convolutions beside layers of other kinds, so it cannot be told "
        "which dimension of its output has the width: choose a module inside it"
    )
