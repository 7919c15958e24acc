"""DoRA in PEFT's folders, both ways; what begins at the weight is plain LoRA of twice the rank there."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from checks import assert_equal_to_rounding, assert_far, randomise, state
from torch import Tensor, nn

import minilora
from minilora import CheckpointError, LoRAConfig

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.peft
TARGETS = ["look", "conv", "seq", "up"]


class Net(nn.Module):
    """An embedding, two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.seq = nn.Embedding(9, 4), nn.Conv1d(4, 6, 3, padding=1)
        self.conv, self.up = nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Linear(9, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.conv(self.seq(self.look(ids).mT).unsqueeze(1)).flatten(2).mT.reshape(2, -1, 9))


IDS = torch.arange(12).reshape(2, 6) % 9


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def read_by_peft(folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(net(), folder, is_trainable=True).eval()


def one_step(model: nn.Module) -> None:
    """Take the step of one optimizer on whatever trains."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(IDS).square().mean().backward()
    optimizer.step()


def test_dora_that_minilora_trained_is_peft_s_dora(tmp_path: Path) -> None:
    model = randomise(minilora.inject(net(), TARGETS, LoRAConfig(r=2, dora=True))).eval()
    minilora.save(model, tmp_path / "a", format="peft")
    theirs = read_by_peft(tmp_path / "a")
    assert_equal_to_rounding(model(IDS), theirs(IDS))
    assert_far(model(IDS), net()(IDS))
    one_step(model)
    one_step(theirs)
    assert_equal_to_rounding(model(IDS), theirs(IDS))
    again = minilora.load(net(), tmp_path / "a")
    assert minilora.summary(again).rows[0].description.startswith("DoRA")
    minilora.save(again, tmp_path / "b", format="peft")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter_model.safetensors"
    ).read_bytes()


def test_dora_that_peft_trained(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True)
        theirs = peft.get_peft_model(net(), config).eval()
        for tensor in peft.get_peft_model_state_dict(theirs).values():
            tensor.data.add_(torch.randn_like(tensor) * 0.2)
        theirs.save_pretrained(tmp_path)
    model = minilora.load(net(), tmp_path).eval()
    assert_equal_to_rounding(model(IDS), theirs(IDS))
    one_step(model)
    one_step(theirs)
    assert_equal_to_rounding(model(IDS), theirs(IDS))


def test_a_folder_with_half_of_dora_is_refused(tmp_path: Path) -> None:
    model = randomise(minilora.inject(net(), TARGETS, LoRAConfig(r=2, dora=True)))
    minilora.save(model, tmp_path, format="peft")
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "use_dora": False}))
    with pytest.raises(CheckpointError, match="a magnitude of DoRA, and the config says use_dora=false"):
        minilora.load(net(), tmp_path)
    plain = randomise(minilora.inject(net(), TARGETS, LoRAConfig(r=2)))
    minilora.save(plain, tmp_path / "plain", format="peft")
    file = tmp_path / "plain" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora: no lora_magnitude_vector in the file"):
        minilora.load(net(), tmp_path / "plain")
    mixed = minilora.inject(net(), ["up"], LoRAConfig(r=2, dora=True))
    minilora.inject(mixed, ["seq"], LoRAConfig(r=2))
    with pytest.raises(CheckpointError, match="dora: PEFT has one value for all sites"):
        minilora.save(mixed, tmp_path / "mixed", format="peft")


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_begins_at_the_weight_is_plain_lora_of_twice_the_rank(
    init: str, rslora: bool, tmp_path: Path
) -> None:
    model = minilora.inject(net(), ["seq", "up"], LoRAConfig(r=2, init=init, rslora=rslora)).eval()  # type: ignore[arg-type]
    for _ in range(3):
        one_step(model)
    minilora.save(model, tmp_path, format="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    assert_equal_to_rounding(read_by_peft(tmp_path)(IDS), model(IDS))
    assert minilora.load(net(), tmp_path).up.config.r == 4
    assert state(minilora.eject(model)) == state(net())
