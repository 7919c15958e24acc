"""How A and B begin, and what is computed where that is away from zero."""

import copy

import pytest
import torch
from checks import distance, raw, state
from kinds import KINDS, Kind
from torch import nn

import minilora
from minilora import LoRAConfig, MiniLoRAError, TargetError

BY_NAME = {kind.name: kind for kind in KINDS}
SOME = [
    BY_NAME[n]
    for n in ("linear", "conv2d_groups", "embedding_padding", "attention", "experts_transposed", "table")
]
INITS = ("orthogonal", "pissa", "olora")
on_some = pytest.mark.parametrize("kind", SOME, ids=lambda kind: kind.name)
on_inits = pytest.mark.parametrize("init", INITS)


def injected(kind: Kind, init: str, dtype=torch.float64, **config):
    return minilora.inject(kind.build(dtype), kind.target, LoRAConfig(r=2, init=init, **config), trainable=())


@on_some
@on_inits
def test_it_begins_as_an_identity_to_rounding_with_neither_a_nor_b_zero(kind, init):
    bare, x = kind.build(), kind.input()
    model = injected(kind, init)
    assert distance(model(x).detach(), bare(x).detach()) < 1e-13
    assert model.layer.lora_A.any()
    assert model.layer.lora_B.any()
    assert state(minilora.eject(model)) == state(bare)


@on_some
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_trained_merged_saved_and_loaded_the_update_is_the_change_since_the_start(kind, init, tmp_path):
    model, x = injected(kind, init), kind.input()
    layer = model.layer
    start = [t.detach().clone() for t in (layer.lora_A, layer.lora_B)]
    optimizer = torch.optim.SGD(minilora.trainable_parameters(model), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    assert raw(layer.lora_A_start) == raw(start[0])
    delta = layer.scaling * (layer.lora_B @ layer.lora_A - start[1] @ start[0])
    assert distance(layer.delta_weight().detach(), delta.detach()) < 1e-13
    model.eval()
    with torch.no_grad():
        expected = model(x)
        assert distance(expected, kind.build()(x)) > 1e-4
        assert distance(minilora.merge(model)(x), expected) < 1e-12
        minilora.unmerge(model)
    minilora.save(model, tmp_path / "a.safetensors")
    fresh = minilora.load(kind.build().eval(), tmp_path / "a.safetensors")
    assert raw(fresh(x)) == raw(model(x)) == raw(copy.deepcopy(model)(x))
    assert [name for name, p in fresh.named_parameters() if p.requires_grad] == [
        "layer.lora_A",
        "layer.lora_B",
    ]


def test_pissa_takes_the_best_approximation_and_olora_the_first_directions_of_qr():
    weight = torch.randn(12, 8, dtype=torch.float64)
    for init in ("pissa", "olora"):
        model = nn.Sequential(nn.Linear(8, 12)).double()
        with torch.no_grad():
            model[0].weight.copy_(weight)
        layer = minilora.inject(model, "0", LoRAConfig(r=3, alpha=5, init=init))[0]
        if init == "pissa":
            U, S, V = torch.linalg.svd(weight, full_matrices=False)
            best = U[:, :3] @ S[:3].diag() @ V[:3]
            assert distance(layer.scaling * (layer.lora_B @ layer.lora_A).detach(), best) < 1e-12
            assert distance(layer.lora_A.norm(dim=1).detach(), layer.lora_B.norm(dim=0).detach()) < 1e-12
        else:
            assert distance((layer.lora_B.T @ layer.lora_B).detach(), torch.eye(3).double()) < 1e-12
            assert distance((layer.lora_B @ layer.lora_A).detach()[:, :3], weight[:, :3]) < 1e-12


def test_with_dora_too():
    kind = BY_NAME["linear"]
    model, x = injected(kind, "pissa", dora=True), kind.input()
    assert distance(model(x).detach(), kind.build()(x).detach()) < 1e-12


def test_what_cannot_begin_so_is_refused():
    with pytest.raises(MiniLoRAError, match="r must be even with init='orthogonal'"):
        LoRAConfig(r=3, init="orthogonal")
    with pytest.raises(MiniLoRAError, match="alpha must be above 0 with init='pissa'"):
        LoRAConfig(init="pissa", alpha=0)
    with pytest.raises(
        TargetError, match="takes r directions out of the weight, and it has 4: lower r from 8"
    ):
        minilora.inject(nn.Sequential(nn.Linear(4, 6)), "0", LoRAConfig(init="olora"))
