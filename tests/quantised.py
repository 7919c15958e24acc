"""Quantised models: of bitsandbytes and torchao, where they are installed, and of stand-ins for both.

The stand-ins keep the shape of what the libraries do, a weight that is no plain tensor and a way to get it
back, so that what rests on no library is tested without any.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 64  # of which bitsandbytes wants whole blocks


def plain(seed: int = 0, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Linear(SIZE, 2 * SIZE, bias=bias), nn.GELU(), nn.Linear(2 * SIZE, SIZE, bias=bias))
    return nn.Sequential(*layers).requires_grad_(False)


def replaced(model: nn.Sequential, make: Callable[[nn.Linear], nn.Module]) -> nn.Sequential:
    for i in (0, 2):
        model[i] = make(model[i])
    return model


# Stand-ins


class Rounded(Tensor):
    """A weight as torchao keeps it: a tensor by its looks, integers and scales inside."""

    @staticmethod
    def __new__(cls, integers: Tensor, scale: Tensor) -> Rounded:
        return Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype, device=scale.device)

    def __init__(self, integers: Tensor, scale: Tensor) -> None:
        self.integers, self.scale = integers, scale

    def dequantize(self) -> Tensor:
        return self.integers.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.dequantize(), *bias)
        return super().__torch_function__(function, kinds, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].integers, args[0].scale)
        raise NotImplementedError(f"{function} of a rounded weight")


def integers_and_scale(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def with_rounded_weight(layer: nn.Linear) -> nn.Linear:
    rounded = Rounded(*integers_and_scale(layer.weight.detach()))
    layer.weight = nn.Parameter(rounded, requires_grad=False)
    return layer


class Params4bit(nn.Parameter):
    """A weight as bitsandbytes keeps it: two numbers in a byte, and all else in `quant_state`."""

    quant_state: types.SimpleNamespace

    def __deepcopy__(self, memo: Any) -> Params4bit:
        new = Params4bit(self.data.clone(), requires_grad=False)
        new.quant_state = self.quant_state
        return new


def dequantize_4bit(packed: Tensor, quant_state: types.SimpleNamespace) -> Tensor:
    numbers = torch.stack([packed // 16, packed % 16], dim=-1).view(quant_state.shape)
    return ((numbers.float() - 8) * quant_state.scale).to(quant_state.dtype)


class Packed(nn.Module):
    """A layer as bitsandbytes makes it, around such a weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.abs().max() / 7
        numbers = (layer.weight / scale).round().to(torch.int16).flatten() + 8
        self.weight = Params4bit((numbers[::2] * 16 + numbers[1::2]).to(torch.uint8), requires_grad=False)
        shape, dtype = layer.weight.shape, layer.weight.dtype
        self.weight.quant_state = types.SimpleNamespace(scale=scale, shape=shape, dtype=dtype)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, dequantize_4bit(self.weight, self.weight.quant_state), self.bias)


class Unknown(nn.Module):
    """A layer whose library says nothing of how to get a weight back."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        integers, scale = integers_and_scale(layer.weight.detach())
        self.register_buffer("weight", integers)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(self.scale.dtype) * self.scale, self.bias)


def put_standin_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `dequantize_4bit` where the class of a weight says that its library is."""
    functional = types.ModuleType("standin.functional")
    functional.dequantize_4bit = dequantize_4bit
    monkeypatch.setitem(sys.modules, "standin", types.ModuleType("standin"))
    monkeypatch.setitem(sys.modules, "standin.functional", functional)
    monkeypatch.setattr(Params4bit, "__module__", "standin.nn")


# The libraries


@dataclass(frozen=True)
class Library:
    """How a library quantises a model, and what it can do with one, by itself."""

    package: str
    quantise: Callable[[nn.Sequential], nn.Module]
    rounding: float = 2e-6
    """By how much a plain layer with the weight given back may answer differently, in float32."""
    in_evaluation: float = 2e-6
    """The same in evaluation, where activations may be rounded too: those of bitsandbytes' 8 bits are, and
    those of its 4 bits on processors with bfloat16."""
    trains: bool = True
    pickles: bool = True
    loads: bool = True
    """Whether `load_state_dict` takes what `state_dict` gave."""

    def build(self, seed: int = 0, *, bias: bool = True) -> nn.Module:
        pytest.importorskip(self.package)
        return self.quantise(plain(seed, bias=bias)).requires_grad_(False)


def bits4(quant_type: str, *, nested: bool) -> Callable[[nn.Sequential], nn.Module]:
    def quantise(model: nn.Sequential) -> nn.Module:
        import bitsandbytes as bnb

        def layer(old: nn.Linear) -> nn.Module:
            new = bnb.nn.Linear4bit(
                old.in_features,
                old.out_features,
                bias=old.bias is not None,
                compute_dtype=torch.float32,
                compress_statistics=nested,
                quant_type=quant_type,
            )
            new.load_state_dict(old.state_dict())
            return new

        return replaced(model, layer).to("cpu")  # which quantises

    return quantise


def bits8(threshold: float) -> Callable[[nn.Sequential], nn.Module]:
    def quantise(model: nn.Sequential) -> nn.Module:
        import bitsandbytes as bnb

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each call that it casts

        def layer(old: nn.Linear) -> nn.Module:
            bias = old.bias is not None
            new = bnb.nn.Linear8bitLt(
                old.in_features, old.out_features, bias=bias, has_fp16_weights=False, threshold=threshold
            )
            new.load_state_dict(old.state_dict())
            return new

        return replaced(model, layer).to("cpu")

    return quantise


def torchao(config: str) -> Callable[[nn.Sequential], nn.Module]:
    def quantise(model: nn.Sequential) -> nn.Module:
        from torchao import quantization

        quantization.quantize_(model, getattr(quantization, config)())
        return model

    return quantise


LIBRARIES = {
    "bitsandbytes_nf4": Library("bitsandbytes", bits4("nf4", nested=False), in_evaluation=2e-2, loads=False),
    "bitsandbytes_nf4_nested": Library(
        "bitsandbytes", bits4("nf4", nested=True), in_evaluation=2e-2, loads=False
    ),
    "bitsandbytes_fp4": Library("bitsandbytes", bits4("fp4", nested=False), in_evaluation=2e-2, loads=False),
    "bitsandbytes_int8": Library("bitsandbytes", bits8(0.0), in_evaluation=3e-2),
    "bitsandbytes_int8_outliers": Library("bitsandbytes", bits8(2.0), in_evaluation=3e-2),
    "torchao_int8": Library("torchao", torchao("Int8WeightOnlyConfig"), pickles=False),
    "torchao_int8_dynamic": Library(
        "torchao", torchao("Int8DynamicActivationInt8WeightConfig"), 3e-2, 3e-2, trains=False, pickles=False
    ),
    "torchao_float8": Library("torchao", torchao("Float8WeightOnlyConfig"), pickles=False),
}


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
