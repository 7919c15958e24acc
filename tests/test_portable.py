"""PEFT folders that every server reads alike: what is in them, and what each server's formula makes of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import assert_equal_to_rounding, assert_far, randomise
from command_line import run as command
from models import CASES, MLP
from torch import Tensor, nn

import minilora
from minilora import AdapterConfig, CheckpointError, LoRAConfig, MiniLoRAError, RowsConfig
from minilora.files.formats.peft.portable import RANKS

safetensors_torch = pytest.importorskip("safetensors.torch")

MIXED = {
    "q_proj": LoRAConfig(r=3, alpha=7),
    "v_proj": LoRAConfig(r=5, alpha=5, dropout=0.1),
    "down_proj": LoRAConfig(r=1),
}
SETTINGS: dict[str, Any] = {
    "mixed": MIXED,
    "rslora": LoRAConfig(r=3, alpha=7, rslora=True),
    "pissa": LoRAConfig(r=3, init="pissa"),
}


def trained(config: Any = MIXED, name: str = "llama") -> nn.Module:
    case = CASES[name]
    targets = list(config) if isinstance(config, dict) else case.targets
    return randomise(minilora.inject(case.build(), targets, config, trainable=())).eval()


def files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, safetensors_torch.load_file(folder / "adapter_model.safetensors")


# By what each server reads: see docs/serving.md.
FORMULAS: dict[str, Callable[[dict[str, Any], Tensor], float]] = {
    "vLLM": lambda c, A: c["lora_alpha"] / (math.sqrt(c["r"]) if c["use_rslora"] else c["r"]),
    "SGLang": lambda c, A: c["lora_alpha"] / c["r"],
    "llama.cpp": lambda c, A: c["lora_alpha"] / A.shape[0],
}


@pytest.mark.parametrize("server", FORMULAS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_server_s_formula_gives_the_same_weights(server: str, setting: str, tmp_path: Path) -> None:
    model = trained(SETTINGS[setting])
    minilora.save(model, tmp_path / "adapter", format="peft", portable=True)
    config, tensors = files(tmp_path / "adapter")
    served = CASES["llama"].build()
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            A, B = tensors[name], tensors[name.replace("lora_A", "lora_B")]
            site = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            served.get_submodule(site).weight.data += FORMULAS[server](config, A) * B @ A
    case = CASES["llama"]
    assert_equal_to_rounding(case.run(served), case.run(model))
    assert_far(case.run(served), case.run(case.build()))


def test_nothing_is_left_to_be_read(tmp_path: Path) -> None:
    model = trained()
    minilora.save(model, tmp_path / "adapter", format="peft", portable=True)
    config, tensors = files(tmp_path / "adapter")
    assert (config["r"], config["lora_alpha"]) == (8, 8)  # 5 is none of vLLM's
    assert type(config["lora_alpha"]) is int  # Ollama reads no other number
    assert not any(config[key] for key in ("use_rslora", "use_dora", "modules_to_save"))
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert (config["bias"], config["lora_dropout"]) == ("none", 0.0)
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj", "v_proj"]
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    for name, tensor in tensors.items():
        assert name.endswith((".lora_A.weight", ".lora_B.weight"))
        assert (tensor.shape[0] if "lora_A" in name else tensor.shape[1]) == 8
        site = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        layer = model.get_submodule(site)
        assert not (tensor[layer.config.r :] if "lora_A" in name else tensor[:, layer.config.r :]).any()


@pytest.mark.parametrize("r", [1, 2, 8, 9, 300, 512])
def test_the_rank_is_the_next_of_vllm_s(r: int, tmp_path: Path) -> None:
    model = minilora.inject(nn.Sequential(nn.Linear(600, 600)), "0", LoRAConfig(r=r, dtype="float16"))
    randomise(model)
    minilora.save(model, tmp_path / "adapter", format="peft", portable=True)
    config, tensors = files(tmp_path / "adapter")
    assert config["r"] == min(rank for rank in RANKS if rank >= r)
    A, B = (tensors[f"base_model.model.0.lora_{name}.weight"] for name in "AB")
    layer = model[0]
    assert torch.equal(A[:r], layer.lora_A.detach().float())
    assert torch.equal(B[:, :r], (layer.lora_B.detach().double() * layer.scaling).float())


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore:.*r exceeds the smaller side:UserWarning")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_peft_and_minilora_read_it_back(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    case = CASES[name]
    config = LoRAConfig(r=3, alpha=7, rslora=True)
    model = trained({"c_attn": config, "c_fc": config} if name == "gpt2" else config, name)
    minilora.save(model, tmp_path / "adapter", format="peft", portable=True)
    theirs = peft.PeftModel.from_pretrained(case.build(), tmp_path / "adapter").eval()
    assert_equal_to_rounding(case.run(theirs), case.run(model))
    ours = minilora.load(case.build(), tmp_path / "adapter")
    assert_equal_to_rounding(case.run(ours), case.run(model))


def test_the_command_line_writes_the_same(tmp_path: Path) -> None:
    model = trained({name: LoRAConfig(r=r, alpha=7) for r, name in enumerate(MIXED, 2)})
    minilora.save(model, tmp_path / "adapter.safetensors")
    minilora.save(model, tmp_path / "saved", format="peft", portable=True)
    minilora.save(model, tmp_path / "plain", format="peft")
    for source in ("adapter.safetensors", "plain"):
        made = tmp_path / f"from-{source}"
        assert command("convert", tmp_path / source, made, "--to", "peft", "--portable").code == 0
        config, tensors = files(made)
        expected, saved = files(tmp_path / "saved")
        assert all(torch.equal(tensors[name], saved[name]) for name in tensors.keys() | saved.keys())
        same = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
        assert [config[key] for key in same] == [expected[key] for key in same]
    told = command("convert", tmp_path / "adapter.safetensors", tmp_path / "x", "--portable")
    assert (told.code, told.err) == (
        2,
        "minilora: error: --portable goes with --to peft, which servers read\n",
    )


def test_what_servers_do_not_take_is_named(tmp_path: Path) -> None:
    model = minilora.inject(
        MLP(), ["up"], LoRAConfig(r=2, dora=True), trainable=["classifier", "down.weight"]
    )
    minilora.inject(model, ["up"], AdapterConfig(bottleneck=2), trainable=())
    with pytest.raises(CheckpointError) as caught:
        minilora.save(model, tmp_path / "adapter", format="peft", portable=True)
    assert str(caught.value).startswith("3 problems; nothing has been written:")
    for said in (
        "'up': DoRA, which servers do not compute",
        "'up': a bottleneck",
        "'down.weight', 'classifier': trained in full",
    ):
        assert said in str(caught.value)
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(MiniLoRAError, match='portable goes with format="peft"'):
        minilora.save(model, tmp_path / "adapter", portable=True)


def test_rows_and_biases_of_b_are_named(tmp_path: Path) -> None:
    model = minilora.inject(MLP(), ["up"], LoRAConfig(r=2, lora_bias=True), trainable=())
    minilora.inject(model, ["down"], RowsConfig(rows=[1]), trainable=())
    with pytest.raises(CheckpointError) as caught:
        minilora.save(model, tmp_path / "adapter", format="peft", portable=True)
    assert "'up': lora_bias beside A and B, which no server takes" in str(caught.value)
    assert "'down': rows that are trained by themselves, which no server takes" in str(caught.value)


def test_ranks_and_layers_that_no_server_takes_are_named(tmp_path: Path) -> None:
    wide = minilora.inject(nn.Sequential(nn.Linear(520, 520)), "0", LoRAConfig(r=513))
    with pytest.raises(CheckpointError, match="'0': rank 513, and 512 is the highest"):
        minilora.save(wide, tmp_path / "adapter", format="peft", portable=True)
    model = minilora.inject(nn.Sequential(nn.Conv2d(3, 4, 3)), "0", LoRAConfig(r=1))
    with pytest.raises(CheckpointError, match="linear layers and embeddings alone"):
        minilora.save(model, tmp_path / "adapter", format="peft", portable=True)
    huge = minilora.inject(nn.Sequential(nn.Linear(4, 4)), "0", LoRAConfig(r=1, alpha=1e30))
    nn.init.constant_(huge[0].lora_B, 1e20)
    with pytest.raises(CheckpointError, match=r"'0\.lora_B': not finite in float32"):
        minilora.save(huge, tmp_path / "adapter", format="peft", portable=True)
