"""What docs/kinds.md says of PEFT and loralib, held to the versions that it names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch
from checks import distance
from kinds import KINDS, Called
from torch import Tensor, nn

BY_NAME = {kind.name: kind for kind in KINDS}
pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore")]


def installed(name: str, wanted: str) -> pytest.MarkDecorator:
    try:
        found = version(name)
    except PackageNotFoundError:
        found = "none"
    return pytest.mark.skipif(found != wanted, reason=f"the page tells of {name} {wanted}, here is {found}")


def filled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def with_peft(bare: nn.Module, target: str, *, parameter: bool = False, **config: Any) -> nn.Module:
    import peft

    where = (
        {"target_modules": [], "target_parameters": [target]} if parameter else {"target_modules": [target]}
    )
    config = {"r": 2, "init_lora_weights": False, **where, **config}
    return filled(peft.get_peft_model(bare, peft.LoraConfig(**config))).eval()


def conv(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 8, 3, **options))


def attention(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x, x, x


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1)


IMAGE, TOKENS, PAIRS = torch.randn(2, 6, 7, 7), torch.randn(2, 5, 8), torch.randn(3, 4)
PEFT: dict[str, tuple[Callable[[], nn.Module], str, bool, Tensor, str]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 6)), "0", False, TOKENS, "right"),
    "own forward": (lambda: BY_NAME["scaled"].build(torch.float32), "layer", False, TOKENS, "merged is not"),
    "conv": (conv, "0", False, IMAGE, "right"),
    "conv dilation": (lambda: conv(dilation=2), "0", False, IMAGE, "RuntimeError"),
    "conv reflect": (
        lambda: conv(padding=1, padding_mode="reflect"), "0", False, IMAGE, "merged is not",
    ),
    "conv groups": (lambda: nn.Sequential(nn.Conv2d(6, 9, 3, groups=3)), "0", False, IMAGE, "ValueError"),
    "conv groups merged": (lambda: conv(groups=2), "0", False, IMAGE, "NotImplementedError"),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(6, 8, 3)), "0", False, IMAGE, "ValueError"),
    "transposed as a parameter": (
        lambda: nn.Sequential(nn.ConvTranspose2d(6, 8, 3)), "0.weight", True, IMAGE, "ValueError",
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 8)), "0", False, torch.arange(6).view(2, 3), "right",
    ),
    "bilinear": (lambda: BY_NAME["bilinear"].build(torch.float32), "layer", False, PAIRS, "ValueError"),
    "bilinear as a parameter": (
        lambda: BY_NAME["bilinear"].build(torch.float32), "layer.weight", True, PAIRS, "right",
    ),
    "attention as a parameter": (
        lambda: Called(nn.MultiheadAttention(8, 2), attention), "layer.in_proj_weight", True, TOKENS, "right",
    ),
    "out_proj": (
        lambda: Called(nn.MultiheadAttention(8, 2), attention), "out_proj", False, TOKENS, "no effect",
    ),
    "encoder in eval": (encoder, "linear1", False, TOKENS, "no effect"),
    "experts": (lambda: BY_NAME["experts"].build(torch.float32), "layer.up", True, TOKENS, "right"),
    "lstm": (lambda: Called(nn.LSTM(8, 8), lambda x: (x,)), "layer", False, TOKENS, "ValueError"),
    "lstm as a parameter": (
        lambda: Called(nn.LSTM(8, 8), lambda x: (x,)), "layer.weight_ih_l0", True, TOKENS, "right",
    ),
    "parametrized": (
        lambda: Called(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), lambda x: (x,)), "layer",
        False, TOKENS, "lost when merged",
    ),
}  # fmt: skip


@installed("peft", "0.21.2")
@pytest.mark.parametrize("name", PEFT)
def test_what_peft_does(name: str) -> None:
    make, target, parameter, x, expected = PEFT[name]
    torch.manual_seed(0)
    bare = make().eval()
    base = copy.deepcopy(bare)(x).detach()
    try:
        model = with_peft(bare, target, parameter=parameter)
        unmerged = model(x).detach()
        merged = model.merge_and_unload()(x).detach()
    except (RuntimeError, ValueError, AttributeError) as error:
        found = type(error).__name__
    else:
        same, effect = distance(unmerged, merged) < 1e-4, distance(unmerged, base) > 0.01
        kept = distance(merged, base) > 0.01
        found = "right" if same and effect else "merged is not" if effect else "no effect"
        found = found if kept else "lost when merged"
    assert found == expected


@installed("peft", "0.21.2")
def test_peft_updates_out_proj_twice_and_forms_whole_weights() -> None:
    bare = Called(nn.MultiheadAttention(8, 2), attention).eval()
    twice = copy.deepcopy(bare)
    model = with_peft(bare, "layer")
    layer = model.base_model.model.layer
    with torch.no_grad():
        twice.layer.in_proj_weight += layer.get_delta_weight("default")
        twice.layer.out_proj.weight += 2 * layer.base_layer.out_proj.get_delta_weight("default")
        assert distance(model(TOKENS), twice(TOKENS)) < 1e-5
    with pytest.raises(ValueError, match="lora_dropout"):
        with_peft(BY_NAME["experts"].build(), "layer.up", parameter=True, lora_dropout=0.1)
    from test_kinds import Sizes

    experts = BY_NAME["experts"].build()
    model = with_peft(experts, "layer.up", parameter=True)
    with Sizes({p.untyped_storage().data_ptr() for p in model.parameters()}) as sizes:
        model(BY_NAME["experts"].input())
    assert sizes.largest >= 3 * 12 * 8


@installed("loralib", "0.1.2")
def test_what_loralib_does() -> None:
    import loralib

    for options in ({}, {"groups": 2}, {"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}):
        layer = filled(loralib.Conv2d(6, 8, 3, r=2, **options))
        unmerged = layer(IMAGE).detach()
        layer.eval()  # merges, and returns None
        assert distance(layer(IMAGE).detach(), unmerged) < 1e-5
    for kind, x in ((loralib.Conv1d, IMAGE[0]), (loralib.Conv3d, IMAGE[:, :, None].expand(2, 6, 7, 7, 7))):
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            kind(6, 8, 3, r=2)(x)
