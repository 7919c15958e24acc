"""PEFT's LoRA on every kind of layer, as files in both directions, against the installed PEFT."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checks import raw, state, unchanged
from peft_settings import SETTINGS, Setting
from torch import Tensor, nn

import minilora
from minilora import CheckpointError

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.peft

HELD = [setting for setting in SETTINGS if not setting.refused]
REFUSED = [setting for setting in SETTINGS if setting.refused]
SAME = {"rtol": 0.0, "atol": 1e-11}


def of(settings: list[Setting]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("setting", settings, ids=lambda setting: setting.name)


@pytest.fixture(autouse=True)
def _what_peft_warns_of(request: pytest.FixtureRequest) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*have invalid shape: .*lora_B.bias"
        )  # which a bias of B has to PEFT
        for message in request.getfixturevalue("setting").warns if "setting" in request.fixturenames else ():
            warnings.filterwarnings("ignore", f".*{message}")
        yield


def trained(setting: Setting, folder: Path) -> nn.Module:
    """Return PEFT's model with random values, as if it had been trained, and save it."""
    model = peft.get_peft_model(
        setting.build(), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **copy.deepcopy(setting.fields)})
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            parameter.data.copy_(values)
    model.save_pretrained(folder)
    return model.eval()


def by_peft(setting: Setting, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(setting.build(), folder, is_trainable=True).eval()


def output(model: nn.Module, setting: Setting) -> Tensor:
    with torch.no_grad():
        return model(setting.input())


def after_steps(model: nn.Module, setting: Setting) -> Tensor:
    """Return what a model computes after two steps of plain gradient descent."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(setting.input()).square().mean().backward()
        optimizer.step()
    return output(model.eval(), setting)


def loaded(setting: Setting, folder: Path) -> nn.Module:
    return minilora.load(setting.build().eval(), folder)


def tensors_of(folder: Path) -> dict[str, Any]:
    found = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    copies = (".original_module.", ".modules_to_save.")
    return {key: raw(t) for key, t in found.items() if not any(part in key for part in copies)}


@of(HELD)
def test_a_file_of_pefts_computes_trains_merges_and_goes_back(setting: Setting, tmp_path: Path) -> None:
    theirs = trained(setting, tmp_path / "theirs")
    expected = output(theirs, setting)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*r exceeds the smaller side")
        warnings.filterwarnings("ignore", ".*has no rule")  # what a layer of one's own asks for
        base = setting.build().eval()
        before, plain = state(base), output(base, setting)
        model = minilora.load(base, tmp_path / "theirs")
        assert not torch.allclose(expected, plain)
        torch.testing.assert_close(output(model, setting), expected, **SAME)
        with minilora.disabled(model):
            torch.testing.assert_close(output(model, setting), plain, **SAME)
        torch.testing.assert_close(output(minilora.merge(model), setting), expected, **SAME)
        minilora.unmerge(model)

        minilora.save(model, tmp_path / "ours.safetensors")
        again = loaded(setting, tmp_path / "ours.safetensors")
        assert torch.equal(output(again, setting), output(model, setting))
        minilora.save(model, tmp_path / "ours", format="peft")
        if not setting.rewritten:
            assert tensors_of(tmp_path / "ours") == tensors_of(tmp_path / "theirs")
        torch.testing.assert_close(output(loaded(setting, tmp_path / "ours"), setting), expected, **SAME)
        back = by_peft(setting, tmp_path / "ours")
        torch.testing.assert_close(output(back, setting), expected, **SAME)

        if setting.steps:
            stepped = after_steps(theirs, setting)
            assert (stepped - expected).abs().max() > 1e-8
            torch.testing.assert_close(after_steps(model, setting), stepped, **SAME)
            torch.testing.assert_close(after_steps(back, setting), stepped, **SAME)
        torch.testing.assert_close(output(minilora.fuse(again), setting), expected, **SAME)
        assert state(minilora.eject(model)) == before


@of(REFUSED)
def test_a_file_of_pefts_that_computes_something_else_is_refused(setting: Setting, tmp_path: Path) -> None:
    trained(setting, tmp_path)
    model = setting.build()
    with unchanged(model), pytest.raises(CheckpointError, match=setting.refused):
        minilora.load(model, tmp_path)


def test_the_docs_say_how_many_hold() -> None:
    page = Path(__file__).parent.parent / "docs" / "coming-from-peft.md"
    text = " ".join(page.read_text(encoding="utf-8").split())
    steps = sum(setting.steps for setting in HELD)
    assert f"{len(HELD)} of {len(SETTINGS)} settings" in text
    assert f"{steps} of them in two training steps" in text
