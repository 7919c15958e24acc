"""PEFT's folders without PEFT: how they are written, replaced and kept from mixing."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from checks import injected_modules, randomise, raw, state, unchanged
from models import CASES
from torch import nn

import minilora
from minilora import CheckpointError, LoRAConfig, MiniLoRAError
from minilora.files import atomic
from minilora.files.formats import peft
from minilora.files.formats.peft import reader
from minilora.files.formats.peft.card import OURS

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def mlp() -> nn.Module:
    return CASES["mlp"].build()


def trained(alpha: float = 16, seed: int = 0, r: int = 4) -> nn.Module:
    model = minilora.inject(mlp(), ["up", "down"], LoRAConfig(r=r, alpha=alpha), trainable="classifier")
    return randomise(model, seed)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def edit(folder: Path, **fields: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**config_of(folder), **fields}))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    minilora.save(trained(), tmp_path / "adapter", format="peft")
    return tmp_path / "adapter"


def test_an_existing_folder_is_written_into_and_other_files_stay(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "adapter_config.json").chmod(0o600)
    minilora.save(trained(alpha=3, seed=1), folder, format="peft")
    assert sorted(contents(folder)) == sorted([*FILES, "tokenizer.json"])
    assert state(minilora.load(mlp(), folder)) == state(trained(seed=1))
    assert os.name != "posix" or (folder / "adapter_config.json").stat().st_mode & 0o777 == 0o600
    empty = folder / "empty"
    empty.mkdir()
    minilora.save(trained(), empty, format="peft")
    assert sorted(contents(empty)) == FILES


@pytest.mark.parametrize("number", range(1, 7))
def test_a_full_disk_leaves_the_old_adapter(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is met: while the data is flushed, or while files are exchanged."""
    before, calls = contents(folder), []

    def counted(real: Any) -> Any:
        def act(*arguments: Any) -> None:
            calls.append(1)
            if len(calls) == number:
                raise OSError(28, "No space left on device")
            real(*arguments)

        return act

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    with pytest.raises(OSError, match=r"what was there still is: No space left on device: '.*adapter'"):
        minilora.save(trained(seed=1, r=16), folder, format="peft")
    monkeypatch.undo()
    assert contents(folder) == before
    assert state(minilora.load(mlp(), folder)) == state(trained())


