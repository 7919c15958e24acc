"""The laws once more on an accelerator, or else on the CPU, so that the tests themselves hold."""

import pytest
import torch
from checks import raw
from models import MLP
from torch import nn
from torch.utils.checkpoint import checkpoint

import minilora
from minilora import LoRAConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])


def model(dtype=torch.float32, config=None):
    """Return an MLP with trained LoRA, on the device, and an input."""
    injected = minilora.inject(MLP().to(DEVICE, dtype), ["up", "down"], config or LoRAConfig(r=4))
    for name, parameter in injected.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return injected.eval(), torch.randn(200, 16, device=DEVICE, dtype=dtype)


def formula(layer, x):
    weight = layer.base.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    bias = layer.base.bias
    return nn.functional.linear(x.double(), weight, None if bias is None else bias.double())


@on_dtypes
@pytest.mark.parametrize("tokens", [3, 200])
@pytest.mark.parametrize("form", ["eager", "grad", "disabled", "merged"])
def test_a_layer_computes_the_formula(dtype, tokens, form):
    injected, x = model(dtype)
    layer, x = injected.up, x[:tokens]
    expected = formula(layer, x)
    if form == "merged":
        minilora.merge(injected)
    if form == "disabled":
        expected = nn.functional.linear(x.double(), layer.base.weight.double(), layer.base.bias.double())
        with minilora.disabled(injected):
            y = layer(x)
    else:
        with torch.set_grad_enabled(form == "grad"):
            y = layer(x)
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.03}[dtype]
    assert (y.device.type, y.dtype) == (DEVICE, dtype)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@on_dtypes
def test_unmerging_gives_back_every_bit(dtype):
    injected, _ = model(dtype)
    before = [raw(parameter) for parameter in injected.parameters()]
    minilora.merge(injected)
    minilora.unmerge(injected)
    assert [raw(parameter) for parameter in injected.parameters()] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_lowers_the_loss(dtype, autocast, dropout):
    injected, x = model(dtype, LoRAConfig(r=4, dropout=dropout))
    frozen = [raw(p) for p in injected.parameters() if not p.requires_grad]
    optimizer = torch.optim.AdamW(minilora.trainable_parameters(injected), lr=3e-2)
    losses = []
    for _ in range(30):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = (injected.train()(x).float() - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert [raw(p) for p in injected.parameters() if not p.requires_grad] == frozen


def test_dropout_keeps_its_share_and_a_checkpoint_repeats_it():
    injected, _ = model(config=LoRAConfig(r=4, dropout=0.25))
    x = torch.ones(20_000, 16, device=DEVICE, requires_grad=True)
    layer = injected.up.train()
    gradients = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(call(x).sum(), [x, layer.lora_A]))
    assert all(map(torch.equal, *gradients))
    through_base = layer.base.weight.sum(0)
    dropped = (gradients[0][0] - through_base).abs().amax(1) < 1e-6
    assert not dropped.all()
    share = ((gradients[0][0] - through_base).abs() > 1e-6).float().mean()
    assert abs(share - 0.75) < 0.01


def test_what_was_saved_loads_on_the_device(tmp_path):
    injected, x = model()
    minilora.save(injected, tmp_path / "a.safetensors")
    fresh = MLP().to(DEVICE)
    fresh.load_state_dict(minilora.eject(injected).state_dict())
    loaded = minilora.load(fresh, tmp_path / "a.safetensors").eval()
    assert {p.device.type for p in loaded.parameters()} == {DEVICE}
    again, _ = model()
    minilora.load(again, tmp_path / "a.safetensors", check_base=False)
    for name, tensor in minilora.adapter_state_dict(loaded).items():
        assert torch.equal(tensor, minilora.adapter_state_dict(again)[name])
    assert loaded(x).device.type == DEVICE


def test_rows_of_a_bank_go_to_their_adapters(tmp_path):
    injected, x = model()
    minilora.save(injected, tmp_path / "a.safetensors")
    alone = injected(x[:4])
    base = minilora.eject(injected)
    bare = base(x[:4])
    bank = minilora.Bank(base, {"a": tmp_path / "a.safetensors"})
    with bank.rows(["a", None, "a", None]):
        mixed = base(x[:4])
    torch.testing.assert_close(mixed[::2], alone[::2], rtol=1e-4, atol=1e-4)
    assert torch.equal(mixed[1::2], bare[1::2])
