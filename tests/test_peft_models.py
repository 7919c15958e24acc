"""PEFT's files both ways on models of transformers beyond linear layers: mixtures, residual nets, CLIP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import transformers_major
from torch import Tensor, nn

import minilora

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.peft,
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers|.*tie_word_embeddings|.*did not match any"),
]

SAME = {"rtol": 0.0, "atol": 1e-10}
STACK = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **STACK, intermediate_size=32, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    config._experts_implementation = "eager"  # the grouped product has no float64
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        **STACK, intermediate_size=16, num_local_experts=3, num_experts_per_tok=2, num_key_value_heads=1
    )  # 2 * 16 by 16, and 16 by 16, which no shape tells
    config._experts_implementation = "eager"
    return transformers.MixtralForCausalLM(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def clip() -> nn.Module:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.CLIPConfig(
        text_config={**shape, "vocab_size": 32, "max_position_embeddings": 8, "eos_token_id": 2},
        vision_config={**shape, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    return transformers.CLIPModel(config)


def ids() -> Tensor:
    return torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(1))


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def on_both(model: nn.Module) -> Tensor:
    return model(input_ids=ids(), pixel_values=image()).logits_per_image


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], dict[str, Any]]] = {
    "qwen3_moe": (
        qwen3_moe,
        lambda m: m(ids()).logits,
        {
            "target_modules": ["q_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.down_proj": 2},
        },
    ),
    "mixtral": (
        mixtral,
        lambda m: m(ids()).logits,
        {"target_modules": ["lm_head"], "target_parameters": EXPERTS},
    ),
    "resnet": (
        resnet,
        lambda m: m(image()).logits,
        {"target_modules": ["convolution"], "modules_to_save": ["classifier"]},
    ),
    "clip": (
        clip,
        on_both,
        {"target_modules": ["q_proj", "patch_embedding", "token_embedding", "text_projection"]},
    ),
}


NEWER = {
    "qwen3_moe": "each expert has modules of its own before transformers 5",
    "mixtral": "each expert has modules of its own before transformers 5",
    "clip": "its mask is float32 before transformers 5, whatever the model's dtype",
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_both_ways(name: str, tmp_path: Path) -> None:
    make, run, fields = CASES[name]
    if name in NEWER and transformers_major() < 5:
        pytest.skip(NEWER[name])

    def bare() -> nn.Module:
        torch.manual_seed(0)
        return make().double().eval()

    theirs = peft.get_peft_model(bare(), peft.LoraConfig(r=3, lora_alpha=8, **fields))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = run(theirs)
        assert not torch.allclose(expected, run(bare()))
        model = minilora.load(bare(), tmp_path / "theirs")
        torch.testing.assert_close(run(model), expected, **SAME)
        minilora.save(model, tmp_path / "ours", format="peft")
        back = peft.PeftModel.from_pretrained(bare(), tmp_path / "ours").eval()
        torch.testing.assert_close(run(back), expected, **SAME)
        torch.testing.assert_close(run(minilora.load(bare(), tmp_path / "ours")), expected, **SAME)
