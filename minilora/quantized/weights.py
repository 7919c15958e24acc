"""How each library gives back the weight that a quantised layer computes with. None is imported to find out.

bitsandbytes    4 bits: `weight.quant_state`; 8 bits: `SCB`, a scale for each output, which the first call
                moves from the weight to the layer's `state`
torchao         the weight is a tensor with a `dequantize` of its own; so is that of whoever does likewise
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..config import is_float_dtype
from ..linear import is_plain, linear_shape
from ..torch_internals import own_parameters, own_tensors


def is_quantized(tensor: Tensor) -> bool:
    """Return whether a tensor stands for weights without being an ordinary tensor of them."""
    return not is_plain(tensor) and (not is_float_dtype(tensor.dtype) or _has_dequantize(tensor))


def gives_back(layer: nn.Module) -> bool:
    """Return whether it is known how to get a layer's weight from its library."""
    weight: Any = own_tensors(layer).get("weight")
    match type(weight).__name__:
        case "Params4bit":
            return weight.quant_state is not None
        case "Int8Params":
            return weight.dtype == torch.int8 and _scales(layer) is not None
    return weight is not None and _has_dequantize(weight)


def is_packed_for_processor(layer: nn.Module) -> bool:
    """Return whether bitsandbytes has packed a 4-bit weight anew, as in evaluation on some processors.

    Then its scales are rounded, its own way back mixes them up, and what it computes has no gradient.
    """
    state = getattr(own_parameters(layer).get("weight"), "quant_state", None)
    return getattr(state, "packing_format_for_cpu", False)


@torch.no_grad()
def given_back(layer: nn.Module) -> Tensor:
    """Return the weight that a quantised layer stands for.

    Args:
        layer: one for which `gives_back` is True.

    Returns:
        A new tensor, (out, in), in the dtype that the weight had before it was quantised; in float32 where
        the library does not keep that, as bitsandbytes' 8 bits.
    """
    weight: Any = own_tensors(layer)["weight"]
    if _has_dequantize(weight):
        return weight.dequantize().detach()  # type: ignore[no-any-return]
    # The class comes from the library, so that this loads nothing that is not there.
    functional = importlib.import_module(f"{type(weight).__module__.partition('.')[0]}.functional")
    if type(weight).__name__ == "Int8Params":
        return functional.int8_vectorwise_dequant(weight.data, _scales(layer))  # type: ignore[no-any-return]
    return functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return]


def quantized_layers(model: nn.Module) -> list[str]:
    """Return the names of the quantised linear layers in a model, which itself is called ""."""
    found = ((name, own_tensors(m).get("weight")) for name, m in model.named_modules() if linear_shape(m))
    return [name for name, weight in found if weight is not None and is_quantized(weight)]


def weight_count(model: nn.Module, without: Collection[int]) -> int:
    """Return how many numbers the parameters of a model stand for, several of which may share a byte.

    Args:
        model: whose parameters are counted, a shared one once.
        without: the identities of those that are not.
    """
    sizes = {
        id(parameter): matrix_size(module, name) or parameter.numel()
        for module in model.modules()
        for name, parameter in own_parameters(module).items()
        if parameter is not None and id(parameter) not in without
    }
    return sum(sizes.values())


def matrix_size(layer: nn.Module, name: str) -> int:
    """Return how many numbers the matrix has that a parameter is or stands for; 0 where it is no matrix."""
    parameter, shape = own_parameters(layer)[name], linear_shape(layer)
    if parameter is None:
        return 0
    if name == "weight" and shape and is_quantized(parameter):
        return shape.out_features * shape.in_features
    return parameter.numel() if parameter.dim() > 1 and parameter.is_floating_point() else 0


def _has_dequantize(tensor: Tensor) -> bool:
    return type(tensor).dequantize is not Tensor.dequantize


def _scales(layer: nn.Module) -> Tensor | None:
    weight: Any = own_tensors(layer)["weight"]
    held: Tensor | None = weight.SCB
    return getattr(getattr(layer, "state", None), "SCB", None) if held is None else held
