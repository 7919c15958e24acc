"""What a server is to compute with: the tensors of `fuse`, without fusing."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import randomise, raw, state, unchanged
from kinds import KINDS
from models import CASES, GRID, Case, on_grid
from torch import nn

import minilora
from minilora import AdapterConfig, LoRAConfig, MergeError, MiniLoRAError, RowsConfig


def fused_state(model: nn.Module) -> dict[str, object]:
    return state(minilora.fuse(copy.deepcopy(model)))


def yielded(model: nn.Module) -> dict[str, object]:
    return {name: raw(tensor) for name, tensor in minilora.merged_weights(model)}


def trained(case: Case, dtype: torch.dtype = torch.float32, config: LoRAConfig | None = None) -> nn.Module:
    heads = [
        n
        for n in ("classifier", "norm.bias")
        if any(m == n.split(".")[0] for m, _ in case.make().named_children())
    ]
    model = minilora.inject(case.build(dtype), case.targets, config or LoRAConfig(r=2), trainable=heads)
    return randomise(model)


@pytest.mark.filterwarnings("ignore:.*was tied to another weight:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@on_grid
def test_they_are_what_fuse_leaves_to_the_bit_and_in_order(case: Case, dtype: torch.dtype) -> None:
    model = trained(case, dtype)
    model.train()
    with unchanged(model):
        found = yielded(model)
    assert list(found.items()) == list(fused_state(model).items())
    assert list(found) == list(case.build(dtype).state_dict())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_of_every_kind_of_layer(kind: object) -> None:
    model = minilora.inject(kind.build(torch.float32), kind.target, LoRAConfig(r=2), trainable=())  # type: ignore[attr-defined]
    randomise(model)
    assert yielded(model) == fused_state(model)


@pytest.mark.parametrize(
    "config", [LoRAConfig(r=2, dora=True), LoRAConfig(r=2, init="pissa"), LoRAConfig(r=2, lora_bias=True)]
)
def test_of_variants_and_merged(config: LoRAConfig) -> None:
    model = trained(CASES["bert"], config=config)
    expected = fused_state(model)
    assert yielded(model) == expected
    minilora.merge(model)
    with unchanged(model):
        assert yielded(model) == expected


@pytest.mark.parametrize("name", ["tied", "gpt2"])
def test_of_rows_at_both_ends_of_a_tie(name: str) -> None:
    model = CASES[name].build()
    embedding = "embedding" if name == "tied" else "wte"
    minilora.inject(model, [embedding], RowsConfig(rows=[2, 5]), trainable=())
    minilora.inject(model, list(CASES[name].targets[:1]), LoRAConfig(r=2), trainable=())
    randomise(model)
    with unchanged(model):
        assert yielded(model) == fused_state(model)


def test_one_tensor_at_a_time_and_no_copy_of_the_base() -> None:
    model = trained(CASES["mlp"])
    given = dict(minilora.merged_weights(model))
    assert given["classifier.weight"].data_ptr() == model.classifier.trained.weight.data_ptr()
    assert given["up.bias"].data_ptr() == model.up.base.bias.data_ptr()
    assert given["up.weight"].data_ptr() != model.up.base.weight.data_ptr()
    assert not any(tensor.requires_grad for tensor in given.values())


def test_what_cannot_be_fused_is_named_at_the_call() -> None:
    model = minilora.inject(CASES["mlp"].build(), ["up"], AdapterConfig(bottleneck=2))
    with pytest.raises(MergeError, match=r"'up'.*bottleneck"):
        minilora.merged_weights(model)
    with pytest.raises(MiniLoRAError, match="carries no injection"):
        minilora.merged_weights(CASES["mlp"].build())
    model = trained(CASES["mlp"])
    with minilora.disabled(model), pytest.raises(MiniLoRAError, match=r"merged_weights cannot work inside"):
        minilora.merged_weights(model)


# In memory, by PEFT's names


def test_peft_names_in_memory_are_those_of_the_file(tmp_path: object) -> None:
    safetensors_torch = pytest.importorskip("safetensors.torch")
    for case in GRID:
        if case.name in (
            "mha",
            "encoder",
            "shared",
            "cnn",
        ):  # where PEFT's format has no place or other heads
            continue
        model = trained(case)
        minilora.save(model, tmp_path / case.name, format="peft")  # type: ignore[operator]
        stored = safetensors_torch.load_file(tmp_path / case.name / "adapter_model.safetensors")  # type: ignore[operator]
        found = minilora.adapter_state_dict(model, format="peft")
        assert {n: raw(t) for n, t in found.items()} == {n: raw(t) for n, t in stored.items()}
        assert all(name.startswith("base_model.model.") for name in found)


def test_what_peft_has_no_words_for_is_told() -> None:
    model = minilora.inject(CASES["mlp"].build(), ["up"], AdapterConfig(bottleneck=2))
    with pytest.raises(minilora.CheckpointError, match="PEFT has no bottleneck adapters"):
        minilora.adapter_state_dict(model, format="peft")
    with pytest.raises(MiniLoRAError, match=r"format must be one of 'minilora', 'peft', not 'hf'"):
        minilora.adapter_state_dict(model, format="hf")
