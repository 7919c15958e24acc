"""Files of loralib, made here with it, and of the adapters library, made by scripts/make_fixtures.py."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checks import injected_modules, unchanged
from models import BERT, CASES
from torch import Tensor, nn

import minilora
from minilora import CheckpointError, LoRAConfig, MiniLoRAError

FIXTURES = Path(__file__).parent / "fixtures" / "adapters"


# The adapters library


def fixture_base() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**json.loads((FIXTURES / "base_config.json").read_text()))
    model = transformers.BertForSequenceClassification(config).eval()
    model.load_state_dict(safetensors.torch.load_file(FIXTURES / "base.safetensors"))
    return model


def logits(model: nn.Module) -> Tensor:
    expected = safetensors.torch.load_file(FIXTURES / "expected.safetensors")
    with torch.no_grad():
        return model(input_ids=expected["input_ids"], attention_mask=expected["attention_mask"]).logits


def recorded(name: str) -> Tensor:
    return safetensors.torch.load_file(FIXTURES / "expected.safetensors")[f"logits.{name}"]


@pytest.mark.parametrize("name", ["lora", "lora_everywhere", "houlsby", "output_only"])
def test_the_same_logits_as_the_adapters_library(name: str) -> None:
    model = minilora.load(fixture_base(), FIXTURES / name, format="adapters")
    torch.testing.assert_close(logits(model), recorded(name), rtol=0, atol=2e-6)
    assert not torch.allclose(logits(fixture_base()), recorded(name), atol=1e-2)
    torch.testing.assert_close(logits(minilora.eject(model)), logits(fixture_base()), rtol=0, atol=0)


def test_several_widths_another_activation_and_a_scale() -> None:
    with pytest.warns(UserWarning, match=r"dropout 0\.1"):
        model = minilora.load(fixture_base(), FIXTURES / "houlsby_varied", format="adapters")
    torch.testing.assert_close(logits(model), recorded("houlsby_varied"), rtol=0, atol=2e-6)
    widths = {
        site: wrappers[0].config.bottleneck
        for site, wrappers in injected_modules(model).items()
        if site != "classifier"
    }
    assert widths == {
        f"bert.encoder.layer.{i}.{block}.dropout": width
        for i, width in ((0, 2), (1, 8))
        for block in ("attention.output", "output")
    }


@pytest.mark.parametrize("name", ["lora", "houlsby"])
def test_what_was_read_can_be_kept_in_our_own_format(name: str, tmp_path: Path) -> None:
    model = minilora.load(fixture_base(), FIXTURES / name, format="adapters")
    minilora.save(model, tmp_path / "a.safetensors")
    assert torch.equal(logits(minilora.load(fixture_base(), tmp_path / "a.safetensors")), logits(model))


@pytest.mark.parametrize(
    ("name", "why"), [("pfeiffer", "LayerNorm twice"), ("parallel", "is_parallel is True")]
)
def test_what_no_wrapper_can_do_is_refused(name: str, why: str) -> None:
    model = fixture_base()
    with unchanged(model), pytest.raises(CheckpointError, match=why):
        minilora.load(model, FIXTURES / name, format="adapters")


def copied(fixture: str, tmp_path: Path, **fields: Any) -> Path:
    """Return a copy of a fixture with other fields in its config, at the top or below "config"."""
    folder = tmp_path / fixture
    shutil.copytree(FIXTURES / fixture, folder)
    description = json.loads((folder / "adapter_config.json").read_text())
    for key, value in fields.items():
        (description if key in description else description["config"])[key] = value
    (folder / "adapter_config.json").write_text(json.dumps(description))
    return folder


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("lora", "use_dora", True),
        ("lora", "use_gating", True),
        ("lora", "composition_mode", "scale"),
        ("lora", "vera_d", 0.1),
        ("lora", "architecture", "prefix_tuning"),
        ("lora", "model_type", "roberta"),
        ("lora", "r", 3),
        ("lora", "alpha", "six"),
        ("lora", "attn_matrices", ["q", "k", "v"]),
        ("lora", "attn_matrices", "q"),
        ("lora", "leave_out", [0]),
        ("lora", "leave_out", [[0]]),
        ("lora", "attn_matrices", [["q"]]),
        ("lora", "name", "another"),
        ("lora", "config", []),
        ("houlsby", "non_linearity", "gelu_new"),
        ("houlsby", "non_linearity", ["relu"]),
        ("houlsby", "scaling", "learned"),
        ("houlsby", "phm_layer", True),
        ("houlsby", "ln_before", True),
        ("houlsby", "inv_adapter", "nice"),
        ("houlsby", "mh_adapter", False),
        ("houlsby", "hidden_size", 8),
    ],
)
def test_fields_that_cannot_be_honoured(name: str, field: str, value: object, tmp_path: Path) -> None:
    model = fixture_base()
    with unchanged(model), pytest.raises(CheckpointError):
        minilora.load(model, copied(name, tmp_path, **{field: value}), format="adapters")


def test_alpha_is_forgotten_where_the_library_forgot_it(tmp_path: Path) -> None:
    """Before version 1.1.0 it trained with a scale of 1, whatever alpha said; it loads such files so, too."""
    model = minilora.load(
        fixture_base(), copied("lora", tmp_path, version="adapters.1.0.1"), format="adapters"
    )
    assert _scalings(model) == {1.0}
    model = minilora.load(fixture_base(), FIXTURES / "lora", format="adapters")
    assert _scalings(model) == {1.5}


def _scalings(model: nn.Module) -> set[float]:
    return {
        wrapper.config.scaling
        for wrappers in injected_modules(model).values()
        for wrapper in wrappers
        if wrapper.config is not None
    }


def test_folders_that_are_none_of_the_library(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no 'adapter\.safetensors', 'adapter_config\.json'"):
        minilora.load(fixture_base(), tmp_path, format="adapters")
    folder = copied("lora", tmp_path)
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(CheckpointError, match="pickles"):
        minilora.load(fixture_base(), folder, format="adapters")
    with pytest.raises(CheckpointError, match='format="adapters"'):
        minilora.load(fixture_base(), FIXTURES / "lora")
    with pytest.raises(CheckpointError, match="is a file"):
        minilora.load(fixture_base(), FIXTURES / "base.safetensors", format="adapters")
    with pytest.raises(FileNotFoundError):
        minilora.load(fixture_base(), tmp_path / "none", format="adapters")


def test_a_head_in_a_pickle_is_not_left_out_in_silence(tmp_path: Path) -> None:
    folder = copied("lora", tmp_path)
    (folder / "model_head.safetensors").rename(folder / "pytorch_model_head.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model_head\.bin"):
        minilora.load(fixture_base(), folder, format="adapters")


def test_a_tensor_of_another_kind_is_not_left_out_in_silence(tmp_path: Path) -> None:
    folder = copied("houlsby", tmp_path)
    tensors = safetensors.torch.load_file(folder / "adapter.safetensors")
    tensors["bert.invertible_adapters.houlsby.F.0.weight"] = torch.zeros(2, 2)
    safetensors.torch.save_file(tensors, folder / "adapter.safetensors")
    with pytest.raises(CheckpointError, match="invertible_adapters"):
        minilora.load(fixture_base(), folder, format="adapters")


# loralib


class Net(nn.Module):
    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.first = linear(8, 12)
        self.second = nn.Sequential(nn.Tanh(), linear(12, 6))
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))


def by_loralib(path: Path, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Save a random loralib model's state dict; return it, and a bare model with its base weights."""
    loralib = pytest.importorskip("loralib")
    theirs = Net(lambda i, o: loralib.Linear(i, o, r=4, lora_alpha=6, **options)).eval()
    theirs.train()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    safetensors.torch.save_file(loralib.lora_state_dict(theirs), path)
    bare = Net(nn.Linear)
    bare.load_state_dict({key: value for key, value in theirs.state_dict().items() if "lora_" not in key})
    return theirs, bare


