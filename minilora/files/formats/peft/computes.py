"""Where PEFT's update of a layer is W + s B A in the place of W, as it is here; elsewhere, why not.

PEFT adds an update's output to the layer's own; where the layer does more than multiply, or the update is
made as another layer than the base is, the two libraries compute different things from the same A and B.
"""

from __future__ import annotations

from torch import nn

from ....linear import linear_shape
from ....plan import runs_its_own_code
from ....torch_internals import AttentionOutput
from .places import Kind

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def kind_of(module: nn.Module) -> Kind:
    """Return as what PEFT adapts a module that its targets name."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, CONVOLUTIONS):
        return "convolution"
    return "attention input" if isinstance(module, nn.MultiheadAttention) else "linear"


def difference(module: nn.Module) -> str | None:
    """Return why PEFT's LoRA of a module, as a target, is not what minilora's is; None where it is."""
    if isinstance(module, nn.Embedding):
        return _of_embedding(module)
    if isinstance(module, CONVOLUTIONS):
        return _of_convolution(module)
    if isinstance(module, nn.MultiheadAttention):
        one_width = module.in_proj_weight is not None
        return None if one_width else "PEFT adapts attention with one width for query, key and value alone"
    return _of_linear(module)


def _of_linear(module: nn.Module) -> str | None:
    name = type(module).__name__
    if linear_shape(module) is None:
        return f"PEFT has no LoRA for {name}"
    if isinstance(module, AttentionOutput):
        return (
            "nn.MultiheadAttention reads its out_proj and never calls it, so PEFT's LoRA on it alone has no "
            "effect; adapt its in_proj_weight as well"
        )
    if runs_its_own_code(module):
        return f"PEFT adds B A x to what {name} returns, which computes with its weight in a way of its own"
    return None


def _of_embedding(embedding: nn.Embedding) -> str | None:
    if embedding.max_norm is not None:
        return "PEFT renormalises rows of W and of A (max_norm), and here their sum is"
    if embedding.scale_grad_by_freq:
        return "PEFT scales the gradient of A alone by frequency (scale_grad_by_freq)"
    if not runs_code_of(embedding, nn.Embedding) and not hasattr(embedding, "embed_scale"):
        return f"PEFT adds to what {type(embedding).__name__} returns, which is more than a look-up"
    return None


def _of_convolution(convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str | None:
    if convolution.groups > 1:
        return (
            f"PEFT's A reads all channels, and each of the {convolution.groups} groups of the weight its own "
            "alone, so PEFT's update is none of this weight (PEFT cannot merge it either)"
        )
    sizes = zip(convolution.kernel_size, convolution.dilation, strict=True)
    if any(size > 1 and dilation > 1 for size, dilation in sizes):
        return f"PEFT's A is not dilated, and the base is (dilation={convolution.dilation})"
    padding = convolution.padding
    pads = padding == "same" if isinstance(padding, str) else any(padding)
    if convolution.padding_mode != "zeros" and pads:
        return f"PEFT's A pads with zeros, and the base does not (padding_mode={convolution.padding_mode!r})"
    kind = next(kind for kind in CONVOLUTIONS if isinstance(convolution, kind))
    if not runs_code_of(convolution, kind):
        return f"PEFT adds to what {type(convolution).__name__} returns, which is more than a convolution"
    return None


def runs_code_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether calling a module runs the code of a class of torch's, unaltered.

    A convolution's forward is one line; what subclasses replace is the method behind it.
    """
    below = type(module).__mro__[: type(module).__mro__.index(kind)]
    own = {name for part in (module, *below) for name in ("forward", "_conv_forward") if name in vars(part)}
    return not own
