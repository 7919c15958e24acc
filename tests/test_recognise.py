"""What is given in the place of an adapter is named for what it is, with the call that reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checks import randomise, raw, unchanged
from models import CASES
from torch import nn

import minilora
from minilora import LoRAConfig, MiniLoRAError


def mlp() -> nn.Module:
    return CASES["mlp"].build()


def trained() -> nn.Module:
    return randomise(minilora.inject(mlp(), ["up", "down"], LoRAConfig(r=4), trainable="classifier"))


def refused(path: Any, match: str, **options: Any) -> str:
    model = mlp()
    with unchanged(model), pytest.raises(MiniLoRAError, match=f"(?s){match}") as caught:
        minilora.load(model, path, **options)
    return str(caught.value)


@pytest.fixture
def peft_folder(tmp_path: Path) -> Path:
    minilora.save(trained(), tmp_path / "peft", format="peft")
    return tmp_path / "peft"


def test_a_file_out_of_a_peft_folder(peft_folder: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        message = refused(peft_folder / name, "PEFT adapter")
        assert f"minilora.load(model, {str(peft_folder)!r})" in message
    minilora.load(mlp(), peft_folder)
    (peft_folder / "adapter_config.json").unlink()
    refused(
        peft_folder / "adapter_model.safetensors",
        "'adapter_config.json', which belongs to it, is not beside it",
    )
    refused(peft_folder, r"no 'adapter_config\.json'.*tensors of a PEFT adapter")


def test_a_whole_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(mlp().state_dict(), path)
    (tmp_path / "config.json").write_text("{}")
    for given in (path, tmp_path):
        message = refused(given, "may be a whole model")
        assert f"model.load_state_dict(safetensors.torch.load_file({str(path)!r}))" in message
        assert f"from_pretrained({str(tmp_path)!r})" in message


def test_a_checkpoint_of_an_injected_model_and_the_route_that_the_message_names(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", trained()
    safetensors.torch.save_file(model.state_dict(), path)
    for given in (path, tmp_path):
        message = refused(given, "checkpoint of a whole model with its injections")
        assert f"model.load_state_dict(safetensors.torch.load_file({str(path)!r}))" in message
        assert "minilora.save(model, file)" in message
    again = minilora.inject(mlp(), ["up", "down"], LoRAConfig(r=4), trainable="classifier")
    again.load_state_dict(safetensors.torch.load_file(path))
    minilora.save(again, tmp_path / "adapter.safetensors")
    loaded = minilora.load(mlp(), tmp_path / "adapter.safetensors")
    assert raw(loaded.up.lora_B) == raw(model.up.lora_B)


def test_tensors_without_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(minilora.adapter_state_dict(trained()), path)
    assert f'minilora.load(model, {str(path)!r}, format="loralib", config=minilora.LoRAConfig(' in refused(
        path, "LoRA tensors without a configuration"
    )
    loaded = minilora.load(mlp(), path, format="loralib", config=LoRAConfig(r=4))
    assert raw(loaded.classifier.trained.weight) == raw(trained().classifier.trained.weight)


def test_a_file_of_the_adapters_library() -> None:
    folder = Path(__file__).parent / "fixtures" / "adapters" / "houlsby"
    assert f'minilora.load(model, {str(folder)!r}, format="adapters")' in refused(
        folder / "adapter.safetensors", "adapters library"
    )


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_and_the_route_that_the_message_names(
    legacy: bool, tmp_path: Path, peft_folder: Path
) -> None:
    path = tmp_path / "folder" / "pytorch_model.bin"
    path.parent.mkdir()
    torch.save(trained().state_dict(), path, _use_new_zipfile_serialization=not legacy)
    for given in (path, path.parent):
        message = refused(given, "pickle")
        new = str(path.with_suffix(".safetensors"))
        assert (
            f"torch.load({str(path)!r}, weights_only=True).items()}}, {new!r}), then "
            f"minilora.load(model, {new!r})" in message
        )
    safetensors.torch.save_file(torch.load(path, weights_only=True), new)
    refused(new, "checkpoint of a whole model with its injections")

    tensors = peft_folder / "adapter_model.safetensors"
    pickled = tensors.with_suffix(".bin")
    torch.save(safetensors.torch.load_file(tensors), pickled, _use_new_zipfile_serialization=not legacy)
    tensors.unlink()
    for given in (pickled, peft_folder):
        message = refused(given, "pickle")
        assert f"torch.load({str(pickled)!r}, weights_only=True).items()}}, {str(tensors)!r})" in message
    assert f"minilora.load(model, {str(peft_folder)!r})" in refused(pickled, "")
    safetensors.torch.save_file(torch.load(pickled, weights_only=True), tensors)
    minilora.load(mlp(), peft_folder)


def test_the_route_out_of_a_pickle_takes_tied_weights_and_the_arguments_that_were_given(
    tmp_path: Path,
) -> None:
    path, layer = tmp_path / "lora.bin", trained().up
    tensors = {"up.lora_A": layer.lora_A.detach(), "up.lora_B": layer.lora_B.detach()}
    torch.save(tensors | {"down.lora_A": torch.ones(4, 32), "down.lora_B": torch.ones(16, 4)}, path)
    message = refused(path, "pickle", format="loralib", config=LoRAConfig(r=4, alpha=8))
    convert, read = re.findall(r"(safetensors\.torch.*), then (minilora\.load.*)", message)[0]
    assert read.endswith('format="loralib", config=minilora.LoRAConfig(r=4, alpha=8))')
    model = mlp()
    space = {"safetensors": safetensors, "torch": torch, "minilora": minilora, "model": model}
    eval(convert, space)
    eval(read, space)
    assert raw(model.up.lora_B) == raw(layer.lora_B)

    tied = torch.ones(3, 3)
    torch.save({"a.weight": tied, "b.weight": tied}, path)
    eval(re.findall(r"(safetensors\.torch.*), then", refused(path, "pickle"))[0], space)
    refused(path.with_suffix(".safetensors"), "may be a whole model")


def test_a_shard_of_a_pickled_model_is_named_so(tmp_path: Path) -> None:
    path, index = tmp_path / "pytorch_model-00001-of-00002.bin", tmp_path / "pytorch_model.bin.index.json"
    torch.save({"a.weight": torch.ones(3)}, path)
    refused(path, "If you trust it")
    index.write_text("{}")
    for given in (path, tmp_path):
        message = refused(given, f"one shard of a whole model, whose index is '{index}'")
        assert f"from_pretrained({str(tmp_path)!r})" in message
        assert "save_file" not in message


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(path, "git lfs pull")
    path.write_text(json.dumps({"a": 1}, indent=2))
    refused(path, "not a sound safetensors file but JSON$")
    path.write_bytes(b"something else, of no known kind")
    refused(path, "not a sound safetensors file: its header claims")


def test_folders(tmp_path: Path, peft_folder: Path) -> None:
    refused(tmp_path, f"PEFT adapters are in '{peft_folder}': minilora.load\\(model, '{peft_folder}'\\)")
    own = tmp_path / "own" / "adapter.safetensors"
    own.parent.mkdir()
    refused(own.parent, "it is empty")
    (own.parent / "notes.txt").touch()
    refused(own.parent, r"Nothing in it is known here: 'notes\.txt'")
    minilora.save(trained(), own)
    refused(own.parent, f"A file of minilora's is in it: minilora.load\\(model, '{own}'\\)")
    refused(own.parent, "is a folder. A file of minilora's is in it", format="minilora")


def test_a_name_on_the_hub_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = mlp()
    says = r"nothing is downloaded.*load\(model, huggingface_hub\.snapshot_download\('someone/some-lora'\)\)"
    with unchanged(model), pytest.raises(FileNotFoundError, match=says):
        minilora.load(model, "someone/some-lora")
    for path in ("someone/lora.safetensors", str(tmp_path / "a"), "a"):
        with unchanged(model), pytest.raises(FileNotFoundError) as caught:
            minilora.load(model, path)
        assert "huggingface_hub" not in str(caught.value)


@pytest.mark.parametrize("format", ["minilora", "peft"])
def test_swapped_arguments(format: Any, tmp_path: Path) -> None:
    model = trained()
    for path in (str(tmp_path / "a"), tmp_path / "a", b"a"):
        with pytest.raises(MiniLoRAError, match=r"model comes first .* minilora\.save\(model, path\)"):
            minilora.save(path, model, format=format)  # type: ignore[arg-type]
        with pytest.raises(MiniLoRAError, match=r"model comes first .* minilora\.load\(model, path\)"):
            minilora.load(path, mlp(), format=format)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [None, 3, "", b"", nn.Linear(2, 2), open])
def test_what_is_no_path(path: Any) -> None:
    model = trained()
    with pytest.raises(MiniLoRAError, match=r"path must be a string .* minilora\.save\(model, path\)"):
        minilora.save(model, path)
    with (
        unchanged(model),
        pytest.raises(MiniLoRAError, match=r"path must be .* minilora\.load\(model, path\)"),
    ):
        minilora.load(model, path)


def test_what_is_no_model(tmp_path: Path) -> None:
    for model in ("bert-base-uncased", nn.Linear, None, {"a": torch.ones(1)}):
        with pytest.raises(MiniLoRAError, match=r"the model must be an nn\.Module"):
            minilora.load(model, tmp_path / "a")  # type: ignore[arg-type]
        with pytest.raises(MiniLoRAError, match=r"the model must be an nn\.Module"):
            minilora.save(model, tmp_path / "a")  # type: ignore[arg-type]
