"""A bias of B in files: PEFT's folders, the command line, sums; and the bank, which has none."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checks import assert_far, distance, randomise, raw
from command_line import run
from torch import nn

import minilora
from minilora import CheckpointError, LoRAConfig, MiniLoRAError

CONFIG = LoRAConfig(r=2, lora_bias=True)
TARGETS = ["up", "conv", "grouped", "transposed", "scaled", "dora"]


class Net(nn.Module):
    """Layers with a bias, which nobody calls here, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.scaled, self.dora = (nn.Linear(6, 5) for _ in range(3))
        self.conv, self.grouped = nn.Conv2d(4, 8, (3, 2)), nn.Conv1d(4, 8, 2, groups=2)
        self.transposed = nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.bare = nn.Linear(6, 5, bias=False)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


@pytest.fixture
def adapted(tmp_path: Path) -> nn.Module:
    """A model with values as if trained, its file, and its base's file."""
    safetensors.torch.save_file(net().state_dict(), tmp_path / "base.safetensors")
    special = {
        "scaled": LoRAConfig(r=2, rslora=True, init="pissa", lora_bias=True),
        "dora": LoRAConfig(r=2, dora=True, lora_bias=True),
    }
    configs = {target: special.get(target, CONFIG) for target in TARGETS}
    model = randomise(minilora.inject(net(), TARGETS, configs, trainable=()))
    minilora.save(model, tmp_path / "a.safetensors")
    return model


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_fused_on_the_command_line_it_is_the_fused_model_to_the_bit(
    adapted: nn.Module, dtype: str | None, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("base.safetensors", "a.safetensors", "out.safetensors")]
    arguments = [part for pair in zip(("--base", "--adapter", "--out"), files, strict=True) for part in pair]
    result = run("fuse", *arguments, *(("--dtype", dtype) if dtype else ()))
    assert result.code == 0, result.err
    expected = minilora.fuse(adapted, dtype=dtype).state_dict()
    found = safetensors.torch.load_file(files[-1])
    assert {key: raw(tensor) for key, tensor in found.items()} == {
        key: raw(tensor) for key, tensor in expected.items()
    }
    assert_far(found["conv.bias"].float(), net().conv.bias.detach())


def test_a_base_without_the_bias_is_refused_by_fuse_and_known_to_verify(tmp_path: Path) -> None:
    safetensors.torch.save_file(net().state_dict(), tmp_path / "base.safetensors")
    minilora.save(randomise(minilora.inject(net(), ["bare"], CONFIG)), tmp_path / "a.safetensors")
    where = ("--base", tmp_path / "base.safetensors", "--adapter", tmp_path / "a.safetensors")
    result = run("fuse", *where, "--out", tmp_path / "out.safetensors")
    assert result.code == 2
    assert "'bare': B has a bias, and the base's files have none of the layer's to take it in" in result.err
    assert not (tmp_path / "out.safetensors").exists()
    assert (
        run("verify", tmp_path / "a.safetensors", *where[:2]).out == "yes: the same base (1 weights agree)\n"
    )


def test_inspect_and_diff_measure_it(adapted: nn.Module, tmp_path: Path) -> None:
    shown = json.loads(run("inspect", tmp_path / "a.safetensors", "--json").out)
    assert shown["problems"] == []
    up = next(entry for entry in shown["sites"] if entry["site"] == "up")
    assert up["shapes"] == {"lora_A": [2, 6], "lora_B": [5, 2], "lora_bias": [5]}
    moved = torch.cat([adapted.up.delta_weight(), adapted.up.scaling * adapted.up.lora_bias[:, None]], dim=1)
    assert up["norm"] == pytest.approx(float(moved.detach().double().norm()), rel=1e-6)
    assert "lora_bias=True" in run("inspect", tmp_path / "a.safetensors").out
    with torch.no_grad():
        for layer in (adapted.up, adapted.dora):
            layer.lora_bias.add_(1.0)
    minilora.save(adapted, tmp_path / "b.safetensors")
    told = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json")
    changes = {change["site"]: change["distance"] for change in json.loads(told.out)["changes"]}
    assert set(changes) == {"up", "dora"}
    assert changes["up"] == pytest.approx(adapted.up.scaling * 5**0.5 / up["norm"], rel=1e-5)


