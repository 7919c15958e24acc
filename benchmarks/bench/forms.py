"""The forms that a model with an update can take for inference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import minilora

from .methods import with_minilora, with_peft
from .setups import Setup

BASE = "base"
UNMERGED = "minilora unmerged"


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form of the model, as a row of the table."""

    name: str
    build: Callable[[], nn.Module]
    """Returns a model of its own in evaluation mode, that no other form shares weights with."""
    compiled: bool = False
    in_bfloat16: bool = False
    """Whether the form is cast as a whole, and so runs without autocast."""


def forms(setup: Setup) -> list[Form]:
    """Return the forms to compare. All but the base hold the same update."""
    base = setup.build().eval()
    unmerged = with_minilora(copy.deepcopy(base), setup).eval()
    _randomise_update(unmerged)

    def changed(change: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
        return lambda: change(copy.deepcopy(unmerged), **options)

    def peft(*, merged: bool) -> nn.Module:
        model: Any = with_peft(copy.deepcopy(base), setup).eval()
        _copy_update(unmerged, model)
        if merged:
            model.merge_adapter()
        return model

    fused, fused_to_bf16 = changed(minilora.fuse), changed(minilora.fuse, dtype=torch.bfloat16)
    return [
        Form(name=BASE, build=lambda: copy.deepcopy(base)),
        Form(name=UNMERGED, build=lambda: copy.deepcopy(unmerged)),
        Form(name="minilora merged", build=changed(minilora.merge)),
        Form(name="minilora fused", build=fused),
        Form(name="minilora fused to bf16", build=fused_to_bf16, in_bfloat16=True),
        Form(name="minilora fused + torch.compile", build=fused, compiled=True),
        Form(
            name="minilora fused to bf16 + torch.compile",
            build=fused_to_bf16,
            in_bfloat16=True,
            compiled=True,
        ),
        Form(name="PEFT unmerged", build=lambda: peft(merged=False)),
        Form(name="PEFT merged", build=lambda: peft(merged=True)),
    ]


def _updates(model: nn.Module) -> dict[str, minilora.LoRALinear]:
    return {name: each for name, each in model.named_modules() if isinstance(each, minilora.LoRALinear)}


@torch.no_grad()
def _randomise_update(model: nn.Module) -> None:
    """Give every B random values: it starts at zero, and a merge of zero proves nothing."""
    for layer in _updates(model).values():
        layer.lora_B.normal_(std=0.1)  # an update of about half the weights' own size


@torch.no_grad()
def _copy_update(source: nn.Module, peft_model: Any) -> None:
    """Give a PEFT model the update of one of minilora's, so that the two compute the same."""
    bare = peft_model.get_base_model()
    for name, layer in _updates(source).items():
        site = bare.get_submodule(name)
        site.lora_A["default"].weight.copy_(layer.lora_A)
        site.lora_B["default"].weight.copy_(layer.lora_B)
