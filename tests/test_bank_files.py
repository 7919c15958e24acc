"""Any file that `load` reads goes into a bank: under other names, as a pickle, of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_bank_changes import everything
from test_foreign_formats import FIXTURES, fixture_base, logits, recorded
from test_load_options import MLP, RENAME, as_pickle, of_peft, orphaned, trained, vision

import minilora
from minilora import Bank, CheckpointError, LoRAConfig, MiniLoRAError


@pytest.mark.parametrize("format", ["minilora", "peft"])
def test_under_other_names(format: Any, tmp_path: Path) -> None:
    saved = orphaned(tmp_path / "a", format)
    bank = Bank(vision(), targets=["q_proj", "v_proj"], trainable=["classifier"], slots=2, r=2)
    before = everything(bank)
    with pytest.raises(CheckpointError, match="rename="):
        bank.load("old", tmp_path / "a")
    assert everything(bank) == before
    bank.load("old", tmp_path / "a", rename=RENAME)
    bank.load("other", tmp_path / "a", rename=RENAME)
    bank.replace("other", tmp_path / "a", rename=RENAME)
    for name in bank.names:  # from here on, under the new names
        bank.save(name, tmp_path / name, format=format)
        alone, x = minilora.load(vision(), tmp_path / name), torch.randn(2, 8)
        assert torch.equal(alone(x), saved(x))


def test_a_pickle_where_it_is_allowed(tmp_path: Path) -> None:
    saved = trained(LoRAConfig(r=2))
    folder = as_pickle(tmp_path / "a", of_peft(saved))
    with pytest.raises(MiniLoRAError, match=r"'pickle': .* a pickle.*allow_pickle=True"):
        Bank(MLP.build(), {"pickle": folder})
    bank = Bank(MLP.build(), {"pickle": folder}, slots=2, allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"a pickle.*allow_pickle=True"):
        bank.load("again", folder)
    bank.load("again", folder, allow_pickle=True)
    with bank.rows("again"):
        torch.testing.assert_close(MLP.run(bank.model), MLP.run(saved))


def test_a_folder_of_the_adapters_library() -> None:
    targets = ["query", "key", "value", "intermediate.dense", "output.dense"]
    bank = Bank(fixture_base(), targets=targets, trainable=["classifier"], slots=3, r=8)
    for name in ("lora", "lora_everywhere"):
        bank.load(name, FIXTURES / name, format="adapters")
    for name in bank.names:
        with bank.rows(name):
            torch.testing.assert_close(logits(bank.model), recorded(name), rtol=0, atol=2e-6)
    with pytest.raises(MiniLoRAError, match="a bank takes LoRA"):
        bank.load("houlsby", FIXTURES / "houlsby", format="adapters")
