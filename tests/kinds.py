"""Layers of every kind that LoRA reaches, each in a model of its own, and what they must compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.view import Substitution


class Called(nn.Module):
    """A model with one layer, called with what the case gives."""

    def __init__(self, layer: nn.Module, arguments: Callable[[Any], tuple[Any, ...]]) -> None:
        super().__init__()
        self.layer = layer
        self.arguments = arguments

    def forward(self, x: Any) -> Tensor:
        y = self.layer(*self.arguments(x))
        return y[0] if isinstance(y, tuple) else y


class Scaled(nn.Linear):
    """Equalised learning rate: the weight is scaled at each call."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * 0.1, self.bias)


class InOut(nn.Module):
    """A layer of somebody's own, stored as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 12
        self.weight = nn.Parameter(torch.randn(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Bare(nn.Module):
    """Parameters and no layers: a matrix that is multiplied with, looked up in and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, 8))

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table[ids]
        return rows @ self.table.T + rows @ self.table.t() + F.linear(rows, self.table)


class Experts(nn.Module):
    """A stack of matrices, one for each expert, used one by one."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.num_experts = 3
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(3, 8, 12) if transposed else torch.randn(3, 12, 8))
        self.down = nn.Parameter(torch.randn(3, 12, 8) if transposed else torch.randn(3, 8, 12))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(3):
            if self.is_transposed:
                y = y + torch.tanh(x @ self.up[e]) @ self.down[e]
            else:
                y = y + F.linear(torch.tanh(F.linear(x, self.up[e])), self.down[e])
        return y + torch.bmm(x, (self.up if self.is_transposed else self.up.transpose(1, 2))[:2]).sum() / 100


@dataclass(frozen=True)
class Kind:
    """A layer, what it is called with, and the parameter that gets an update."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Of the input; of token ids where `ids`."""
    parameter: str = "weight"
    ids: bool = False
    arguments: Callable[[Any], tuple[Any, ...]] = field(default=lambda x: (x,))
    formed: bool = False
    """Whether the whole weight is formed for it, with a warning."""
    dropout: bool = True
    """Whether dropout has an input to act on."""

    @property
    def target(self) -> str:
        return "layer" if self.parameter == "weight" else f"layer.{self.parameter}"

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Called(self.make(), self.arguments).to(dtype)

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.ids:
            return torch.randint(0, 10, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(dtype)


def _conv(kind: type[nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: kind(*args, **kwargs)


def _attention(**kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(8, 2, **kwargs)


MODES = ("zeros", "reflect", "replicate", "circular")
ATTENTION = {"arguments": lambda x: (x, x, x), "dropout": False}

KINDS = [
    Kind("linear", lambda: nn.Linear(8, 12), (2, 5, 8)),
    Kind("scaled", lambda: Scaled(8, 12), (2, 5, 8), formed=True, dropout=False),
    Kind("in_out", InOut, (2, 5, 8)),
    Kind("conv1d", _conv(nn.Conv1d, 6, 8, 3), (2, 6, 12)),
    Kind("conv1d_unbatched", _conv(nn.Conv1d, 6, 8, 3), (6, 12)),
    Kind("conv1d_groups", _conv(nn.Conv1d, 6, 8, 3, groups=2, stride=2), (2, 6, 12)),
    Kind("conv2d_stride", _conv(nn.Conv2d, 6, 8, 3, stride=2, padding=1, dilation=2), (2, 6, 9, 9)),
    Kind("conv2d_same", _conv(nn.Conv2d, 6, 8, (3, 2), padding="same", bias=False), (2, 6, 7, 6)),
    Kind("conv2d_groups", _conv(nn.Conv2d, 6, 9, 3, groups=3, padding=1), (2, 6, 7, 7)),
    Kind("conv2d_depthwise", _conv(nn.Conv2d, 6, 12, 3, groups=6), (2, 6, 7, 7)),
    *(Kind(f"conv2d_{m}", _conv(nn.Conv2d, 6, 8, 3, padding=1, padding_mode=m), (2, 6, 7, 7)) for m in MODES),
    Kind("conv3d", _conv(nn.Conv3d, 2, 4, 2, groups=2), (2, 2, 4, 4, 4)),
    Kind(
        "transposed", _conv(nn.ConvTranspose2d, 6, 8, 3, stride=2), (2, 6, 4, 4), formed=True, dropout=False
    ),
    Kind("embedding", lambda: nn.Embedding(10, 8), (2, 5), ids=True),
    Kind("embedding_padding", lambda: nn.Embedding(10, 8, padding_idx=1), (2, 5), ids=True),
    Kind(
        "bilinear",
        lambda: nn.Bilinear(4, 4, 6),
        (3, 4),
        arguments=lambda x: (x, x + 1),
        formed=True,
        dropout=False,
    ),
    Kind("attention", _attention(batch_first=True), (2, 5, 8), "in_proj_weight", **ATTENTION),
    Kind(
        "attention_masked",
        _attention(),
        (5, 2, 8),
        "in_proj_weight",
        arguments=lambda x: (
            *(x, x, x, torch.tensor([[False] * 5, [False] * 3 + [True] * 2]), False),
            torch.ones(5, 5, dtype=torch.bool).triu(1),
        ),
        dropout=False,
    ),
    Kind(
        "transposed_1d", _conv(nn.ConvTranspose1d, 6, 8, 3, groups=2), (2, 6, 4), formed=True, dropout=False
    ),
    Kind("bag", lambda: nn.EmbeddingBag(10, 8), (2, 5), ids=True, formed=True, dropout=False),
    Kind("cell", lambda: nn.GRUCell(8, 6), (3, 8), "weight_ih", formed=True, dropout=False),
    Kind("attention_seq_first", _attention(bias=False), (5, 2, 8), "in_proj_weight", **ATTENTION),
    Kind(
        "attention_separate",
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True),
        (2, 5, 8),
        "k_proj_weight",
        arguments=lambda x: (x, x[..., :6], x[..., :6]),
        dropout=False,
    ),
    Kind("table", Bare, (2, 3), "table", ids=True),
    Kind("experts", Experts, (2, 5, 8), "up"),
    Kind("experts_transposed", lambda: Experts(transposed=True), (2, 5, 8), "up"),
]


def materialised(
    bare: nn.Module, wrapper: Substitution, *, leaf: bool = False
) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a copy of a model whose weight is W + s B A, formed from copies of A and B with gradients."""
    model = copy.deepcopy(bare)
    A, B = (t.detach().clone().requires_grad_() for t in (wrapper.lora_A, wrapper.lora_B))
    weight = getattr(model.layer, wrapper.parameter).detach()
    delta = wrapper.config.scaling * (B @ A)
    delta = delta.mT if wrapper.layout.transposed else delta
    del model.layer._parameters[wrapper.parameter]
    model.layer.__dict__[wrapper.parameter] = weight + delta.reshape(weight.shape)
    return model, A, B
