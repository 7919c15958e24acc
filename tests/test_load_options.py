"""What `load` does only when it is told to: another config over the same sites, a pickle, other names."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import randomise, state, unchanged
from models import CASES
from torch import nn

import minilora
from minilora import AdapterConfig, CheckpointError, LoRAConfig, MiniLoRAError

MLP = CASES["mlp"]


def trained(config: Any, targets: Any = ("up", "down")) -> nn.Module:
    return randomise(minilora.inject(MLP.build(), list(targets), config))


# Another alpha, over the same sites


@pytest.mark.parametrize("format", ["minilora", "peft"])
def test_the_file_or_the_model_gives_alpha_and_dropout(format: Any, tmp_path: Path) -> None:
    saved = trained(LoRAConfig(r=2, alpha=32, dropout=0.5, rslora=True))
    minilora.save(saved, tmp_path / "a", format=format)
    other = LoRAConfig(r=2, alpha=4, init="gaussian")
    model = trained(other)
    parameters = list(minilora.trainable_parameters(model))
    with (
        unchanged(model),
        pytest.raises(
            CheckpointError,
            match=r"alpha is 4 in the model and 32.* in the file.*config_from=\"file\" or \"model\"",
        ),
    ):
        minilora.load(model, tmp_path / "a")

    minilora.load(model, tmp_path / "a", config_from="file")
    assert torch.equal(MLP.run(model), MLP.run(saved))
    assert (model.up.config.dropout, model.up.scaling) == (0.5, saved.up.scaling)
    assert list(map(id, minilora.trainable_parameters(model))) == list(map(id, parameters))

    model = minilora.load(trained(other), tmp_path / "a", config_from="model")
    assert model.up.config == other
    assert torch.equal(model.up.lora_B, saved.up.lora_B)
    assert not torch.equal(MLP.run(model), MLP.run(saved))


def test_what_values_do_not_fit_into_is_said_with_what_to_do(tmp_path: Path) -> None:
    minilora.save(trained(LoRAConfig(r=2, alpha=32)), tmp_path / "a")
    model = trained(LoRAConfig(r=4))
    with (
        unchanged(model),
        pytest.raises(CheckpointError, match=r"r is 4 in the model and 2 in the file.*eject"),
    ):
        minilora.load(model, tmp_path / "a", config_from="file")
    minilora.load(minilora.eject(model), tmp_path / "a")
    minilora.save(trained(AdapterConfig(bottleneck=4)), tmp_path / "b")
    with pytest.raises(CheckpointError, match="activation is 'relu' in the model and 'gelu'"):
        minilora.load(
            trained(AdapterConfig(bottleneck=4, activation="relu")), tmp_path / "b", config_from="file"
        )
    with pytest.raises(MiniLoRAError, match="config_from must be"):
        minilora.load(model, tmp_path / "a", config_from="either")  # type: ignore[arg-type]


# A pickle


def as_pickle(folder: Path, values: Any) -> Path:
    minilora.save(trained(LoRAConfig(r=2)), folder, format="peft")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(values, folder / "adapter_model.bin")
    return folder


def of_peft(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"base_model.model.{k}.weight": t for k, t in minilora.adapter_state_dict(model).items()}


def test_a_pickle_is_read_when_it_is_allowed_and_only_then(tmp_path: Path) -> None:
    saved = trained(LoRAConfig(r=2))
    folder = as_pickle(tmp_path / "a", of_peft(saved))
    with pytest.raises(CheckpointError, match=r"a pickle.*allow_pickle=True"):
        minilora.load(MLP.build(), folder)
    assert state(minilora.load(MLP.build(), folder, allow_pickle=True)) == state(saved)


class Harm:
    """Runs something when it is unpickled, if that is let happen."""

    ran = False

    def __reduce__(self) -> Any:
        return setattr, (Harm, "ran", True)


@pytest.mark.parametrize(
    "values",
    [{"a": Harm()}, Harm(), [1, 2], {"a": 1}, {1: torch.ones(1)}],
    ids=["harm", "more harm", "a list", "a number", "a key"],
)
def test_what_is_no_dictionary_of_tensors_runs_nothing(values: Any, tmp_path: Path) -> None:
    folder = as_pickle(tmp_path / "a", values)
    model = MLP.build()
    with unchanged(model), pytest.raises(CheckpointError, match=r"no pickle of tensors alone|no dictionary"):
        minilora.load(model, folder, allow_pickle=True)
    assert not Harm.ran
    pickle.loads(pickle.dumps(Harm()))  # which the attempt would have done otherwise
    assert Harm.ran
    Harm.ran = False


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 cut"])
def test_a_damaged_pickle_is_an_error(content: bytes, tmp_path: Path) -> None:
    folder = as_pickle(tmp_path / "a", {})
    (folder / "adapter_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match="no pickle of tensors alone"):
        minilora.load(MLP.build(), folder, allow_pickle=True)


# Other names


class Vision(nn.Module):
    """A layer of attention, under the names of one release of a library or of the next."""

    def __init__(self, old: bool) -> None:
        super().__init__()
        attention = nn.Module()
        for name in ("query", "key", "value") if old else ("q_proj", "k_proj", "v_proj"):
            attention.add_module(name, nn.Linear(8, 8))
        block = nn.Module()
        if old:
            block.attention = nn.Module()
            block.attention.attention = attention
            self.encoder = nn.Module()
            self.encoder.layer = nn.ModuleList([block])
        else:
            block.attention = attention
            self.layers = nn.ModuleList([block])
        self.classifier = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (m for m in self.modules() if type(m).__name__ in ("Linear", "LoRALinear")):
            x = torch.tanh(layer(x)) if x.shape[-1] == 8 else x
        return x


def vision(old: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Vision(old)


def orphaned(folder: Path, format: Any) -> nn.Module:
    model = minilora.inject(vision(old=True), ["query", "value"], LoRAConfig(r=2), trainable=["classifier"])
    minilora.save(randomise(model), folder, format=format)
    return model


RENAME = {"encoder.layer": "layers", "attention.query": "q_proj", "attention.value": "v_proj"}


@pytest.mark.parametrize("format", ["minilora", "peft"])
def test_an_adapter_orphaned_by_renamed_modules(format: Any, tmp_path: Path) -> None:
    saved = orphaned(tmp_path / "a", format)
    model = vision()
    with unchanged(model), pytest.raises(CheckpointError) as error:
        minilora.load(model, tmp_path / "a")
    assert str(error.value).endswith(f"minilora.load(..., rename={RENAME!r})")
    minilora.load(model, tmp_path / "a", rename=RENAME)
    x = torch.randn(2, 8)
    assert torch.equal(model(x), saved(x))
    minilora.load(model, tmp_path / "a", rename=RENAME)  # over the same injections
    minilora.save(model, tmp_path / "b", format=format)  # from here on, under the new names
    assert state(minilora.load(vision(), tmp_path / "b")) == state(model)
    other = vision()
    with torch.no_grad():
        other.layers[0].attention.q_proj.weight.mul_(2)
    with pytest.raises(CheckpointError, match=r"not the base.*'layers\.0\.attention\.q_proj'"):
        minilora.load(other, tmp_path / "a", rename=RENAME)


class Multimodal(nn.Module):
    """Two towers, which transformers put into one model between two releases."""

    def __init__(self, old: bool = False) -> None:
        super().__init__()
        towers = {"visual": nn.Linear(8, 8), "text": nn.Linear(8, 8)}
        self.model = nn.ModuleDict({"layer": towers["text"]} if old else {})
        if old:
            self.visual = nn.ModuleDict({"layer": towers["visual"]})
            return
        self.model["visual"] = nn.ModuleDict({"layer": towers["visual"]})
        self.model["language_model"] = nn.ModuleDict({"layer": towers["text"]})
        self._checkpoint_conversion_mapping = {
            "^visual": "model.visual",
            r"^model(?!\.(language_model|visual))": "model.language_model",
        }


@pytest.mark.parametrize("format", ["minilora", "peft"])
def test_a_model_says_itself_what_its_modules_were_called(format: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = randomise(minilora.inject(Multimodal(old=True), "layer", LoRAConfig(r=2)))
    minilora.save(saved, tmp_path / "old", format=format)
    torch.manual_seed(0)
    model = minilora.load(Multimodal(), tmp_path / "old")
    assert torch.equal(model.model.visual.layer.lora_B, saved.visual.layer.lora_B)
    assert torch.equal(model.model.language_model.layer.lora_B, saved.model.layer.lora_B)
    minilora.save(model, tmp_path / "new", format=format)  # whose names are the model's own
    torch.manual_seed(0)
    assert state(minilora.load(Multimodal(), tmp_path / "new")) == state(model)


def test_a_renaming_that_is_none(tmp_path: Path) -> None:
    orphaned(tmp_path / "a", "minilora")
    model = vision()
    for wrong in ({"query": ""}, {"query": "q_proj", "value": "q_proj"}, ["query"]):
        with unchanged(model), pytest.raises(MiniLoRAError, match="rename maps names"):
            minilora.load(model, tmp_path / "a", rename=wrong)  # type: ignore[arg-type]
    with (
        unchanged(model),
        pytest.raises(CheckpointError, match="rename: it changes none"),
    ):
        minilora.load(model, tmp_path / "a", rename={"quarry": "q_proj"})
    plain = nn.ModuleDict({"a": nn.Linear(4, 4)})
    with pytest.raises(CheckpointError) as error:
        minilora.load(plain, tmp_path / "a")
    assert "rename=" not in str(error.value)
