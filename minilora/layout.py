"""`Layout`: how the weight of any layer is seen as a matrix of (out, in), or as a stack of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from .errors import TargetError
from .linear import linear_shape
from .torch_internals import Convolution, TransposedConvolution


@dataclass(frozen=True)
class Layout:
    """The matrix in a weight: A is (..., r, in), B is (..., out, r), and both have the leading dimensions.

    Where the weight is stored transposed, its first dimension after the leading ones is `inputs`, else
    `outputs`; the dimensions after that one are flattened.
    """

    outputs: int
    inputs: int
    transposed: bool = False
    leading: tuple[int, ...] = ()
    fan_in: int | None = None
    """How many values one output reads, for the initial values; None means `inputs`."""


def layout_of(module: nn.Module, parameter: str, weight: Tensor) -> Layout:
    """Return how a parameter of a module is seen as a matrix.

    A convolution's weight is (out, in · k · ...). A transposed convolution and an embedding store the side
    that they read first. A parameter of three dimensions that is no kernel is a stack of matrices, as the
    fused experts of a mixture are: (E, out, in), or (E, in, out) where the module says `is_transposed`.

    Raises:
        TargetError: when it is no matrix: of fewer than two dimensions, or empty.

    Example:
        >>> from minilora.layout import layout_of
        >>> conv = nn.Conv2d(3, 8, 5)
        >>> layout_of(conv, "weight", conv.weight)
        Layout(outputs=8, inputs=75, transposed=False, leading=(), fan_in=None)
    """
    shape = tuple(weight.shape)
    if len(shape) < 2 or not weight.numel():
        raise TargetError(
            f"{parameter!r} has the shape {shape}, and LoRA needs a matrix at least; train a vector in full: "
            "trainable=[...]"
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return Layout(outputs=shape[1], inputs=shape[0], transposed=True, fan_in=1)  # one row at a time
    if isinstance(module, TransposedConvolution):
        return Layout(outputs=math.prod(shape[1:]), inputs=shape[0], transposed=True)
    linear = linear_shape(module)
    if parameter == "weight" and linear and shape == (linear.in_features, linear.out_features) != shape[::-1]:
        return Layout(outputs=shape[1], inputs=shape[0], transposed=True)
    kernel = isinstance(module, (Convolution, nn.Bilinear)) or hasattr(module, "kernel_size")
    if len(shape) == 3 and not kernel:
        first, second = shape[1:]
        if getattr(module, "is_transposed", False) is True:
            return Layout(outputs=second, inputs=first, transposed=True, leading=shape[:1])
        return Layout(outputs=first, inputs=second, leading=shape[:1])
    return Layout(outputs=shape[0], inputs=math.prod(shape[1:]))
