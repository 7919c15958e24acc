"""W_eff = W + s B A: the formula, its rounding and its derivatives."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from minilora.functional import add_low_rank, effective_weight
from minilora.variants.choice import prefers_weight_form
from minilora.variants.delta_linear import delta_linear
from minilora.variants.dropout import kept
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
def test_all_forms_are_the_formula_in_value_and_gradient(shape, transposed):
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
        lambda x, A, B: delta_linear(x, weight, bias, A, B, 0.7, transposed=transposed),
        lambda x, A, B: add_low_rank(F.linear(x, plain_weight, bias), x, A, B, 0.7),
    ]
    for form in forms:
        for own, plain in zip(outcome(form), expected, strict=True):
            torch.testing.assert_close(own, plain)


FORMS = [effective_linear, delta_linear, functools.partial(delta_linear, dropout=0.5)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=["weight", "delta", "dropout"])
def test_a_form_can_be_derived_twice(form, transposed):
    weight, *pair = tensors(torch.float64, torch.float64, transposed=transposed)
    x = torch.randn(5, 3, dtype=torch.float64).T  # not contiguous
    bias = torch.randn(6, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x, bias, *pair)]

    def compute(x, bias, A, B):
        torch.manual_seed(0)
        return form(x, weight, bias, A, B, 0.7, transposed=transposed)

    assert torch.autograd.gradcheck(compute, inputs)
    assert torch.autograd.gradgradcheck(compute, inputs)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4))[1:])
def test_what_needs_no_gradient_changes_nothing_of_the_others(needed):
    """Of x, b, A and B, in every combination and twice: the delta form shares products between them."""
    weight, *pair = tensors(torch.float64, torch.float64)
    given = torch.randn(4, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64), *pair

    def own(x, bias, A, B):
        return delta_linear(x, weight, bias, A, B, 0.7, dropout=0.5)

    def plain(x, bias, A, B):
        return F.linear(x, weight, bias) + 0.7 * (x * kept(x, 0.5) / 0.5) @ A.T @ B.T

    def gradients(form):
        torch.manual_seed(0)
        inputs = [t.clone().requires_grad_(needs) for t, needs in zip(given, needed, strict=True)]
        leaves = [t for t in inputs if t.requires_grad]
        first = torch.autograd.grad(form(*inputs).square().sum(), leaves, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for ours, theirs in zip(gradients(own), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs)


# The warning is torch's own, when its rules for forward mode are first loaded.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("form", FORMS, ids=["weight", "delta", "dropout"])
def test_forward_mode_and_batches_of_forms(form):
    """jvp against a difference quotient's limit, the backward; vmap against a loop."""
    weight, *pair = tensors(torch.float64, torch.float64)
    given = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64), *pair
    tangents = [torch.randn_like(t) for t in given]

    def compute(x, bias, A, B):
        return form(x, weight, bias, A, B, 0.7)

    with torch.random.fork_rng():
        _, dy = torch.func.jvp(compute, given, tuple(tangents))
    with torch.random.fork_rng():
        _, pull = torch.func.vjp(compute, *given)
    g = torch.randn_like(dy)
    through = sum((a * b).sum() for a, b in zip(pull(g), tangents, strict=True))
    torch.testing.assert_close((g * dy).sum(), through)
    if "dropout" not in getattr(form, "keywords", {}):
        rows = torch.func.vmap(lambda x: compute(x, *given[1:]))(given[0])
        torch.testing.assert_close(rows, compute(*given))
        many = torch.func.vmap(lambda B: compute(*given[:3], B))(torch.stack([pair[1], -pair[1]]))
        torch.testing.assert_close(many[1], compute(*given[:3], -pair[1]))

    def gradient_of_x(B):
        return torch.func.grad(lambda x: (compute(x, *given[1:3], B) * g).sum())(given[0])

    batched = torch.func.vmap(gradient_of_x, randomness="same")(torch.stack([pair[1], 0 * pair[1]]))
    torch.testing.assert_close(batched[1], g @ weight)


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


@pytest.mark.parametrize("form", FORMS, ids=["weight", "delta", "dropout"])
def test_what_is_frozen_gets_no_gradient(form):
    weight, lora_A, lora_B = tensors(torch.float32, torch.float32)
    weight.requires_grad_()
    form(torch.randn(4, 5), weight, None, lora_A.requires_grad_(), lora_B, 0.7).sum().backward()
    assert weight.grad is None
    assert lora_A.grad is not None


def test_the_form_follows_the_number_of_tokens():
    assert not prefers_weight_form(768, 768, 768 * 768)
    assert prefers_weight_form(2048 * 768, 2048 * 768, 768 * 768)
    # Where the two cost the same: n (3 in + 2 out) = 4 in out.
    assert [prefers_weight_form(n * 100, n * 100, 100 * 100) for n in (80, 81)] == [False, True]
