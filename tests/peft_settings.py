"""LoRA settings of PEFT on small models of every kind of layer, and what is known of each as a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from kinds import Experts, InOut, Scaled
from torch import Tensor, nn


class Net(nn.Module):
    """Layers, called one after the other, with tanh in between."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x


class Attended(nn.Module):
    """An attention that the model calls by its name, whatever stands there."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)
        self.lin = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.mha(x, x, x)[0])


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: rows are multiplied after the look-up, and the class says by what."""

    embed_scale = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


def conv1d(out: int, inputs: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(out, inputs)
    nn.init.normal_(layer.bias)
    return layer


def mlp() -> nn.Module:
    return Net(lin0=nn.Linear(8, 12), lin1=nn.Linear(12, 4))


def without_bias() -> nn.Module:
    return Net(lin0=nn.Linear(8, 12, bias=False), lin1=nn.Linear(12, 4))


def stack() -> nn.Module:
    return Net(layers=nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(3))))


def looked_up(**kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: Net(
        emb=nn.Embedding(10, 8, **kwargs), c=conv1d(6, 8), flat=nn.Flatten(), head=nn.Linear(18, 2)
    )


def scaled_embedding() -> nn.Module:
    return Net(emb=ScaledEmbedding(10, 8), flat=nn.Flatten(), lin=nn.Linear(24, 2))


def convolved(kind: type[nn.Module], *args: Any, width: int, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: Net(conv=kind(*args, **kwargs), flat=nn.Flatten(), lin=nn.Linear(width, 4))


def experts(transposed: bool = False, square: bool = False) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = Experts(transposed)
        if square:
            layer.up, layer.down = (nn.Parameter(torch.randn(3, 8, 8)) for _ in range(2))
        return Net(lin=nn.Linear(8, 8), experts=layer)

    return make


@dataclass(frozen=True)
class Setting:
    """A model, PEFT's config for it, and what a file of it is good for."""

    name: str
    make: Callable[[], nn.Module]
    fields: dict[str, Any]
    shape: tuple[int, ...] = (2, 8)
    """Of the input; of token ids where the first layer looks them up."""
    ids: bool = False
    refused: str = ""
    """What `load` says of it; empty where everything holds."""
    steps: bool = True
    """Whether training steps are the same."""
    rewritten: bool = False
    """Whether minilora writes it in other words, under which PEFT computes the same."""
    warns: tuple[str, ...] = field(default=())
    """What PEFT warns of."""

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().double()

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.ids:
            return torch.randint(0, 10, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64)


LIN0: dict[str, Any] = {"target_modules": ["lin0"]}
BOTH: dict[str, Any] = {"target_modules": ["lin0", "lin1"]}
CONV: dict[str, Any] = {"target_modules": ["conv"]}
CONV_LIN: dict[str, Any] = {"target_modules": ["conv", "lin"]}
EMB: dict[str, Any] = {"target_modules": ["emb"]}
TWO: dict[str, Any] = {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]}
IDS: dict[str, Any] = {"shape": (4, 3), "ids": True}
IMAGE: dict[str, Any] = {"shape": (2, 6, 7, 7)}
TOKENS: dict[str, Any] = {"shape": (2, 3, 8)}
ATTENTION: dict[str, Any] = {"shape": (2, 3, 8), "steps": False}
NO_BIAS = ("has no bias. This means", "had no bias")  # of PEFT, and of minilora's fuse
GROUPED = {"refused": "groups of the weight", "warns": ("groups > 1",)}


def _dora(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "use_dora": True}


def _biased(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "lora_bias": True}


SETTINGS = [
    # Linear layers.
    Setting("linear, by a string", mlp, {"target_modules": "lin0"}),
    Setting("linear, the first", mlp, LIN0),
    Setting("linear, the last", mlp, {"target_modules": ["lin1"]}),
    Setting("linear, both", mlp, BOTH),
    Setting("linear, a module saved", mlp, {**LIN0, "modules_to_save": ["lin1"]}),
    Setting("linear, alpha and dropout", mlp, {**LIN0, "lora_alpha": 4, "lora_dropout": 0.1}, steps=False),
    Setting("linear, rslora", mlp, {**BOTH, "use_rslora": True}),
    Setting("linear, rank_pattern", mlp, {**BOTH, "rank_pattern": {"lin1": 3}}),
    Setting("linear, alpha_pattern", mlp, {**BOTH, "alpha_pattern": {"lin0": 3, "lin1": 5}}),
    Setting("linear, gaussian", mlp, {**LIN0, "init_lora_weights": "gaussian"}),
    Setting("linear, orthogonal", mlp, {**LIN0, "init_lora_weights": "orthogonal"}),
    Setting("linear, no initial values", mlp, {**BOTH, "init_lora_weights": False}),
    Setting("linear, bias all", mlp, {**LIN0, "bias": "all"}),
    Setting("linear, bias lora_only", mlp, {**LIN0, "bias": "lora_only"}),
    Setting("linear, bias all, a module saved", mlp, {**LIN0, "bias": "all", "modules_to_save": ["lin1"]}),
    Setting("linear, a rank above a side", mlp, {**BOTH, "r": 10}),
    Setting("linear, all-linear", mlp, {"target_modules": "all-linear"}),
    Setting("linear, excluded", mlp, {**BOTH, "exclude_modules": ["lin1"]}),
    Setting(
        "linear, one layer of a stack",
        stack,
        {"target_modules": ["0"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    Setting("linear, a regular expression", stack, {"target_modules": r"layers\.[02]\.0"}),
    Setting("linear, bias all with norms", stack, {"target_modules": r"layers\.[02]\.0", "bias": "all"}),
    Setting("linear, DoRA", mlp, _dora(LIN0)),
    Setting("linear, DoRA, both", mlp, _dora({**BOTH, "lora_alpha": 32})),
    Setting("linear, lora_bias", mlp, _biased(LIN0)),
    Setting("linear, lora_bias, both, rslora", mlp, _biased({**BOTH, "use_rslora": True, "lora_alpha": 3})),
    Setting("linear, lora_bias, no bias in the base", without_bias, _biased(LIN0), warns=NO_BIAS),
    Setting(
        "linear, lora_bias, bias lora_only",
        mlp,
        _biased({**LIN0, "bias": "lora_only"}),
        refused="in full as well",
    ),
    Setting("linear, scaled at each call", lambda: Net(lin0=Scaled(8, 4)), LIN0, refused="a way of its own"),
    # Conv1D and embeddings.
    Setting("Conv1D", looked_up(), {"target_modules": ["c"], "fan_in_fan_out": True}, **IDS),
    Setting(
        "Conv1D, lora_bias", looked_up(), _biased({"target_modules": ["c"], "fan_in_fan_out": True}), **IDS
    ),
    Setting(
        "Conv1D, bias all",
        looked_up(),
        {"target_modules": ["c"], "fan_in_fan_out": True, "bias": "all"},
        **IDS,
    ),
    Setting("embedding", looked_up(), EMB, **IDS),
    Setting(
        "embedding and Conv1D", looked_up(), {"target_modules": ["emb", "c"], "fan_in_fan_out": True}, **IDS
    ),
    Setting("embedding, padding_idx", looked_up(padding_idx=1), EMB, **IDS),
    Setting("embedding, with dropout", looked_up(), {**EMB, "lora_dropout": 0.3}, **IDS),
    Setting(
        "embedding, rslora and patterns",
        looked_up(),
        {
            "target_modules": ["emb", "head"],
            "use_rslora": True,
            "rank_pattern": {"emb": 3},
            "alpha_pattern": {"emb": 5},
        },
        **IDS,
    ),
    Setting("embedding, scaled", scaled_embedding, EMB, **IDS),
    Setting("embedding, max_norm", looked_up(max_norm=1.0), EMB, refused="max_norm", **IDS),
    Setting("embedding, bias all", looked_up(), {**EMB, "bias": "all"}, **IDS),
    Setting(
        "Conv1D, DoRA, bias lora_only",
        looked_up(),
        _dora({"target_modules": ["c"], "fan_in_fan_out": True, "bias": "lora_only"}),
        **IDS,
    ),
    Setting("embedding, DoRA", looked_up(), _dora(EMB), **IDS),
    # Convolutions.
    Setting("conv1d", convolved(nn.Conv1d, 6, 8, 3, width=56), CONV, (2, 6, 9)),
    Setting("conv1d, a kernel of one", convolved(nn.Conv1d, 6, 8, 1, dilation=2, width=72), CONV, (2, 6, 9)),
    Setting("conv1d, lora_bias", convolved(nn.Conv1d, 6, 8, 3, width=56), _biased(CONV), (2, 6, 9)),
    Setting("conv2d", convolved(nn.Conv2d, 6, 8, 3, width=200), CONV, **IMAGE),
    Setting("conv2d and linear", convolved(nn.Conv2d, 6, 8, 3, width=200), CONV_LIN, **IMAGE),
    Setting(
        "conv2d, stride and padding",
        convolved(nn.Conv2d, 6, 8, (3, 2), stride=(2, 1), padding=(1, 0), width=192),
        CONV_LIN,
        **IMAGE,
    ),
    Setting("conv2d, same", convolved(nn.Conv2d, 6, 8, (3, 5), padding="same", width=392), CONV, **IMAGE),
    Setting(
        "conv2d, a kernel of one",
        convolved(nn.Conv2d, 6, 8, 1, padding_mode="reflect", width=392),
        CONV,
        **IMAGE,
    ),
    Setting(
        "conv2d, rslora, patterns, bias",
        convolved(nn.Conv2d, 6, 8, 3, width=200),
        {
            **CONV_LIN,
            "use_rslora": True,
            "rank_pattern": {"conv": 3},
            "alpha_pattern": {"lin": 3},
            "bias": "lora_only",
        },
        **IMAGE,
    ),
    Setting(
        "conv2d, a rank above a side", convolved(nn.Conv2d, 6, 8, 1, width=392), {**CONV, "r": 9}, **IMAGE
    ),
    Setting("conv2d, groups", convolved(nn.Conv2d, 6, 8, 3, groups=2, width=200), CONV, **GROUPED, **IMAGE),
    Setting(
        "conv2d, depthwise",
        convolved(nn.Conv2d, 6, 12, 3, groups=6, width=300),
        {**CONV, "r": 6},
        **GROUPED,
        **IMAGE,
    ),
    Setting(
        "conv2d, dilation",
        convolved(nn.Conv2d, 6, 8, 3, dilation=2, width=72),
        CONV,
        refused="dilat",
        **IMAGE,
    ),
    Setting(
        "conv2d, reflect",
        convolved(nn.Conv2d, 6, 8, 3, padding=1, padding_mode="reflect", width=392),
        CONV,
        refused="padding_mode",
        **IMAGE,
    ),
    Setting("conv2d, lora_bias", convolved(nn.Conv2d, 6, 8, 3, width=200), _biased(CONV_LIN), **IMAGE),
    Setting(
        "conv2d, lora_bias, no bias in the base",
        convolved(nn.Conv2d, 6, 8, 3, bias=False, width=200),
        _biased(CONV),
        warns=NO_BIAS,
        **IMAGE,
    ),
    Setting("conv2d, DoRA", convolved(nn.Conv2d, 6, 8, 3, width=200), _dora(CONV), **IMAGE),
    Setting("conv3d", convolved(nn.Conv3d, 2, 4, 2, width=108), CONV, (2, 2, 4, 4, 4)),
    Setting("conv3d, lora_bias", convolved(nn.Conv3d, 2, 4, 2, width=108), _biased(CONV), (2, 2, 4, 4, 4)),
    Setting("conv3d and linear", convolved(nn.Conv3d, 2, 4, (2, 1, 3), width=96), CONV_LIN, (2, 2, 4, 4, 4)),
    # Attention. PEFT adds the update of out_proj twice and takes the gradient of one: steps are its own.
    Setting("attention", Attended, {"target_modules": ["mha"]}, **ATTENTION),
    Setting(
        "attention and linear", Attended, {"target_modules": ["mha", "lin"], "lora_alpha": 3}, **ATTENTION
    ),
    Setting("attention, bias all", Attended, {"target_modules": ["mha"], "bias": "all"}, **ATTENTION),
    Setting(
        "attention, lora_bias",
        Attended,
        _biased({"target_modules": ["mha"]}),
        refused="in attention it has no effect",
        warns=("has no bias. This means",),
        **ATTENTION,
    ),
    Setting(
        "attention, out_proj alone", Attended, {"target_modules": ["out_proj"]}, refused="no effect", **TOKENS
    ),
    Setting(
        "attention, a parameter",
        Attended,
        {"target_modules": ["lin"], "target_parameters": ["mha.in_proj_weight"]},
        **TOKENS,
    ),
    # Parameters.
    Setting("experts", experts(), TWO, **TOKENS),
    Setting("experts, transposed", experts(transposed=True), TWO, **TOKENS),
    Setting("experts, square", experts(square=True), TWO, **TOKENS),
    Setting("experts, square and transposed", experts(square=True, transposed=True), TWO, **TOKENS),
    Setting(
        "experts and linear", experts(), {**TWO, "target_modules": ["lin"], "use_rslora": True}, **TOKENS
    ),
    Setting("experts, one of two", experts(), {**TWO, "target_parameters": ["down"]}, **TOKENS),
    Setting(
        "experts, ranks", experts(), {**TWO, "rank_pattern": {"up": 3}}, warns=("did not match",), **TOKENS
    ),
    Setting(
        "a weight of one's own",
        lambda: Net(own=InOut()),
        {"target_modules": [], "target_parameters": ["own.weight"]},
    ),
    Setting("a linear weight", mlp, {"target_modules": ["lin1"], "target_parameters": ["lin0.weight"]}),
    Setting(
        "a scaled weight",
        lambda: Net(lin0=Scaled(8, 4)),
        {"target_modules": [], "target_parameters": ["lin0.weight"]},
    ),
    Setting(
        "an embedding's weight",
        looked_up(),
        {"target_modules": [], "target_parameters": ["emb.weight"]},
        rewritten=True,
        **IDS,
    ),
]
