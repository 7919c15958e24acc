"""What minilora trains on every kind of layer, in PEFT; and what PEFT puts into files beside A and B."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checks import randomise, unchanged
from kinds import KINDS, Kind
from models import CASES, encoder_layer
from peft_settings import Attended, Net, experts
from torch import Tensor, nn

import minilora
from minilora import CheckpointError, LoRAConfig

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peft

SAME = {"rtol": 0.0, "atol": 1e-11}

# Where PEFT's update is none of the weight, or it has no LoRA at all.
NOT_WRITTEN = {
    "conv1d_groups": "groups of the weight",
    "conv2d_stride": "not dilated",
    "conv2d_groups": "groups of the weight",
    "conv2d_depthwise": "groups of the weight",
    "conv3d": "groups of the weight",
    "conv2d_reflect": "padding_mode='reflect'",
    "conv2d_replicate": "padding_mode='replicate'",
    "conv2d_circular": "padding_mode='circular'",
    "transposed": "no LoRA for ConvTranspose2d",
    "transposed_1d": "no LoRA for ConvTranspose1d",
    "bilinear": "no LoRA for Bilinear",
}


def filled(model: nn.Module, targets: Any, config: LoRAConfig | None = None, **kwargs: Any) -> nn.Module:
    return randomise(minilora.inject(model, targets, config or LoRAConfig(r=2, alpha=8), **kwargs))


def quiet(call: Any, *args: Any) -> Tensor:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", ".*has no rule|.*even kernel lengths")
        return call(*args)


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_peft_computes_what_minilora_wrote_or_it_is_not_written(kind: Kind, tmp_path: Path) -> None:
    model = filled(kind.build().eval(), kind.target)
    if kind.name in NOT_WRITTEN:
        with pytest.raises(CheckpointError, match=NOT_WRITTEN[kind.name]):
            minilora.save(model, tmp_path / "a", format="peft")
        assert not (tmp_path / "a").exists()
        return
    minilora.save(model, tmp_path / "a", format="peft")
    x, theirs = kind.input(), peft.PeftModel.from_pretrained(kind.build(), tmp_path / "a").eval()
    expected = quiet(model, x)
    assert not torch.allclose(expected, quiet(kind.build(), x))
    torch.testing.assert_close(quiet(theirs, x), expected, **SAME)
    torch.testing.assert_close(quiet(minilora.load(kind.build().eval(), tmp_path / "a"), x), expected, **SAME)


@pytest.mark.parametrize("alphas", [(8.0, 8.0), (8.0, 16.0), (3.0, 3.0), (6.0, -1.5), (8.0, 5.0)], ids=str)
def test_attention_with_any_alphas_whose_ratio_loses_no_bit(
    alphas: tuple[float, float], tmp_path: Path
) -> None:
    """PEFT has one alpha for both, and adds the update of out_proj twice."""

    def bare() -> nn.Module:
        torch.manual_seed(0)
        return Attended().double().eval()

    configs = dict(
        zip(("in_proj_weight", "out_proj"), (LoRAConfig(r=2, alpha=a) for a in alphas), strict=True)
    )
    model = randomise(minilora.inject(bare(), list(configs), configs))
    if alphas == (8.0, 5.0):
        with pytest.raises(CheckpointError, match="no power of two"):
            minilora.save(model, tmp_path / "a", format="peft")
        return
    minilora.save(model, tmp_path / "a", format="peft")
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(bare(), tmp_path / "a").eval()
    torch.testing.assert_close(quiet(theirs, x), quiet(model, x), **SAME)
    torch.testing.assert_close(quiet(minilora.load(bare(), tmp_path / "a"), x), quiet(model, x), **SAME)
    edit(tmp_path / "a", peft_version="0.99.0")
    with pytest.raises(
        CheckpointError, match=r"adds the update of out_proj twice, and whether 0\.99\.0 does"
    ):
        minilora.load(bare(), tmp_path / "a")


def test_attention_inside_torchs_own_encoder(tmp_path: Path) -> None:
    def bare() -> nn.Module:
        torch.manual_seed(0)
        return Net(encoder=encoder_layer()).double().eval()

    model = filled(bare(), "all-linear")
    minilora.save(model, tmp_path / "a", format="peft")
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(bare(), tmp_path / "a").train()  # in eval it skips linear1 and 2
    torch.testing.assert_close(quiet(theirs, x), quiet(model, x), **SAME)


def test_what_peft_refuses_together_is_refused_here(tmp_path: Path) -> None:
    def refused(model: nn.Module, match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            minilora.save(model, tmp_path / "a", format="peft")
        assert not (tmp_path / "a").exists()

    model = filled(experts()(), ["lin"], LoRAConfig(r=2, dropout=0.1))
    refused(filled(model, ["experts.up"]), "beside dropout anywhere")
    refused(filled(experts()(), ["experts.up"], LoRAConfig(r=2, dropout=0.1)), "applies no dropout there")
    refused(filled(Attended(), ["out_proj"]), "reads its out_proj and never calls it")
    refused(filled(Attended(kdim=6, vdim=6), ["q_proj_weight", "out_proj"]), "never calls it")
    model = filled(
        nn.ModuleDict({"conv": nn.Conv1d(4, 4, 1), "lin": nn.Linear(8, 8)}), ["lin"], trainable=["conv.bias"]
    )
    refused(model, "bias='lora_only'")


# Stacks of square matrices


def test_the_three_layouts_of_a_stack_are_told_by_shape_then_by_version(tmp_path: Path) -> None:
    """Older PEFT's A reads the first side always; 0.19.0's the wrong one."""
    for name, make in (("oblong", experts()), ("square", experts(square=True))):
        torch.manual_seed(0)
        base = make().state_dict()

        def bare(make: Any = make, base: Any = base) -> nn.Module:
            model = make()
            model.load_state_dict(base)
            return model

        model = filled(bare(), ["experts.up"])
        minilora.save(model, tmp_path / name, format="peft")
        file = tmp_path / name / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(file)
        A, B = (tensors[f"base_model.model.experts.lora_{side}.weight"] for side in "AB")
        (rows, dim), (out, _) = A.shape, B.shape
        r = rows // 3
        # dW = (B' A')^T, where B' = A^T and A' = B^T for each of the three.
        crossed_A = B.view(out, r, 3).permute(2, 1, 0).reshape(rows, out)
        crossed_B = A.view(3, r, dim).permute(2, 1, 0).reshape(dim, rows)
        keys = [f"base_model.model.experts.lora_{side}.weight" for side in "AB"]
        old = dict(zip(keys, (crossed_A.contiguous(), crossed_B.contiguous()), strict=True))
        safetensors.torch.save_file(old, file)
        x = torch.randn(2, 3, 8)
        for version in (None, "0.17.0", "0.18.1", "0.19.0", "0.21.2"):
            edit(tmp_path / name, peft_version=version)
            if name == "oblong" or version == "0.19.0":
                loaded = minilora.load(bare(), tmp_path / name)
                torch.testing.assert_close(quiet(loaded, x), quiet(model, x))
            elif version == "0.21.2":  # read as what it would be today, which is something else
                loaded = minilora.load(bare(), tmp_path / name)
                assert not torch.allclose(quiet(loaded, x), quiet(model, x))
            else:
                with pytest.raises(CheckpointError, match="does not tell which side A reads"):
                    minilora.load(bare(), tmp_path / name)


# What PEFT puts into a file by itself


def lm(**kwargs: Any) -> nn.Module:
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, **kwargs)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_whole_embeddings_are_accepted_where_they_are_the_models_own(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    theirs = peft.get_peft_model(lm(), config).eval()
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.save_pretrained(tmp_path)
    key = "base_model.model.lm_head.base_layer.weight"
    assert key in safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    ids = torch.arange(8)[None]
    model = minilora.load(lm(), tmp_path)
    torch.testing.assert_close(CASES["llama"].run(model), CASES["llama"].run(theirs))
    minilora.load(lm().bfloat16(), tmp_path)  # the same values, as far as this dtype holds them
    minilora.load(model, tmp_path)  # over the same injections
    assert torch.isfinite(model(ids).logits).all()

    other = lm()
    with torch.no_grad():
        other.lm_head.weight[3, 4] += 1
    with (
        unchanged(other),
        pytest.raises(CheckpointError, match=r"'lm_head\.weight': .*other values than the"),
    ):
        minilora.load(other, tmp_path)
    resized = lm()
    with torch.no_grad():
        resized.lm_head.weight = nn.Parameter(torch.randn(40, 16))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight': .*Resize the model's first"):
        minilora.load(resized, tmp_path)


def test_a_tied_module_to_save_is_refused_with_the_tie(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tie_word_embeddings")
        peft.get_peft_model(lm(tie_word_embeddings=True), config).save_pretrained(tmp_path)
    model = lm(tie_word_embeddings=True)
    with (
        unchanged(model),
        pytest.raises(CheckpointError, match=r"tied to 'model\.embed_tokens\.weight'.*untie"),
    ):
        minilora.load(model, tmp_path)
    minilora.load(lm(), tmp_path)  # untied, it is a head like another


def test_a_missing_or_strange_bias_is_an_error(tmp_path: Path) -> None:
    bare = CASES["mlp"].build()
    config = peft.LoraConfig(r=2, target_modules=["up"], bias="all")
    peft.get_peft_model(CASES["mlp"].build(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    classifier = tensors.pop("base_model.model.classifier.bias")
    safetensors.torch.save_file(tensors, file)
    with unchanged(bare), pytest.raises(CheckpointError, match=r"'classifier\.bias': trained by bias='all'"):
        minilora.load(bare, tmp_path)
    tensors["base_model.model.classifier.bias"] = classifier
    safetensors.torch.save_file(tensors, file)
    edit(tmp_path, bias="lora_only")
    with pytest.raises(CheckpointError, match=r"'classifier\.bias': with tensors .*bias='lora_only'"):
        minilora.load(bare, tmp_path)
