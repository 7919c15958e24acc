"""The base of an adapter is known again: itself, itself in another dtype, another one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from checks import injected_modules, randomise, unchanged
from models import CASES, on_grid
from torch import nn

import minilora
from minilora import AdapterConfig, CheckpointError, LoRAConfig
from minilora.files.fingerprint import Comparison, Fingerprint, Signature, compare
from minilora.files.formats.native import BASE_KEY
from minilora.sites import injected_sites


def saved(model: nn.Module, path: Path) -> Path:
    minilora.save(randomise(model), path)
    return path


def of(model: nn.Module) -> Fingerprint:
    return Fingerprint.of(injected_sites(model))


def bert(dtype: torch.dtype = torch.float32) -> nn.Module:
    return CASES["bert"].build(dtype)


def injected(dtype: torch.dtype = torch.float32) -> nn.Module:
    return minilora.inject(bert(dtype), ["query", "output.dense"], LoRAConfig(r=2), trainable=["classifier"])


@on_grid
def test_the_same_base_is_the_same(case, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = minilora.inject(case.build(), case.targets, LoRAConfig(r=2), trainable=())
    path = saved(model, tmp_path / "a.safetensors")
    minilora.load(case.build(), path)
    comparison = compare(of(model), of(minilora.load(case.build(), path)))
    assert not comparison.different
    assert not comparison.cast
    assert set(comparison.same) == set(injected_modules(model))


@pytest.mark.parametrize("trained_on", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("loaded_on", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_is_no_other_base(
    trained_on: torch.dtype, loaded_on: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = minilora.inject(bert(trained_on), ["query"], LoRAConfig(r=2, dtype=torch.float32), trainable=())
    path = saved(model, tmp_path / "a.safetensors")
    with caplog.at_level(logging.INFO, "minilora"):
        minilora.load(bert(trained_on).to(loaded_on), path)
    said = "the same base (2" if trained_on == loaded_on else "the same base in another dtype (2"
    assert said in caplog.text


def perturbed(change: Callable[[nn.Module], None]) -> nn.Module:
    model = bert()
    with torch.no_grad():
        change(model)
    return model


def one_step_of_training(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.sub_(1e-5 * torch.sign(torch.randn(parameter.shape)))


def another_seed(model: nn.Module) -> None:
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=0.02)


def one_layer(model: nn.Module) -> None:
    model.bert.encoder.layer[1].output.dense.weight.mul_(1.01)


def transposed(model: nn.Module) -> None:
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    weight.copy_(weight.T.clone())


@pytest.mark.parametrize("change", [one_step_of_training, another_seed, one_layer, transposed])
def test_another_base_is_refused_and_named(change: Callable[[nn.Module], None], tmp_path: Path) -> None:
    path = saved(injected(), tmp_path / "a.safetensors")
    other = perturbed(change)
    with (
        unchanged(other),
        pytest.raises(CheckpointError, match=r"(?s)not the base.*check_base=False") as failure,
    ):
        minilora.load(other, path)
    if change is one_layer:
        assert "1 weights differ" in str(failure.value)
        assert "'bert.encoder.layer.1.output.dense'" in str(failure.value)
    minilora.load(other, path, check_base=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_base_is_told_from_a_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    model = minilora.inject(bert(), ["query"], LoRAConfig(r=2), trainable=())
    path = saved(model, tmp_path / "a.safetensors")
    minilora.load(bert(dtype), path)
    with pytest.raises(CheckpointError, match="not the base"):
        minilora.load(perturbed(another_seed).to(dtype), path)


def test_the_worst_come_first(tmp_path: Path) -> None:
    path = saved(injected(), tmp_path / "a.safetensors")

    def change(model: nn.Module) -> None:
        model.bert.encoder.layer[0].attention.self.query.weight.mul_(1.001)
        model.bert.encoder.layer[1].attention.self.query.weight.mul_(3.0)

    with pytest.raises(CheckpointError, match=r"(?s)layer\.1\.attention.*layer\.0\.attention"):
        minilora.load(perturbed(change), path)


def test_a_fresh_head_is_no_other_base(tmp_path: Path) -> None:
    path = saved(injected(), tmp_path / "a.safetensors")
    minilora.load(perturbed(lambda model: model.classifier.weight.normal_()), path)


def test_a_merged_model_is_known_by_its_original_weights(tmp_path: Path) -> None:
    model = randomise(injected())
    before = of(model)
    minilora.merge(model)
    assert of(model) == before
    minilora.save(model, tmp_path / "a.safetensors")
    minilora.load(bert(), tmp_path / "a.safetensors")


def test_loading_anew_into_an_injected_model_checks_too(tmp_path: Path) -> None:
    path = saved(injected(), tmp_path / "a.safetensors")
    other = minilora.inject(
        perturbed(one_layer), ["query", "output.dense"], LoRAConfig(r=2), trainable=["classifier"]
    )
    with unchanged(other), pytest.raises(CheckpointError, match="not the base"):
        minilora.load(other, path)


class Packed(nn.Module):
    """A layer as quantisation libraries make them."""

    in_features, out_features = 16, 16

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(0, 255, (128, 1), dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_a_quantised_base_is_not_checked_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = minilora.inject(nn.Sequential(nn.Linear(16, 16)), ["0"], LoRAConfig(r=2))
    path = saved(plain, tmp_path / "a.safetensors")
    with caplog.at_level(logging.INFO, "minilora"):
        quantised = minilora.load(nn.Sequential(Packed()), path)
    assert "1 weights not checked: quantised" in caplog.text
    path = saved(quantised, tmp_path / "b.safetensors")
    caplog.clear()
    with caplog.at_level(logging.INFO, "minilora"):
        minilora.load(nn.Sequential(Packed()), path)
        minilora.load(nn.Sequential(nn.Linear(16, 16)), path)
    assert caplog.text.count("not checked: quantised") == 2


def test_a_base_on_meta_is_skipped_and_that_is_said() -> None:
    model = injected()
    recorded = of(model)
    model.bert.to("meta")
    comparison = compare(recorded, of(model))
    assert not comparison.same
    assert set(comparison.unchecked.values()) == {"on the meta device, without values"}
    assert "not checked: on the meta device" in str(comparison)


def test_sites_without_a_weight_have_nothing_to_compare(tmp_path: Path) -> None:
    config = AdapterConfig(bottleneck=4, hidden_size=16)
    model = minilora.inject(bert(), ["output.dropout"], config, trainable=())
    assert of(model) == Fingerprint()
    with safetensors.safe_open(saved(model, tmp_path / "a.safetensors"), framework="pt") as file:
        assert BASE_KEY not in file.metadata()
    minilora.load(bert(), tmp_path / "a.safetensors")
    assert str(compare(Fingerprint(), Fingerprint())).startswith("not checked")


def test_views_and_layouts_give_the_same_signature() -> None:
    weight = torch.randn(96, 112)
    assert Signature.of(weight.T.contiguous().T) == Signature.of(weight)
    assert Signature.of(torch.randn(200, 112)[::2][:96].copy_(weight)) == Signature.of(weight)
    assert Signature.of(weight) != Signature.of(weight.T)
    assert Signature.of(torch.zeros(())).shape == ()
    assert Signature.of(torch.zeros(0, 4)).total == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values", ["small", "large", "constant", "zero", "sparse"])
def test_casts_of_awkward_values(dtype: torch.dtype, values: str) -> None:
    weight = {
        "small": torch.randn(300, 300, dtype=torch.float64) * 1e-6,
        "large": torch.randn(300, 300, dtype=torch.float64) * 1e4,
        "constant": torch.full((300, 300), 0.1, dtype=torch.float64),
        "zero": torch.zeros(300, 300, dtype=torch.float64),
        "sparse": torch.randn(300, 300, dtype=torch.float64) * (torch.rand(300, 300) < 0.01),
    }[values]
    recorded = Signature.of(weight)
    assert recorded.difference(Signature.of(weight.to(dtype))) == 0
    assert Signature.of(weight.to(dtype)).difference(recorded) == 0
    assert Signature.of(weight.to(dtype)).difference(Signature.of(weight.to(torch.bfloat16))) == 0


def test_another_shape_is_infinitely_different() -> None:
    recorded = Fingerprint({"a": Signature.of(torch.ones(2, 3))})
    comparison = compare(recorded, Fingerprint({"a": Signature.of(torch.ones(3, 2))}))
    assert comparison.different == {"a": "another shape"}


def test_a_few_values_of_a_weight_are_looked_at_whatever_its_size() -> None:
    one = torch.ones(1)
    huge = one.expand(2**22, 2**22)  # 64 TiB, were it copied
    signature = Signature.of(huge)
    assert signature.shape == (2**22, 2**22)
    assert (signature.total, len(signature.sample)) == (1024.0, 8)
    fingerprint = Fingerprint({"layer.23.attention.self.query": signature})
    assert len(json.dumps(fingerprint.to_dict(), separators=(",", ":"))) < 400


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {},
        {"weights": [], "unchecked": {}, "transposed": []},
        {"weights": {"a": 1}, "unchecked": {}, "transposed": []},
        {"weights": {}, "unchecked": {"a": 1}, "transposed": []},
        {"weights": {}, "unchecked": {}, "transposed": [1]},
        {"weights": {"a": {"dtype": "int8"}}, "unchecked": {}, "transposed": []},
    ],
)
def test_a_malformed_entry_is_refused(broken: object) -> None:
    with pytest.raises(CheckpointError, match="fingerprint"):
        Fingerprint.from_dict(broken)


def test_to_json_and_back() -> None:
    fingerprint = of(injected(torch.bfloat16))
    assert Fingerprint.from_dict(json.loads(json.dumps(fingerprint.to_dict()))) == fingerprint


def test_words() -> None:
    assert str(Comparison(same=("a",))) == "the same base (1 weights agree)"
    assert "another base: 1 weights differ" in str(Comparison(same=("a",), different={"b": "by 3 %"}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_base_on_a_gpu_is_the_same(tmp_path: Path) -> None:
    path = saved(injected(), tmp_path / "a.safetensors")
    model = minilora.load(bert().cuda(), path)
    assert not compare(of(injected()), of(model)).different
    minilora.save(model, tmp_path / "b.safetensors")
    minilora.load(bert(), tmp_path / "b.safetensors")
