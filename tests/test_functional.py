"""W_eff = W + s B A: the formula, its rounding and its derivatives."""

import pytest
import torch
import torch.nn.functional as F

from minilora.functional import add_low_rank, effective_weight, prefers_weight_form
from minilora.variants.plain_linear import effective_linear


def tensors(dtype, adapter_dtype, *, transposed=False):
    weight, lora_A, lora_B = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    weight = weight.T.contiguous() if transposed else weight
    return weight.to(dtype), lora_A.to(adapter_dtype), lora_B.to(adapter_dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_formula_rounded_once(dtype, adapter_dtype, transposed, autocast):
    weight, lora_A, lora_B = tensors(dtype, adapter_dtype, transposed=transposed)
    delta = 0.7 * (lora_B.double() @ lora_A.double())
    exact = weight.double() + (delta.T if transposed else delta)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = effective_weight(weight, lora_A, lora_B, 0.7, transposed=transposed)
    assert result.dtype == dtype
    # Half a unit in the last place of the result, and what float32 loses before it.
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * (dtype != torch.float64)
    assert ((result.double() - exact).abs() <= rounding + 1e-15).all()


def test_result_dtype():
    weight, lora_A, lora_B = tensors(torch.float32, torch.float32)
    rounded = effective_weight(weight, lora_A, lora_B, 0.7, dtype=torch.bfloat16)
    assert torch.equal(rounded, effective_weight(weight, lora_A, lora_B, 0.7).bfloat16())


def test_nothing_is_written_to():
    arguments = tensors(torch.float32, torch.float32)
    before = [tensor.clone() for tensor in arguments]
    result = effective_weight(*arguments, 0.7)
    assert all(map(torch.equal, arguments, before))
    assert result.data_ptr() != arguments[0].data_ptr()


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients(transposed):
    inputs = [t.requires_grad_() for t in tensors(torch.float64, torch.float64, transposed=transposed)]
    assert torch.autograd.gradcheck(lambda *x: effective_weight(*x, 0.7, transposed=transposed), inputs)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (1, 5), (5,), (0, 5), (2, 0, 5)])
def test_both_forms_are_the_formula_in_value_and_gradient(shape, transposed):
    weight, *pair = tensors(torch.float64, torch.float64, transposed=transposed)
    plain_weight, bias = weight.T if transposed else weight, torch.randn(6, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)

    def outcome(form):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, *pair)]
        y = form(*inputs)
        return y, *torch.autograd.grad((y * torch.linspace(-1, 1, 6).double()).sum(), inputs)

    expected = outcome(lambda x, A, B: F.linear(x, plain_weight, bias) + 0.7 * x @ A.T @ B.T)
    forms = [
        lambda x, A, B: effective_linear(x, weight, bias, A, B, 0.7, transposed=transposed),
        lambda x, A, B: add_low_rank(F.linear(x, plain_weight, bias), x, A, B, 0.7),
    ]
    for form in forms:
        for own, plain in zip(outcome(form), expected, strict=True):
            torch.testing.assert_close(own, plain)


@pytest.mark.parametrize("transposed", [False, True])
def test_weight_form_can_be_derived_twice(transposed):
    weight, *pair = tensors(torch.float64, torch.float64, transposed=transposed)
    x = torch.randn(5, 3, dtype=torch.float64).T  # not contiguous
    inputs = [tensor.requires_grad_() for tensor in (x, *pair)]

    def form(x, A, B):
        return effective_linear(x, weight, None, A, B, 0.7, transposed=transposed)

    assert torch.autograd.gradcheck(form, inputs)
    assert torch.autograd.gradgradcheck(form, inputs)


def test_second_derivative_under_autocast_goes_through_the_update():
    """There W_eff is kept from the forward, and what is kept knows nothing of A and B."""
    weight, lora_A, lora_B = tensors(torch.float32, torch.float32)
    x = torch.randn(4, 5, requires_grad=True)
    lora_A.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = effective_linear(x, weight, None, lora_A, lora_B, 0.7)
    (dx,) = torch.autograd.grad(y.float().sum(), x, create_graph=True)
    (dA,) = torch.autograd.grad(dx.sum(), lora_A)
    expected = 0.7 * 4 * lora_B.sum(0)[:, None].expand(2, 5)  # dx = 1 W_eff for each of the four tokens
    torch.testing.assert_close(dA, expected, rtol=0.05, atol=0.05)


def test_weight_form_gives_the_bits_of_a_merged_layer():
    weight, lora_A, lora_B = tensors(torch.float32, torch.float32)
    x, bias = torch.randn(40, 5), torch.randn(6)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            merged = F.linear(x, effective_weight(weight, lora_A, lora_B, 0.7), bias)
            assert torch.equal(effective_linear(x, weight, bias, lora_A, lora_B, 0.7), merged)


def test_what_is_frozen_gets_no_gradient():
    weight, lora_A, lora_B = tensors(torch.float32, torch.float32)
    weight.requires_grad_()
    effective_linear(torch.randn(4, 5), weight, None, lora_A.requires_grad_(), lora_B, 0.7).sum().backward()
    assert weight.grad is None
    assert lora_A.grad is not None


def test_the_form_follows_the_number_of_tokens():
    assert not prefers_weight_form(1, 768, 768)
    assert prefers_weight_form(2048, 768, 768)
    # Where the two cost the same: n (3 in + 2 out) = 4 in out.
    assert [prefers_weight_form(n, 100, 100) for n in (80, 81)] == [False, True]
