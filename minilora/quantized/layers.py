"""`dequantized`: plain linear layers in the place of quantised ones; and what can be said of these."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import MiniLoRAError
from ..linear import linear_shape
from ..sites import injected_sites, replace_modules
from ..torch_internals import has_hooks, own_tensors, put_parameter
from ..view import Substitution
from .weights import given_back, gives_back, is_packed_for_processor


@contextlib.contextmanager
def dequantized(model: nn.Module) -> Iterator[None]:
    """Put an `nn.Linear` in the place of each quantised layer whose weight an injection updates.

    Where the block raises, the quantised layers come back, the very same objects; else they are let go. One
    whose weight nobody gives back stays as it is.

    Warns:
        UserWarning: when transformers' config of the model goes on saying that it is quantised.
    """
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        warnings.warn(
            "model.config.quantization_config still says that the model is quantised, and from_pretrained "
            "would believe it: before saving call model.hf_quantizer.remove_quantization_config(model)",
            UserWarning,
            stacklevel=4,
        )
    plain = {
        site.bare: _plain(site.bare)
        for site in injected_sites(model).values()
        if any(isinstance(w, Substitution) and w.parameter == "weight" for w in site.wrappers)
        and gives_back(site.bare)
        and not _obstacle(site.bare)
    }
    replace_modules(model, plain)
    try:
        yield
    except BaseException:
        replace_modules(model, {new: old for old, new in plain.items()})
        raise


def why_not_merged(layer: nn.Module) -> str:
    """Return why W + s B A has no place in a layer whose weight is not plain, and what to do instead."""
    weight = own_tensors(layer).get("weight", getattr(layer, "weight", None))
    dtype = f" of {weight.dtype}" if isinstance(weight, Tensor) else ""
    instead = "load the base in floating point"
    if gives_back(layer):
        instead = "fuse it into the weight that its library gives back, minilora.fuse(model, dequantize=True)"
        instead += _obstacle(layer)
    return (
        f"the weight of {type(layer).__name__}, a {type(weight).__name__}{dtype}, is not a plain "
        f"floating-point tensor, so W + scaling B A cannot be formed; run it unmerged, or {instead}"
    )


def require_gradient(wrapper: Substitution, x: Tensor, y: Tensor) -> None:
    """Raise where the base of a layer in training has cut the gradient of its input.

    What stands before it would be trained by the update's share of the gradient alone, and nobody would know.

    Args:
        wrapper: around the base.
        x: what the base was given.
        y: what it gave.

    Raises:
        MiniLoRAError: naming the layer.
    """
    if not (wrapper.training and torch.is_grad_enabled() and x.requires_grad):
        return
    if not y.requires_grad or is_packed_for_processor(wrapper.bare):
        raise MiniLoRAError(
            f"{wrapper.called()}: {type(wrapper.bare).__name__} gives its input no gradient, so what is "
            "before it would be trained wrongly. Some quantised layers cannot: those that round activations "
            "as they come, and bitsandbytes' 4 bits on some CPUs once called in evaluation. Quantise weights "
            "only, or load the model anew"
        )


def _plain(layer: nn.Module) -> nn.Linear:
    """Return an `nn.Linear` with the weight that a quantised layer stands for, and with its very bias."""
    shape, tensors = linear_shape(layer), own_tensors(layer)
    assert shape is not None
    plain = nn.Linear(shape.in_features, shape.out_features, bias="bias" in tensors, device="meta")
    put_parameter(plain, "weight", nn.Parameter(given_back(layer), requires_grad=False))
    if "bias" in tensors:
        put_parameter(plain, "bias", tensors["bias"])  # type: ignore[arg-type]
    return plain.train(layer.training)


def _obstacle(layer: nn.Module) -> str:
    """Return on what condition another layer may take this one's place, as the end of a message, or ""."""
    if has_hooks(layer) or "forward" in vars(layer):
        return ", once its hooks are removed, which a plain layer would not have"
    if is_packed_for_processor(layer):
        return (
            ", on a model loaded anew: when this one was called in evaluation, bitsandbytes packed the weight"
            " for the processor, which cannot be undone"
        )
    return ""