def test_a_file_without_it_is_damaged(adapted: nn.Module, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    del tensors["up.lora_bias"]
    safetensors.torch.save_file(tensors, tmp_path / "b.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"missing from the file: 'up.lora_bias'"):
        minilora.load(net(), tmp_path / "b.safetensors")


def test_converted_to_peft_and_back_it_is_the_same(tmp_path: Path) -> None:
    model = randomise(minilora.inject(linear(), ["0", "2"], CONFIG, trainable=()))
    minilora.save(model, tmp_path / "a.safetensors")
    assert run("convert", tmp_path / "a.safetensors", tmp_path / "peft", "--to", "peft").code == 0
    assert run("convert", tmp_path / "peft", tmp_path / "b.safetensors", "--to", "minilora").code == 0
    assert run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors").out == "the same\n"
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["lora_bias"] is True
    names = set(safetensors.torch.load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    assert "base_model.model.2.lora_B.bias" in names


def test_a_sum_of_adapters_sums_the_biases(tmp_path: Path) -> None:
    base = linear().double()
    configs = [LoRAConfig(r=2, lora_bias=True), LoRAConfig(r=1, alpha=5, lora_bias=True), LoRAConfig(r=1)]
    weights = {str(tmp_path / f"{i}"): weight for i, weight in enumerate((0.5, -2.0, 1.0))}
    moved = torch.zeros(5, dtype=torch.float64)
    for seed, (path, config) in enumerate(zip(weights, configs, strict=True)):
        model = randomise(minilora.inject(copy.deepcopy(base), ["0"], config, trainable=()), seed)
        minilora.save(model, path)
        if config.lora_bias:
            moved += weights[path] * config.scaling * model[0].lora_bias.detach()
    for r in (None, 2):
        minilora.combine(weights, tmp_path / f"sum{r}", r=r)
        model = minilora.load(copy.deepcopy(base), tmp_path / f"sum{r}")
        assert distance((model[0].bias - base[0].bias).detach(), moved) < 1e-12


def test_a_bank_has_none_and_says_so(tmp_path: Path) -> None:
    minilora.save(randomise(minilora.inject(linear(), ["0"], CONFIG)), tmp_path / "a.safetensors")
    with pytest.raises(
        MiniLoRAError, match=r"'0': LoRA r=2 alpha=16 lora_bias on Linear: .* without DoRA or a bias"
    ):
        minilora.Bank(linear(), {"a": tmp_path / "a.safetensors"})


@pytest.mark.peft
class TestPeft:
    """What PEFT has no word for, or another one. What it has is in `peft_settings`."""

    def test_what_peft_does_not_combine_is_refused(self, tmp_path: Path) -> None:
        model = minilora.inject(linear(), ["0"], LoRAConfig(r=2, dora=True, lora_bias=True))
        with pytest.raises(CheckpointError, match="lora_bias: PEFT has none beside use_dora"):
            minilora.save(model, tmp_path / "a", format="peft")
        mixed = minilora.inject(linear(), ["0", "2"], {"0": CONFIG, "2": LoRAConfig(r=2)}, trainable=())
        with pytest.raises(
            CheckpointError, match=r"lora_bias: PEFT has one value for all sites, .* False, True"
        ):
            minilora.save(mixed, tmp_path / "b", format="peft")

    @pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa"])
    def test_how_a_and_b_began_is_written_in_words_that_peft_takes(self, init: str, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")
        for lora_bias in (False, True):
            folder, config = tmp_path / f"{lora_bias}", LoRAConfig(r=2, init=init, lora_bias=lora_bias)  # type: ignore[arg-type]
            model = randomise(minilora.inject(linear(), ["0"], config, trainable=())).eval()
            minilora.save(model, folder, format="peft")
            theirs, x = peft.PeftModel.from_pretrained(linear(), folder).eval(), torch.randn(3, 6)
            with torch.no_grad():
                assert distance(theirs(x), model(x)) < 1e-5

    def test_halves_are_refused(self, tmp_path: Path) -> None:
        for lora_bias, message in (
            (True, "a bias of B, and the config says"),
            (False, "no lora_B.bias in the"),
        ):
            folder = tmp_path / f"{lora_bias}"
            config = LoRAConfig(r=2, lora_bias=lora_bias)
            minilora.save(minilora.inject(linear(), ["0"], config, trainable=()), folder, format="peft")
            file = folder / "adapter_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "lora_bias": not lora_bias}))
            with pytest.raises(CheckpointError, match=message):
                minilora.load(linear(), folder)