@pytest.mark.parametrize("number", range(1, 5))
def test_a_new_folder_appears_whole_or_not_at_all(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.replace, []

    def replace(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        minilora.save(trained(), tmp_path / "new", format="peft")
    assert list(tmp_path.iterdir()) == []


def test_processes_that_all_make_one_new_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As every rank of DDP does that calls `save`: each writes in turn, and the last is there, whole."""
    saves_while("new", trained(), tmp_path / "new", monkeypatch)
    minilora.save(trained(), tmp_path / "new", format="peft")
    assert contents(tmp_path / "new") == contents(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "new"]


# Two adapters must never become one


def saves_while(name: str, other: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let another save come by when a file of that name is about to be put in place."""
    real, done = os.replace, []

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == name and not done:
            done.append(1)
            minilora.save(other, folder, format="peft")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("name", FILES)
def test_saves_that_met_without_locks_are_refused_or_one_of_them(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "fcntl", None)
    saves_while(name, trained(alpha=3, seed=3), folder, monkeypatch)
    minilora.save(trained(alpha=2, seed=2), folder, format="peft")
    monkeypatch.undo()
    model = mlp()
    try:
        minilora.load(model, folder)
    except CheckpointError as error:
        assert "Either two adapters were mixed, or it was edited" in str(error)  # noqa: PT017
        return
    assert (model.up.config.alpha, state(model)) in [
        (alpha, state(trained(alpha=alpha, seed=alpha))) for alpha in (2, 3)
    ]


def test_the_config_of_one_save_with_the_tensors_of_another(folder: Path, tmp_path: Path) -> None:
    minilora.save(trained(alpha=3), tmp_path / "other", format="peft")
    os.replace(tmp_path / "other" / "adapter_config.json", folder / "adapter_config.json")
    model = mlp()
    with (
        unchanged(model),
        pytest.raises(CheckpointError, match="Either two adapters were mixed, or it was edited"),
    ):
        minilora.load(model, folder)


def test_an_edit_of_the_config_that_means_the_same(folder: Path) -> None:
    edit(
        folder,
        base_model_name_or_path="elsewhere",
        target_modules="up|down",
        lora_alpha=16.0,
        revision="main",
    )
    assert state(minilora.load(mlp(), folder)) == state(trained())


@pytest.mark.parametrize(
    "fields",
    [{"lora_alpha": 8}, {"use_rslora": True}, {"lora_dropout": 0.5}, {"alpha_pattern": {"up": 1}}],
    ids=str,
)
def test_an_edit_that_means_something_else_and_the_route_that_the_message_names(
    fields: dict[str, Any], folder: Path
) -> None:
    edit(folder, **fields)
    with pytest.raises(CheckpointError, match=r"or it was edited.*safetensors\.torch\.save_file"):
        minilora.load(mlp(), folder)
    f = str(folder / "adapter_model.safetensors")
    safetensors.torch.save_file(safetensors.torch.load_file(f), f)
    assert minilora.load(mlp(), folder).up.scaling != 4.0 or "lora_dropout" in fields


def test_a_load_waits_for_a_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if atomic.fcntl is None:
        pytest.skip("needs locks")
    real, waits, threads, loaded = os.replace, threading.Event(), [], []

    def replace(source: Any, target: Any) -> None:
        if not threads:
            threads.append(threading.Thread(target=lambda: loaded.append(minilora.load(mlp(), folder))))
            threads[0].start()
            assert waits.wait(60)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(atomic.time, "sleep", lambda seconds: waits.set())
    minilora.save(trained(alpha=3, seed=1), folder, format="peft")
    threads[0].join()
    assert loaded[0].up.config.alpha == 3
    assert state(loaded[0]) == state(trained(seed=1))


def test_a_load_reads_both_files_from_one_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that comes between the config and the tensors without a lock is seen."""
    monkeypatch.setattr(atomic, "fcntl", None)
    real, times = reader.opened, []

    def opened(path: Path) -> Any:
        if not times:
            times.append(1)
            minilora.save(trained(alpha=3), folder, format="peft")
        return real(path)

    monkeypatch.setattr(reader, "opened", opened)
    with pytest.raises(CheckpointError, match="two adapters were mixed"):
        minilora.load(mlp(), folder)
    assert minilora.load(mlp(), folder).up.config.alpha == 3


# Names


def test_names_with_line_breaks(tmp_path: Path) -> None:
    def bare() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"a\nb": nn.Linear(8, 8), "c": nn.Linear(8, 8), "d\ne": nn.Linear(8, 8)})

    model = minilora.inject(bare(), re.compile(r"a\nb|c"), LoRAConfig(r=2), trainable=["d\ne"])
    minilora.save(randomise(model), tmp_path / "a", format="peft")
    loaded = minilora.load(bare(), tmp_path / "a")
    assert state(loaded) == state(model)
    other = minilora.inject(bare(), "c", LoRAConfig(r=2))
    minilora.inject(other, re.compile(r"a\nb"), LoRAConfig(r=3))
    minilora.inject(other, re.compile(r"d\ne"), LoRAConfig(r=3))
    try:
        minilora.save(randomise(other), tmp_path / "b", format="peft")
    except CheckpointError as error:
        assert "PEFT's format cannot express" in str(error)  # noqa: PT017
        assert not (tmp_path / "b").exists()
    else:
        assert state(minilora.load(bare(), tmp_path / "b")) == state(other)


def test_what_no_pattern_can_say_is_refused(tmp_path: Path) -> None:
    """PEFT reads the entries of modules_to_save as regular expressions, and these names are none."""
    model = nn.ModuleDict({"up": nn.Linear(4, 4), "a(b": nn.Linear(4, 4)})
    minilora.inject(model, "up", LoRAConfig(r=2), trainable=["a(b"])
    with pytest.raises(
        CheckpointError, match=r"'a\(b': PEFT takes it for .* is not a valid regular expression"
    ):
        minilora.save(model, tmp_path / "a", format="peft")
    assert list(tmp_path.iterdir()) == []


def test_modules_that_only_a_wildcard_takes_for_a_head(tmp_path: Path) -> None:
    """A dot in modules_to_save stands for any character: LoRA leaves "0x1" out because of "0.1"."""
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = nn.ModuleDict({"0": inner, "0x1": nn.Linear(4, 4), "up": nn.Linear(4, 4)})
    minilora.inject(model, ["up", "0x1"], LoRAConfig(r=2), trainable=["0.1"])
    with pytest.raises(
        CheckpointError, match=r"'0x1': PEFT leaves it out, because '0\.1' is trained in full"
    ):
        minilora.save(model, tmp_path / "a", format="peft")


# The card


def test_a_card_of_ones_own_is_kept(folder: Path) -> None:
    card = folder / "README.md"
    text = card.read_text()
    assert OURS in text
    assert "| `up` | 1 | LoRA, r = 4, alpha = 16 |" in text
    assert "base_model:" not in text
    minilora.save(trained(alpha=3), folder, format="peft")
    assert "| `up` | 1 | LoRA, r = 4, alpha = 3 |" in card.read_text()
    for own in ("# Mine\n", card.read_text().replace(OURS, ""), "\udcff"):
        card.write_bytes(own.encode(errors="surrogateescape"))
        minilora.save(trained(), folder, format="peft")
        assert card.read_bytes() == own.encode(errors="surrogateescape")


def test_the_card_tells_figures_that_are_given(folder: Path) -> None:
    card, plain = folder / "README.md", (folder / "README.md").read_text()
    assert "figure" not in plain
    assert f"format: {sum(t.numel() for t in minilora.adapter_state_dict(trained()).values())} par" in plain
    figures = {"validation accuracy": 0.8796, "seeds": 3, "data |\nsplit": "GLUE | SST-2"}
    minilora.save(trained(), folder, format="peft", figures=figures)
    table = "| validation accuracy | 0.8796 |\n| seeds | 3 |\n| data \\| split | GLUE \\| SST-2 |\n"
    assert f"\n\n| figure | value |\n|---|---|\n{table}\n" in card.read_text()
    before = contents(folder)
    minilora.save(trained(), folder, format="peft")  # they were of another run
    assert card.read_text() == plain
    assert {**before, "README.md": plain.encode()} == contents(folder)


def test_figures_that_have_no_place_are_refused(folder: Path) -> None:
    def refused(says: str, **how: Any) -> None:
        before = contents(folder)
        with pytest.raises(MiniLoRAError, match=says):
            minilora.save(trained(seed=1), folder, **{"format": "peft", "figures": {"loss": 0.1}, **how})
        assert contents(folder) == before

    refused(r'figures go with format="peft"', format="minilora")
    refused(r"not 'loss': tensor\(0\.5000\) of type Tensor: .*item", figures={"loss": torch.tensor(0.5)})
    refused(r"a mapping, not a float: figures=\{", figures=0.1)
    (folder / "README.md").write_text("# Mine\n")
    refused(r"README\.md' is your own .* leave figures out")


def test_the_card_of_dora_and_of_a_base_on_disk(tmp_path: Path) -> None:
    model = minilora.inject(mlp(), "up", LoRAConfig(r=2, dora=True), trainable=())
    model.name_or_path = "/disk/model"
    minilora.save(model, tmp_path / "a", format="peft")
    text = (tmp_path / "a" / "README.md").read_text()
    assert "| `up` | 1 | DoRA, r = 2, alpha = 16 |" in text
    assert "/disk" not in text


def test_the_card_of_two_methods_is_grouped(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(3)))
    minilora.inject(model, "q", LoRAConfig(r=2, alpha=0.5, rslora=True), trainable=["0.v", "1.v"])
    minilora.inject(model, "2.v", LoRAConfig(r=1, alpha=4, rslora=True))
    minilora.save(model, tmp_path / "a", format="peft")
    text = (tmp_path / "a" / "README.md").read_text()
    for line in (
        "| `*.q` | 3 | LoRA, r = 2, alpha = 0.5, rank-stabilised |",
        "| `*.v` | 1 | LoRA, r = 1, alpha = 4, rank-stabilised |",
        "| `*.v` | 2 | trained in full |",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("bert-base-uncased", True),
        ("org/model_1.5", True),
        ("/disk/model", False),
        ("./model", False),
        ("a/b/c", False),
        ("", False),
        (3, False),
    ],
)
def test_a_base_is_named_by_what_the_hub_knows(name: Any, named: bool, tmp_path: Path) -> None:
    model = trained()
    model.name_or_path = name
    minilora.save(model, tmp_path / "a", format="peft")
    text = (tmp_path / "a" / "README.md").read_text()
    assert (f'base_model: "{name}"' in text) == named
    assert config_of(tmp_path / "a")["base_model_name_or_path"] == (
        name if isinstance(name, str) and name else None
    )


def test_plain_models_have_no_task_and_no_class_to_load(folder: Path) -> None:
    assert (config_of(folder)["task_type"], config_of(folder)["auto_mapping"]) == (None, None)


def test_the_tensors_say_what_the_config_means(folder: Path) -> None:
    with safetensors.safe_open(folder / peft.TENSOR_FILE, framework="pt") as file:
        assert set(file.metadata()) == {"format", "minilora_base", "minilora_config", "minilora_sha256"}
    loaded = minilora.load(mlp(), folder)
    assert {name: [w.kind for w in found] for name, found in injected_modules(loaded).items()} == {
        "up": ["lora"],
        "down": ["lora"],
        "classifier": ["trainable"],
    }
    assert raw(loaded.up.lora_A) == raw(trained().up.lora_A)
