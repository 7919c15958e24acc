"""Dropout on the low-rank path: who is dropped, how often, and that the backward knows of it."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import minilora
from minilora import LoRAConfig
from minilora.variants.delta_linear import delta_linear
from minilora.variants.dropout import dropped, kept

SHAPES = [(1000, 384), (7,), (3, 5, 11), (0, 8), ()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_element_is_dropped_or_scaled_up(shape, dtype):
    x = torch.randn(shape, dtype=dtype) + 10
    y = dropped(x, 0.25)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    scale = torch.tensor(1.0, dtype=dtype) / 0.75
    assert ((y == 0) | (y == x * scale)).all()
    assert dropped(x, 0.0) is x
    assert not dropped(x, 1.0).any()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 0.95])
def test_the_share_that_is_kept(p):
    n = 400_000
    for draw in (kept(torch.empty(n), p), dropped(torch.ones(n), p) > 0):
        # Four times the standard deviation of a share of n; and in each of the four places of a number.
        assert abs(draw.double().mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / n)
        for place in draw.view(-1, 4).T:
            assert abs(place.double().mean() - (1 - p)) < 8 * math.sqrt(p * (1 - p) / n)


def test_elements_are_dropped_independently_of_each_other():
    m = kept(torch.empty(400_000), 0.5).double() - 0.5
    for distance in (1, 2, 3, 4, 8, 384):
        correlation = (m[:-distance] * m[distance:]).mean() / 0.25
        assert abs(correlation) < 4 / math.sqrt(len(m))


def test_the_seed_decides_and_every_call_draws_anew():
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = dropped(x, 0.5), dropped(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropped(x, 0.5), first)
    assert torch.equal(dropped(x, 0.5), second)
    assert not torch.equal(first, second)


def test_the_gradient_knows_who_was_dropped():
    x = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    y = dropped(x, 0.5)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, (y != 0).double() / 0.5)


def layer(dtype=torch.float64, p=0.5):
    base = nn.Linear(24, 16, dtype=dtype).requires_grad_(False)
    wrapper = minilora.LoRALinear(base, LoRAConfig(r=4, dropout=p))
    return wrapper.train().to(dtype), nn.init.normal_(wrapper.lora_B)


@pytest.mark.parametrize("tokens", [3, 200])
def test_a_layer_computes_with_what_is_left_of_its_input(tokens):
    """Value and all gradients, from the definition with the same m."""
    model, _ = layer()
    x = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
    inputs = [x, model.lora_A, model.lora_B]
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    m = kept(x, 0.5)
    plain = model.base(x) + model.scaling * (x * m / 0.5) @ model.lora_A.T @ model.lora_B.T
    torch.testing.assert_close(y, plain)
    g = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad((out * g).sum(), inputs) for out in (y, plain))
    torch.testing.assert_close(ours, theirs)


def test_nothing_is_drawn_in_evaluation_or_while_disabled_or_without_dropout():
    model, _ = layer(torch.float32)
    without, _ = layer(torch.float32, p=0.0)
    before = torch.random.get_rng_state()
    without(torch.randn(50, 24, generator=torch.Generator()))
    model.eval()(torch.ones(50, 24))
    with minilora.disabled(nn.Sequential(model.train())):
        model(torch.ones(50, 24))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_drops_the_same_again(reentrant):
    model, _ = layer()
    x = torch.randn(40, 24, dtype=torch.float64, requires_grad=True)
    gradients = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        call(x).square().sum().backward()
        gradients.append([t.grad for t in (x, model.lora_A, model.lora_B)])
        x.grad = model.lora_A.grad = model.lora_B.grad = None
    assert all(map(torch.equal, *gradients))


def test_under_vmap_torch_draws():
    x, A, B, W = torch.randn(5, 30, 8), torch.randn(2, 8), torch.randn(6, 2), torch.zeros(6, 8)

    def each(x):
        return delta_linear(x, W, None, A, B, 1.0, dropout=0.5)

    assert torch.func.vmap(each, randomness="different")(x).shape == (5, 30, 6)
    same = torch.func.vmap(each, randomness="same")(torch.stack([x[0], x[0]]))
    assert torch.equal(*same)
    with pytest.raises(RuntimeError, match="random"):
        torch.func.vmap(each)(x)
