"""W_eff = W + s B A: the formula, its rounding and its derivatives."""

import pytest
import torch

from minilora.functional import effective_weight


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
