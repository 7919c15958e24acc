"""What the tests look at: a picture of a whole model, its distance from the formula, and filled adapters."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minilora
from minilora.frozen import keeps_statistics
from minilora.module import InjectedModule
from minilora.sites import injected_sites
from minilora.variants.dropout import dropped

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def injected_modules(model: nn.Module) -> dict[str, list[InjectedModule]]:
    """Return the wrappers of a model that train something, by site, outermost first."""
    wrappers = {name: [w for w in site.wrappers if w.trains] for name, site in injected_sites(model).items()}
    return {name: found for name, found in wrappers.items() if found}


def frozen(model: nn.Module) -> nn.Module:
    """Return a copy of a bare model as injection leaves the base.

    Its parameters require no gradient, since for those that do torch may compute other bits; and what keeps
    statistics is in evaluation.
    """
    twin = copy.deepcopy(model).requires_grad_(False)
    for module in twin.modules():
        if keeps_statistics(module):
            module.eval()
    return twin


@contextlib.contextmanager
def nn_dropout_draws_alike() -> Iterator[None]:
    """Let `nn.Dropout` draw as minilora does, so that another library drops the same elements."""
    forward = nn.Dropout.forward

    def draw(self: nn.Dropout, x: Tensor) -> Tensor:
        return dropped(x, self.p) if self.training else x

    nn.Dropout.forward = draw  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Dropout.forward = forward  # type: ignore[method-assign]


class Is:
    """Equal to another only if both hold the very same object."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Is) and self.value is other.value

    __hash__ = None

    def __repr__(self) -> str:
        return f"<{type(self.value).__name__} at {id(self.value):#x}>"


def raw(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Return a tensor's bits, so that NaNs and signed zeros count."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), content.numpy().tobytes()


def state(model: nn.Module) -> dict[str, Any]:
    """Return `state_dict` as bytes, in its order."""
    return {
        key: raw(value) if isinstance(value, Tensor) and not value.is_quantized else repr(value)
        for key, value in model.state_dict().items()
    }


def picture(model: nn.Module) -> dict[str, Any]:
    """Return everything about a model that a failed operation must leave alone, identities included."""
    return {
        "modules": [
            (name, Is(module), module.training, list(module._forward_hooks), list(module._forward_pre_hooks))
            for name, module in model.named_modules(remove_duplicate=False)
        ],
        "parameters": [
            (name, Is(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)
        ],
        "state": state(model),
    }


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that what happens in the block leaves the model exactly as it was."""
    before = picture(model)
    yield
    assert picture(model) == before


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill everything trained with random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in minilora.adapter_state_dict(model).values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


def reference(bare: nn.Module, injected: nn.Module) -> nn.Module:
    """Return a plain copy of the bare model whose weights are W + scaling B A, reckoned in float64 here."""
    plain = copy.deepcopy(bare)
    for site, (layer,) in injected_modules(injected).items():
        delta = layer.config.scaling * (layer.lora_B.detach().double() @ layer.lora_A.detach().double())
        target = plain.get_submodule(site)
        delta = delta.T if type(target).__name__ == "Conv1D" else delta
        weight = getattr(target, layer.parameter).detach()
        setattr(target, layer.parameter, nn.Parameter((weight.double() + delta).to(weight.dtype)))
    return plain


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a share of the largest value."""
    assert actual.shape == expected.shape
    assert torch.isfinite(expected).all()
    largest = expected.double().abs().max().clamp(min=1e-12)
    return ((actual.double() - expected.double()).abs().max() / largest).item()


def assert_equal_to_rounding(actual: Tensor, expected: Tensor) -> None:
    """Assert that two results differ by no more than what the dtype's rounding explains."""
    assert actual.dtype == expected.dtype
    assert distance(actual, expected) < TOLERANCE[actual.dtype]


def assert_far(actual: Tensor, expected: Tensor) -> None:
    """Assert a difference that no rounding explains: what was injected has an effect."""
    assert distance(actual, expected) > 0.1


def interrupted(act: Callable[[], object], at: int) -> bool:
    """Run `act` and raise KeyboardInterrupt at a line of the package; return whether it came."""
    package, lines, came = os.path.dirname(minilora.__file__), 0, False

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines, came
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line":
            lines += 1
            if lines == at:
                came = True
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            act()
    finally:
        sys.settrace(before)
    return came


def skip_as_the_bare_model(compiled: Callable[[], object]) -> None:
    """Skip a test whose model this torch could not compile whole, if it cannot compile the bare one either.

    Args:
        compiled: calls the bare model, compiled alike.
    """
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled()
    pytest.skip("this torch does not compile the bare model whole")
