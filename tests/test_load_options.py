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
