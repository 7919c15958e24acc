"""Every method of putting LoRA into a model, and of training without.

A method takes a bare model and returns it ready to be trained: what shall be trained requires a gradient,
and nothing else does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

import minilora
from minilora.functional import compute_dtype

from .plain import PlainLoRA
from .setups import Setup, adapted_modules, target_layers
from .unmeasured import NotMeasured, import_optional

TrainingMethod = Callable[[nn.Module, Setup], nn.Module]


def frozen_bound(model: nn.Module, setup: Setup) -> nn.Module:
    """Train the head and one bias of the first adapted layer: the least that a LoRA step can cost.

    The gradient has to come down to that layer, as it does in any LoRA step; no weight gradient is taken.
    """
    _freeze_all_but_head(model, setup)
    first = next(adapted_modules(model, setup))
    if isinstance(first, nn.Linear):
        if first.bias is None:
            first.bias = nn.Parameter(first.weight.new_zeros(first.out_features))
        first.bias.requires_grad_(True)
    else:
        first.one_bias = nn.Parameter(torch.zeros((), device=setup.device))
        first.register_forward_hook(lambda module, _, y: y + module.one_bias)
    return model


def keeping_inputs(model: nn.Module, setup: Setup) -> nn.Module:
    """Keep the input of each adapted layer, too, once where layers share it: the gradient of A needs it.

    The least memory that a LoRA step can take; frozen-bound lets go of such inputs.
    """
    rounded = WeakTensorKeyDictionary()  # one copy in 16 bits for all, too

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, dtype = args[0], compute_dtype(args[0])
        if x.dtype == dtype or not x.is_floating_point():
            kept = x
        elif (kept := rounded.get(x)) is None:
            kept = rounded[x] = x.detach().to(dtype)
        return (_Kept.apply(x, kept), *args[1:])

    for module in adapted_modules(frozen_bound(model, setup), setup):
        module.register_forward_pre_hook(keep)
    return model


class _Kept(torch.autograd.Function):
    """The identity, which keeps something for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def full_fine_tuning(model: nn.Module, setup: Setup) -> nn.Module:
    """Train everything."""
    return model.requires_grad_(True)


def plain_form(model: nn.Module, setup: Setup) -> nn.Module:
    """Put a `PlainLoRA` around each target."""
    _freeze_all_but_head(model, setup)
    for name, layer in target_layers(model, setup).items():
        options: dict[str, Any] = {"device": setup.device, "dtype": torch.float32}
        lora_A = torch.randn(setup.rank, layer.in_features, **options) / setup.rank
        lora_B = torch.zeros(layer.out_features, setup.rank, **options)
        scaling = setup.alpha / setup.rank
        model.set_submodule(name, PlainLoRA(layer, lora_A, lora_B, scaling=scaling, dropout=setup.dropout))
    return model


def with_minilora(model: nn.Module, setup: Setup) -> nn.Module:
    """Call `minilora.inject`."""
    return minilora.inject(model, setup.target_names, setup.lora_config(), trainable=setup.shape.head)


def dora_with_minilora(model: nn.Module, setup: Setup) -> nn.Module:
    """Call `minilora.inject` for DoRA."""
    config = dataclasses.replace(setup.lora_config(), dora=True)
    return minilora.inject(model, setup.target_names, config, trainable=setup.shape.head)


def with_peft(model: nn.Module, setup: Setup) -> nn.Module:
    """Call `peft.get_peft_model`."""
    peft = import_optional("peft")
    return peft.get_peft_model(model, peft_config(setup))


def dora_with_peft(model: nn.Module, setup: Setup) -> nn.Module:
    """Call `peft.get_peft_model` for DoRA."""
    peft = import_optional("peft")
    return peft.get_peft_model(model, peft_config(setup, use_dora=True))


def peft_config(setup: Setup, **more: Any) -> Any:
    """Return PEFT's form of the setup."""
    return import_optional("peft").LoraConfig(
        r=setup.rank,
        lora_alpha=setup.alpha,
        lora_dropout=setup.dropout,
        target_modules=[] if setup.adapts_parameters else setup.target_names,
        target_parameters=setup.target_names if setup.adapts_parameters else None,
        modules_to_save=list(setup.shape.head) or None,
        **more,
    )


def with_loralib(model: nn.Module, setup: Setup) -> nn.Module:
    """Replace each target by a `loralib.Linear` with the same weight."""
    loralib = import_optional("loralib")
    _freeze_all_but_head(model, setup)
    for name, layer in target_layers(model, setup).items():
        new = loralib.Linear(
            layer.in_features,
            layer.out_features,
            r=setup.rank,
            lora_alpha=setup.alpha,
            lora_dropout=setup.dropout,
            bias=layer.bias is not None,
            merge_weights=False,
            device=layer.weight.device,
        )
        new.weight, new.bias = layer.weight, layer.bias
        model.set_submodule(name, new)
    return model


def with_adapters(model: nn.Module, setup: Setup) -> nn.Module:
    """Add a LoRA of the `adapters` library, which needs a transformers of its own and so an environment."""
    adapters = import_optional("adapters")
    if setup.targets != "qv":
        raise NotMeasured("its LoRA has no name for the attention's output projection")
    adapters.init(model)
    config = adapters.LoRAConfig(
        r=setup.rank, alpha=setup.alpha, dropout=setup.dropout, attn_matrices=["q", "v"]
    )
    model.add_adapter("lora", config=config)
    model.train_adapter("lora")
    return model


TRAINING_METHODS: dict[str, TrainingMethod] = {
    "frozen-bound": frozen_bound,
    "frozen-bound, inputs kept": keeping_inputs,
    "full fine-tuning": full_fine_tuning,
    "plain form": plain_form,
    "minilora": with_minilora,
    "PEFT": with_peft,
    "loralib": with_loralib,
    "adapters": with_adapters,
}


def _freeze_all_but_head(model: nn.Module, setup: Setup) -> None:
    model.requires_grad_(False)
    for name in setup.shape.head:
        model.get_submodule(name).requires_grad_(True)


DORA_METHODS: dict[str, TrainingMethod] = {
    "minilora": with_minilora,
    "minilora DoRA": dora_with_minilora,
    "PEFT": with_peft,
    "PEFT DoRA": dora_with_peft,
}
