"""The table of every field of PEFT's LoraConfig in the docs, each row held against the installed PEFT."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import randomise, state, unchanged
from models import CASES
from torch import nn

import minilora
from minilora import CheckpointError, LoRAConfig

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.peft,
    pytest.mark.filterwarnings("ignore:.*have invalid shape. .*lora_B.bias"),  # which a bias of B has to PEFT
]

PAGE = Path(__file__).parent.parent / "docs" / "coming-from-peft.md"
NAMES = [field.name for field in dataclasses.fields(peft.LoraConfig)]

# A value that switches each field on. Those of "read" and "says nothing" give a file that loads.
SWITCHED_ON: dict[str, Any] = {
    "task_type": "SEQ_CLS",
    "auto_mapping": {"base_model_class": "MLP", "parent_library": "models"},
    "peft_version": "0.19.1",
    "base_model_name_or_path": "somewhere",
    "revision": "main",
    "inference_mode": False,
    "r": 3,
    "target_modules": ["up", "down"],
    "exclude_modules": ["down"],
    "lora_alpha": 3,
    "lora_dropout": 0.25,
    "fan_in_fan_out": True,
    "bias": "all",
    "use_rslora": True,
    "modules_to_save": ["classifier"],
    "init_lora_weights": "gaussian",
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "rank_pattern": {"up": 3},
    "alpha_pattern": {"up": 3},
    "megatron_config": {"a": 1},
    "megatron_core": "elsewhere",
    "trainable_token_indices": [1],
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"direction": "ArB2r"},
    "use_dora": True,
    "velora_config": {"rank": 1},
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "qalora_group_size": 8,
    "monteclora_config": {"a": 1},
    "layer_replication": [[0, 1]],
    "runtime_config": {"ephemeral_gpu_offload": True},
    "lora_bias": True,
    "target_parameters": ["down.weight"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1},
    "ensure_weight_tying": True,
}


def rows() -> dict[str, tuple[str, str]]:
    """Return what the docs say of each field: read, written."""
    table = PAGE.read_text(encoding="utf-8").partition("## Every field of")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "| `" in line]
    return {name.strip("`"): (read, written) for name, read, written in cells}


def bare() -> nn.Module:
    return CASES["mlp"].build()


def test_the_table_has_every_field_of_the_installed_peft_in_its_order() -> None:
    assert list(rows()) == NAMES
    assert set(SWITCHED_ON) | {"peft_type"} == set(NAMES)


def saved(folder: Path, **fields: Any) -> None:
    model = peft.get_peft_model(bare(), peft.LoraConfig(**{"r": 4, "target_modules": ["up"], **fields}))
    randomise_peft(model)
    model.save_pretrained(folder)


def randomise_peft(model: nn.Module) -> None:
    for tensor in peft.get_peft_model_state_dict(model).values():
        tensor.data.normal_(std=0.2)


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "peft_type"])
def test_what_is_said_to_be_refused_is_and_what_is_said_to_be_read_is(name: str, tmp_path: Path) -> None:
    read, _ = rows()[name]
    value = SWITCHED_ON[name]
    if read.startswith("refused"):
        saved(tmp_path)
        edit(tmp_path, **{name: value})
        model = bare()
        with unchanged(model), pytest.raises(CheckpointError, match=rf"- {name}: "):
            minilora.load(model, tmp_path)
    elif read.startswith("says nothing"):
        saved(tmp_path)
        before = state(minilora.load(bare(), tmp_path))
        edit(tmp_path, **{name: value})
        assert state(minilora.load(bare(), tmp_path)) == before
    elif name.startswith("layers_") or name == "trainable_token_indices":
        assert read.startswith("yes")  # of a model with layers: test_peft.py; with words: test_peft_tokens.py
    elif name == "task_type":
        saved(tmp_path, modules_to_save=["classifier", "score"])
        before = state(minilora.load(bare(), tmp_path))
        edit(tmp_path, modules_to_save=None, task_type=value)  # which adds these two
        assert state(minilora.load(bare(), tmp_path)) == before
    elif name == "fan_in_fan_out":
        saved(tmp_path)
        before = state(minilora.load(bare(), tmp_path))
        edit(tmp_path, fan_in_fan_out=True)  # as PEFT, which puts it right for an nn.Linear
        assert state(minilora.load(bare(), tmp_path)) == before
    else:
        assert read.startswith(("yes", "what concerns"))
        more = {"target_modules": ["up", "down"]} if name == "exclude_modules" else {}
        saved(tmp_path, **{**more, name: value})
        theirs = peft.PeftModel.from_pretrained(bare(), tmp_path).eval()
        case = CASES["mlp"]
        torch.testing.assert_close(case.run(minilora.load(bare(), tmp_path)), case.run(theirs))


def test_what_is_said_to_be_written_is_and_nothing_else(tmp_path: Path) -> None:
    model = minilora.inject(bare(), ["up", "down"], LoRAConfig(r=2), trainable=["classifier"])
    minilora.save(randomise(model), tmp_path, format="peft")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    for name, (_, says) in rows().items():
        value = written.get(name)
        if says.startswith("none"):
            assert value is None, name
        elif says == "yes":
            assert name in written or name == "target_parameters", name
        elif says in ("true", "false"):
            assert value is (says == "true"), name
    assert set(written) <= set(NAMES)