@pytest.mark.parametrize("merge_weights", [True, False])
def test_the_same_outputs_as_loralib(merge_weights: bool, tmp_path: Path) -> None:
    theirs, bare = by_loralib(tmp_path / "a.safetensors", merge_weights=merge_weights)
    minilora.load(bare, tmp_path / "a.safetensors", format="loralib", config=LoRAConfig(r=4, alpha=6))
    x = torch.randn(5, 8)
    torch.testing.assert_close(bare.eval()(x), theirs(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(minilora.fuse(bare)(x), theirs.eval()(x), rtol=0, atol=1e-5)


def test_what_loralib_files_do_not_say(tmp_path: Path) -> None:
    pytest.importorskip("loralib")
    _, bare = by_loralib(tmp_path / "a.safetensors")
    with unchanged(bare):
        with pytest.raises(MiniLoRAError, match="neither r nor alpha"):
            minilora.load(bare, tmp_path / "a.safetensors", format="loralib")
        with pytest.raises(CheckpointError, match=r"has rank 4, and the config given says r=8"):
            minilora.load(bare, tmp_path / "a.safetensors", format="loralib", config=LoRAConfig(r=8))
        with pytest.raises(CheckpointError, match="no minilora file"):
            minilora.load(bare, tmp_path / "a.safetensors")


def test_other_layers_and_biases_of_loralib_are_refused(tmp_path: Path) -> None:
    loralib = pytest.importorskip("loralib")
    config = LoRAConfig(r=4, alpha=6)

    def refused(model: nn.Module, bare: nn.Module, match: str, **options: Any) -> None:
        safetensors.torch.save_file(loralib.lora_state_dict(model, **options), tmp_path / "a.safetensors")
        with unchanged(bare), pytest.raises(CheckpointError, match=match):
            minilora.load(bare, tmp_path / "a.safetensors", format="loralib", config=config)

    merged = nn.Sequential(loralib.MergedLinear(8, 24, r=4, lora_alpha=6, enable_lora=[True, False, True]))
    refused(merged, nn.Sequential(nn.Linear(8, 24)), "MergedLinear")
    conv = nn.Sequential(loralib.Conv2d(3, 8, kernel_size=3, r=4, lora_alpha=6))
    refused(conv, nn.Sequential(nn.Conv2d(3, 8, 3)), "rank 12")
    biased = nn.Sequential(loralib.Linear(8, 12, r=4, lora_alpha=6))
    refused(biased, nn.Sequential(nn.Linear(8, 12)), r"'0\.bias': neither LoRA nor", bias="lora_only")
    refused(nn.Sequential(loralib.Linear(8, 12, r=0)), nn.Sequential(nn.Linear(8, 12)), "no LoRA tensor")


def test_an_embedding_of_loralib_computes_the_same(tmp_path: Path) -> None:
    loralib = pytest.importorskip("loralib")
    theirs = nn.Sequential(loralib.Embedding(10, 8, r=4, lora_alpha=6)).train()
    nn.init.normal_(theirs[0].lora_A)
    safetensors.torch.save_file(loralib.lora_state_dict(theirs), tmp_path / "a.safetensors")
    ours = nn.Sequential(nn.Embedding.from_pretrained(theirs[0].weight.detach().clone()))
    minilora.load(ours, tmp_path / "a.safetensors", format="loralib", config=LoRAConfig(r=4, alpha=6))
    assert torch.allclose(ours(torch.arange(10)), theirs(torch.arange(10)), atol=1e-5)


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("loralib")
    by_loralib(tmp_path / "a.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    del tensors["first.lora_B"]
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    config = LoRAConfig(r=4, alpha=6)
    with pytest.raises(CheckpointError, match="'first': no lora_B in the file"):
        minilora.load(Net(nn.Linear), tmp_path / "a.safetensors", format="loralib", config=config)
    stray = {"x.lora_A": torch.zeros(4, 8), "x.lora_B": torch.zeros(8, 4)}
    safetensors.torch.save_file(stray, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="no such module"):
        minilora.load(CASES["mlp"].build(), tmp_path / "b.safetensors", format="loralib", config=config)


# loralib's published checkpoints have the head of the task in them


def roberta() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(**{**BERT, "max_position_embeddings": 20})
    return transformers.RobertaForSequenceClassification(config).eval()


def published(path: Path, model: nn.Module, **more: Tensor) -> dict[str, Tensor]:
    """Write a file as loralib's authors publish them for RoBERTa: LoRA on query and value, and the head."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {
        f"roberta.encoder.layer.{i}.attention.self.{name}.lora_{side}": torch.randn(shape) * 0.3
        for i in range(2)
        for name in ("query", "value")
        for side, shape in (("A", (8, 16)), ("B", (16, 8)))
    }
    tensors |= {
        f"classifier.{layer}.{kind}": torch.randn(shapes[f"classifier.{layer}.{kind}"])
        for layer in ("dense", "out_proj")
        for kind in ("weight", "bias")
    }
    tensors |= more
    safetensors.torch.save_file(tensors, path)
    return tensors


def test_a_published_checkpoint_with_its_head(tmp_path: Path) -> None:
    model, config = roberta(), LoRAConfig(r=8, alpha=16)
    tensors = published(tmp_path / "a.safetensors", model)
    plain = copy.deepcopy(model)  # W + s B A, and the head's own tensors, put in by hand
    state = plain.state_dict()
    for name, tensor in tensors.items():
        if name.endswith("lora_B"):
            site = name.removesuffix(".lora_B")
            state[f"{site}.weight"] += config.scaling * (tensor @ tensors[f"{site}.lora_A"])
        elif name.startswith("classifier"):
            state[name].copy_(tensor)
    minilora.load(model, tmp_path / "a.safetensors", format="loralib", config=config)
    with torch.no_grad():
        ids = torch.arange(2, 8)[None]
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)
    kinds = {name: [w.kind for w in wrappers] for name, wrappers in injected_modules(model).items()}
    assert kinds.pop("classifier") == ["trainable"]
    assert set(map(tuple, kinds.values())) == {("lora",)}
    minilora.save(model, tmp_path / "own.safetensors")
    minilora.load(model, tmp_path / "a.safetensors", format="loralib", config=config)  # over what is there
    minilora.load(minilora.eject(model), tmp_path / "own.safetensors")


def test_what_is_no_whole_module_is_refused(tmp_path: Path) -> None:
    model, config = roberta(), LoRAConfig(r=8, alpha=16)
    layer = "roberta.encoder.layer.0"
    cases = {
        "roberta.encoder.layer.0.intermediate.dense.bias": torch.zeros(32),  # bias="all"
        f"{layer}.attention.self.query.bias": torch.zeros(16),
        "head.weight": torch.zeros(3, 16),
        "lora_A": torch.zeros(8, 16),
    }
    for key, tensor in cases.items():
        published(tmp_path / "a.safetensors", model, **{key: tensor})
        with (
            unchanged(model),
            pytest.raises(CheckpointError, match=f"'{key}': neither LoRA nor part of a module"),
        ):
            minilora.load(model, tmp_path / "a.safetensors", format="loralib", config=config)
    norm = {f"{layer}.output.LayerNorm.{kind}": torch.ones(16) for kind in ("weight", "bias")}
    published(tmp_path / "a.safetensors", model, **norm)
    minilora.load(model, tmp_path / "a.safetensors", format="loralib", config=config)
    assert isinstance(model.get_submodule(f"{layer}.output.LayerNorm"), minilora.TrainableHead)
    other = roberta()
    published(tmp_path / "a.safetensors", other, **{"classifier.out_proj.bias": torch.zeros(5)})
    with (
        unchanged(other),
        pytest.raises(CheckpointError, match=r"'classifier\.out_proj\.bias': shape \(5,\)"),
    ):
        minilora.load(other, tmp_path / "a.safetensors", format="loralib", config=config)
