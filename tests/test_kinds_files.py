"""The command line on files of every kind of layer: a base in shards, an adapter, and no model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checks import randomise, raw
from command_line import run
from kinds import Bare, Experts
from torch import nn

import minilora
from minilora import LoRAConfig


class Zoo(nn.Module):
    """A layer of each kind whose weight is kept in a way of its own."""

    def __init__(self, kernel: tuple[int, int] = (3, 2)) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8, padding_idx=1)
        self.conv = nn.Conv2d(4, 8, kernel, groups=2)
        self.square = nn.Conv1d(4, 8, 2)  # (8, 4 * 2): either way round fits
        self.transposed = nn.ConvTranspose2d(6, 2, 2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.bilinear = nn.Bilinear(4, 4, 6)
        self.experts = Experts()
        self.experts_in_out = Experts(transposed=True)
        self.table = Bare()
        self.norm = nn.LayerNorm(8)


TARGETS = ["embedding", "conv", "square", "transposed", "in_proj_weight", "bilinear"]
EXPERTS = ["up", "down", "experts.square", "experts_in_out.square"]
FULL = ["norm.bias", "table.table"]


def zoo(kernel: tuple[int, int] = (3, 2)) -> nn.Module:
    torch.manual_seed(0)
    model = Zoo(kernel)
    for name in ("experts", "experts_in_out"):  # told by what the adapter's file records alone
        getattr(model, name).square = nn.Parameter(torch.randn(3, 8, 8))
    return model


def write_base(model: nn.Module, folder: Path) -> Path:
    """Write a base as three shards, as transformers does."""
    folder.mkdir()
    tensors = model.state_dict()
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        inside = {name: tensors[name] for name in tensors if weight_map[name] == file}
        safetensors.torch.save_file(inside, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def adapted(tmp_path: Path) -> nn.Module:
    write_base(zoo(), tmp_path / "base")
    configs = {
        ("embedding", "conv"): LoRAConfig(r=2, dora=True),
        ("bilinear", "in_proj_weight", "experts.down", "experts_in_out.up"): LoRAConfig(r=2, init="pissa"),
    }
    variants = {target: config for targets, config in configs.items() for target in targets}
    others = {target: LoRAConfig(r=2) for target in TARGETS + EXPERTS}
    model = minilora.inject(zoo(), TARGETS + EXPERTS, variants | others, trainable=FULL)
    minilora.save(randomise(model), tmp_path / "a.safetensors")
    return model


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_fused_shard_by_shard_it_is_the_fused_model_to_the_bit(adapted, dtype, tmp_path):
    where = ("--base", tmp_path / "base", "--adapter", tmp_path / "a.safetensors", "--out", tmp_path / "out")
    result = run("fuse", *where, *(("--dtype", dtype) if dtype else ()))
    assert result.code == 0, result.err
    assert "the same base (12 weights agree)" in result.err
    expected = minilora.fuse(adapted, dtype=dtype and getattr(torch, dtype)).state_dict()
    found = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= safetensors.torch.load_file(file)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert raw(tensor) == raw(expected[name]), name


def test_verify_inspect_and_diff(adapted, tmp_path):
    result = run("verify", tmp_path / "a.safetensors", "--base", tmp_path / "base")
    assert (result.code, result.out) == (0, "yes: the same base (12 weights agree)\n")
    shown = json.loads(run("inspect", tmp_path / "a.safetensors", "--json").out)
    wrappers = {
        wrapper.placed_at(name): wrapper
        for name, site in minilora.sites.injected_sites(adapted).items()
        for wrapper in site.wrappers
        if wrapper.kind == "lora"
    }
    assert {entry["site"] for entry in shown["sites"]} == wrappers.keys()
    for entry in shown["sites"]:
        norm = wrappers[entry["site"]].delta_weight().detach().double().norm().item()
        assert entry["norm"] == pytest.approx(norm, rel=1e-5)
    assert shown["trainable"] == {"norm.bias": {"": [8]}, "table.table": {"": [10, 8]}}
    table = run("inspect", tmp_path / "a.safetensors").out
    assert "unknown" not in table
    assert "trained in full: norm.bias  8\n" in table
    with torch.no_grad():
        wrappers["experts.up"].lora_B.mul_(1.5)
    minilora.save(adapted, tmp_path / "b.safetensors")
    result = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert result.out == "experts.up (LoRA): other values, 50 % of the first's size apart\n"
    result = run("convert", tmp_path / "a.safetensors", tmp_path / "peft", "--to", "peft")
    assert (result.code, (tmp_path / "peft").exists()) == (2, False)
    assert "'embedding'" in result.err


def test_a_kernel_of_as_many_values_is_another_layer(adapted, tmp_path):
    other = write_base(zoo(kernel=(2, 3)), tmp_path / "other")
    where = ("--base", other, "--adapter", tmp_path / "a.safetensors", "--out", tmp_path / "out")
    result = run("fuse", *where, "--no-check-base")
    assert result.code == 2
    assert "'conv': the base's weight is (8, 2, 2, 3), and it was trained on (8, 2, 3, 2)" in result.err
    assert not (tmp_path / "out").exists()


def test_experts_kept_together_are_fused_and_others_refused_by_name(tmp_path):
    """transformers saves GPT-OSS as it computes, (E, in, out), and Qwen3-MoE an expert at a time."""
    pytest.importorskip("transformers", minversion="5")
    from test_kinds import experts_model

    for name, code in (("GptOss", 0), ("Qwen3Moe", 2)):
        model, base, out = experts_model(name), tmp_path / name, tmp_path / f"{name}-out"
        model.save_pretrained(base)
        minilora.inject(model, ["gate_up_proj", "down_proj"], LoRAConfig(r=2))
        minilora.save(randomise(model), tmp_path / "a.safetensors")
        result = run("fuse", "--base", base, "--adapter", tmp_path / "a.safetensors", "--out", out)
        assert result.code == code, result.err
        minilora.fuse(model)
        if code:
            assert "'model.layers.0.mlp.experts.gate_up_proj'" in result.err
            assert "keep each expert by itself, as 'model.layers.0.mlp.experts.0." in result.err
            assert not out.exists()
            model.save_pretrained(out)  # as the message advises
        found, expected = type(model).from_pretrained(out).state_dict(), model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


def test_an_embedding_tied_to_the_output_layer_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for tied in (True, False):
        config = transformers.LlamaConfig(vocab_size=32, tie_word_embeddings=tied, **shape)
        model, base, out = transformers.LlamaForCausalLM(config), tmp_path / f"{tied}", tmp_path / "out"
        model.save_pretrained(base)
        minilora.inject(model, "embed_tokens", LoRAConfig(r=2))
        minilora.save(randomise(model), tmp_path / "a.safetensors")
        result = run("fuse", "--base", base, "--adapter", tmp_path / "a.safetensors", "--out", out)
        assert result.code == (2 if tied else 0), result.err
        assert ("'model.embed_tokens': its weight is tied to the output layer" in result.err) == tied
        assert out.exists() != tied
