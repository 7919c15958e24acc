"""What a model answers when it is asked: does it train, and what did merging cost?"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import unchanged
from kinds import KINDS
from models import CASES
from torch import nn

import minilora
from minilora import AdapterConfig, LoRAConfig, MergeError, MiniLoRAError


class Three(nn.Module):
    """Three layers; `called` says which of them are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.called = [0, 1, 2]
        self.factor = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in self.called:
            x = torch.tanh(self.layers[i](x) * (self.factor if i == 1 else 1.0))
        return x


class Experts(nn.Module):
    """Four matrices, of which two are used."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.up[0]) + F.linear(x, self.up[2])


def injected(config: LoRAConfig | AdapterConfig = LoRAConfig(r=2)) -> Three:  # noqa: B008
    torch.manual_seed(0)
    return minilora.inject(Three(), "all-linear", config)  # type: ignore[return-value]


def backward(model: nn.Module) -> None:
    model(torch.randn(5, 4, generator=torch.Generator().manual_seed(1))).square().sum().backward()


@pytest.mark.parametrize("config", [LoRAConfig(r=2), LoRAConfig(r=2, dora=True), AdapterConfig(bottleneck=2)])
def test_a_first_step_has_nothing_wrong(config: LoRAConfig | AdapterConfig) -> None:
    """B is zero, and so A has a gradient of zeros, as it must have."""
    model = injected(config)
    backward(model)
    assert minilora.check_gradients(model) == []


def test_a_layer_that_is_not_called_is_named() -> None:
    model = injected()
    model.called = [0, 2]
    backward(model)
    (line,) = minilora.check_gradients(model)
    assert line == (
        "'layers.1': no gradient: the layer was not called, or nothing that it gave reached the loss"
    )


def test_zeros_and_nan_are_told_apart() -> None:
    model = injected()
    nn.init.ones_(model.layers[1].lora_B)
    model.factor = 0.0
    backward(model)
    assert minilora.check_gradients(
        model
    ) == [  # nothing of the first passes the second, nothing reaches the third
        "'layers.*' (x3): only zeros in its gradients: nothing that it gave had a part in the loss"
    ]
    model.factor = 1.0
    backward(model)
    model.layers[2].lora_A.grad[0, 0] = torch.nan
    model.layers[2].lora_B.grad[1, 1] = torch.inf
    (line,) = minilora.check_gradients(model)
    assert line.startswith("'layers.2': NaN or inf in the gradient of 'lora_A', 'lora_B'")


def test_what_is_frozen_merged_or_disabled_says_so() -> None:
    model = injected()
    for parameter in (model.layers[0].lora_A, model.layers[0].lora_B):
        parameter.requires_grad_(False)
    model.layers[1].merge()
    model.eval()
    backward(model)
    assert minilora.check_gradients(model) == [
        "'layers.0': frozen: requires_grad is False on all that it holds",
        "'layers.1': no gradient: it is merged; call minilora.unmerge(model) before training",
    ]
    model = injected()
    model.layers[1].enabled = False
    backward(model)
    assert minilora.check_gradients(model) == [
        "'layers.1': no gradient: it is disabled; train outside of minilora.disabled"
    ]
    model = injected()
    model.layers[1].lora_A.requires_grad_(False)  # A alone may be frozen: nothing wrong
    backward(model)
    assert minilora.check_gradients(model) == []
    model.layers[1].lora_A.requires_grad_(True)
    assert minilora.check_gradients(model) == ["'layers.1': no gradient for 'lora_A', and one for 'lora_B'"]


def test_experts_that_no_token_reached_are_named() -> None:
    model = minilora.inject(nn.Sequential(Experts()), ["up"], LoRAConfig(r=2))
    model(torch.randn(5, 3)).square().sum().backward()
    (line,) = minilora.check_gradients(model)
    assert line == "'0.up': no token reached the experts 1, 3 of 4"


def test_without_a_backward_it_says_what_to_do() -> None:
    model = injected()
    with pytest.raises(MiniLoRAError, match=r"after loss\.backward\(\) and before optimizer\.zero_grad\(\)$"):
        minilora.check_gradients(model)
    with pytest.raises(MiniLoRAError, match="inject"):
        minilora.check_gradients(Three())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpointing_is_the_reason_where_it_is_one() -> None:
    case = CASES["vit"]  # of text models transformers sees to it
    model = minilora.inject(case.build(), list(case.targets), trainable=["classifier"]).train()
    checkpoint = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    checkpoint({"use_reentrant": True})
    case.call(model).square().sum().backward()
    (line,) = minilora.check_gradients(model)
    assert "use_reentrant=False" in line
    model.zero_grad()
    checkpoint({"use_reentrant": False})
    case.call(model).square().sum().backward()
    assert minilora.check_gradients(model) == []


# What did merging cost?


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_share_is_what_merging_loses(kind: object) -> None:
    model = minilora.inject(kind.build(torch.bfloat16), kind.target, LoRAConfig(r=2), trainable=())  # type: ignore[attr-defined]
    wrappers = [m for m in model.modules() if isinstance(m, minilora.LoRA)]
    with torch.no_grad():
        for wrapper in wrappers:
            wrapper.lora_B.copy_(torch.randn_like(wrapper.lora_B) * 1e-2)
    with unchanged(model):
        shares = minilora.merge_loss(model)
    exact = {w: w.effective_weight(torch.float32) for w in wrappers}
    before = {w: w.unmerged_weight().float() for w in wrappers}
    minilora.merge(model)
    expected = [
        ((exact[w] - getattr(w.bare, w.parameter).float()).norm() / (exact[w] - before[w]).norm()).item()
        for w in wrappers
    ]
    assert sorted(shares.values()) == pytest.approx(sorted(expected), rel=1e-3)
    assert minilora.merge_loss(model) == shares  # merged or not
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_more_bits_lose_less_and_no_update_nothing() -> None:
    model = injected()
    assert set(minilora.merge_loss(model, dtype="bfloat16").values()) == {0.0}
    for wrapper in model.layers:
        nn.init.normal_(wrapper.lora_B, std=1e-3)
    worst = [max(minilora.merge_loss(model, dtype=d).values()) for d in ("bfloat16", "float16", None)]
    assert worst == sorted(worst, reverse=True)
    assert worst[0] > 0.1
    assert worst[-1] < 1e-3


def test_what_cannot_be_merged_is_named() -> None:
    model = injected()
    with pytest.raises(MiniLoRAError, match="floating-point"):
        minilora.merge_loss(model, dtype="int8")
    nn.init.constant_(model.layers[1].lora_B, 1e30)
    with pytest.raises(MergeError, match=r"'layers\.1'.*not finite in torch\.float16"):
        minilora.merge_loss(model, dtype="float16")
