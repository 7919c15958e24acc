"""The command line, most of it in this process; `fuse` has a file of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checks import injected_modules, randomise
from command_line import Output, assert_close, assert_same_state, logits, run, trained
from models import BERT, CASES
from torch import nn

import minilora
from minilora import AdapterConfig, LoRAConfig
from minilora.cli import main, updates
from minilora.files.formats import native
from minilora.files.loading import read

transformers = pytest.importorskip("transformers")

ROOT = Path(minilora.__file__).parents[1]


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take width and colours of the help from no terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


def started(*arguments: object, **variables: str) -> subprocess.Popen[bytes]:
    """Start the command line in a process of its own, which listens to Ctrl-C.

    A shell without job control has what it runs in the background ignore it, and the children of that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, *(os.fsencode(a) if isinstance(a, Path) else str(a) for a in arguments)],
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def ended(process: subprocess.Popen[bytes]) -> Output:
    out, err = process.communicate(timeout=300)
    return Output(process.returncode, out.decode(), err.decode())


# inspect


def test_inspect(file: Path) -> None:
    result = run("inspect", file)
    assert result.code == 0
    assert not result.err
    assert "minilora, " in result.out
    assert re.search(
        r"bert\.encoder\.layer\.\*\.attention\.self\.query +x2 +lora_A 2x16 lora_B 16x2 +norm", result.out
    )
    assert "trained in full: classifier  bias 3 weight 3x16" in result.out
    assert "base: 8 weights recorded (float32)" in result.out


def test_inspect_for_programs(file: Path, tmp_path: Path) -> None:
    model = trained()
    minilora.save(model, tmp_path / "peft", format="peft")
    for path, format in ((file, "minilora"), (tmp_path / "peft", "peft")):
        result = json.loads(run("inspect", path, "--json").out)
        assert result["format"] == format
        assert result["parameters"] == sum(t.numel() for t in minilora.adapter_state_dict(model).values())
        assert result["trainable"] == {"classifier": {"bias": [3], "weight": [3, 16]}}
        assert len(result["base"]["weights"]) == 8
        layers = injected_modules(model)
        for site in result["sites"]:
            exact = layers[site["site"]][0].delta_weight().detach().norm().item()
            assert site["norm"] == pytest.approx(exact, rel=1e-5)
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert result["bytes"] == sum((tmp_path / "peft" / name).stat().st_size for name in names)


def test_inspect_tells_damage_and_bottlenecks(tmp_path: Path) -> None:
    model = minilora.inject(
        CASES["bert"].build(), ["output.dropout"], AdapterConfig(bottleneck=3, hidden_size=16), trainable=()
    )
    path = tmp_path / "a.safetensors"
    minilora.save(randomise(model), path)
    result = run("inspect", path)
    assert "bottleneck adapter bottleneck=3 activation=gelu" in result.out
    assert "base: not recorded" in result.out
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    result = run("inspect", path)
    assert result.code == 1
    assert "damaged: its checksum is wrong" in result.out


def test_tensors_that_the_manifest_does_not_call_for(file: Path, base: Path, tmp_path: Path) -> None:
    """A file may be whole and yet contradict itself; loading it is refused, and so it is damaged."""
    contents = read(file)
    first = next(key for key in contents.tensors if key.endswith("lora_A"))
    tensors = {key: tensor for key, tensor in contents.tensors.items() if key != first}
    tensors["classifier.bias.more"] = torch.ones(1)
    tensors[first.replace("lora_A", "stray")] = torch.ones(1)
    native.write(tmp_path / "b.safetensors", dataclasses.replace(contents, tensors=tensors))
    result = run("inspect", tmp_path / "b.safetensors")
    assert result.code == 1
    assert f"damaged: missing from the file: {first!r}" in result.out
    assert "damaged: in the file, but called for by nothing: 'bert.encoder.layer.0" in result.out
    assert "norm unknown" in result.out
    sites = json.loads(run("inspect", tmp_path / "b.safetensors", "--json").out)["sites"]
    assert [site["norm"] is None for site in sites].count(True) == 1
    result = run("verify", tmp_path / "b.safetensors", "--base", base)
    assert result.code == 1
    assert "no: 2 problems" in result.out


def test_sites_inside_sites_keep_their_tensors_apart(tmp_path: Path) -> None:
    model = minilora.inject(CASES["bert"].build(), ["query"], LoRAConfig(r=2), trainable=())
    minilora.inject(model, ["attention"], AdapterConfig(bottleneck=2, hidden_size=16), trainable=())
    minilora.save(randomise(model), tmp_path / "a.safetensors")
    sites = json.loads(run("inspect", tmp_path / "a.safetensors", "--json").out)["sites"]
    assert {len(site["shapes"]) for site in sites if site["kind"] == "adapter"} == {4}
    with torch.no_grad():
        injected_modules(model)["bert.encoder.layer.0.attention.self.query"][0].lora_A.mul_(2)
    minilora.save(model, tmp_path / "b.safetensors")
    result = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert result.out == (
        "bert.encoder.layer.0.attention.self.query (LoRA): other values, 100 % of the first's size apart\n"
    )


@pytest.mark.parametrize("command", ["inspect", "diff", "convert"])
def test_errors_go_to_stderr(command: str, tmp_path: Path) -> None:
    more = {"inspect": [], "diff": [tmp_path], "convert": [tmp_path / "b", "--to", "peft"]}[command]
    result = run(command, tmp_path / "absent", *more)
    assert result.code == 2
    assert not result.out
    assert "minilora: error:" in result.err
    assert "absent" in result.err


# verify


def test_verify(file: Path, base: Path, tmp_path: Path) -> None:
    result = run("verify", file, "--base", base)
    assert (result.code, result.out) == (0, "yes: the same base (8 weights agree)\n")
    CASES["bert"].build(torch.bfloat16).save_pretrained(tmp_path / "cast")
    result = run("verify", file, "--base", tmp_path / "cast")
    assert result.code == 0
    assert "another dtype" in result.out
    other = CASES["bert"].build()
    other.bert.encoder.layer[0].output.dense.weight.data.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    result = run("verify", file, "--base", tmp_path / "other")
    assert result.code == 1
    assert "no: another base: 1 weights differ" in result.out
    CASES["llama"].build().save_pretrained(tmp_path / "llama")
    result = run("verify", file, "--base", tmp_path / "llama")
    assert result.code == 1
    assert "the base has no weight of that name" in result.out
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run("verify", file, "--base", base).code == 1


def test_verify_for_programs(file: Path, base: Path, tmp_path: Path) -> None:
    result = run("verify", file, "--base", base, "--json")
    found = json.loads(result.out)
    assert (result.code, found["answer"], len(found["same"])) == (0, "yes", 8)
    other = CASES["bert"].build()
    other.bert.encoder.layer[0].output.dense.weight.data.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    result = run("verify", file, "--base", tmp_path / "other", "--json")
    found = json.loads(result.out)
    assert (result.code, found["answer"]) == (1, "no")
    assert list(found["different"]) == ["bert.encoder.layer.0.output.dense"]
    CASES["llama"].build().save_pretrained(tmp_path / "llama")
    result = run("verify", file, "--base", tmp_path / "llama", "--json")
    found = json.loads(result.out)
    assert (result.code, found["answer"], found["same"]) == (1, "no", [])
    assert "no weight of that name" in found["reason"]


def test_verify_says_where_nothing_was_checked(file: Path, base: Path, tmp_path: Path) -> None:
    """A PEFT folder of PEFT's own knows nothing of its base."""
    run("convert", file, tmp_path / "peft", "--to", "peft")
    tensors = safetensors.torch.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors", {"format": "pt"})
    result = run("verify", tmp_path / "peft", "--base", base)
    assert result.code == 3
    assert result.out.startswith("not checked: names and shapes fit, but no value was compared")
    result = run("verify", tmp_path / "peft", "--base", base, "--json")
    assert (result.code, json.loads(result.out)["answer"]) == (3, "not checked")
    CASES["llama"].build().save_pretrained(tmp_path / "llama")
    assert run("verify", tmp_path / "peft", "--base", tmp_path / "llama").code == 1


def test_verify_one_file(file: Path, base: Path, tmp_path: Path) -> None:
    assert run("verify", file, "--base", base / "model.safetensors").code == 0
    (base / "model.safetensors").rename(tmp_path / "weights.safetensors")
    result = run("verify", file, "--base", tmp_path / "weights.safetensors")
    assert (result.code, result.out) == (0, "yes: the same base (8 weights agree)\n")
    result = run("verify", file, "--base", tmp_path)
    assert result.code == 2
    assert f"give the file itself, as --base {str(tmp_path / 'a.safetensors')!r}" in result.err


def test_names_that_fit_in_two_ways(file: Path, tmp_path: Path) -> None:
    state = CASES["bert"].build().state_dict()
    twice = {f"{copy}.{name}": tensor.clone() for copy in ("ema", "model") for name, tensor in state.items()}
    safetensors.torch.save_file(twice, tmp_path / "twice.safetensors")
    result = run("verify", file, "--base", tmp_path / "twice.safetensors")
    assert result.code == 1
    assert "the names fit the base's in 2 ways: with 'ema.' in front, with 'model.' in front" in result.out


def test_what_is_no_adapter_and_what_is_no_base(file: Path, base: Path, tmp_path: Path) -> None:
    state = CASES["mlp"].build().state_dict()
    full, loralib, pickle = (tmp_path / name for name in ("full.safetensors", "lora.safetensors", "a.bin"))
    safetensors.torch.save_file(state, full)
    safetensors.torch.save_file({"up.lora_A": torch.ones(2, 16), "up.lora_B": torch.ones(32, 2)}, loralib)
    torch.save(state, pickle)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-100])
    for path in (full, loralib, pickle, cut, base, tmp_path, tmp_path / "absent"):
        for arguments in (
            ("inspect", path),
            ("verify", path, "--base", base),
            ("diff", path, file),
            ("diff", file, path),
            ("convert", path, tmp_path / "new", "--to", "peft"),
            ("fuse", "--base", base, "--adapter", path, "--out", tmp_path / "new"),
        ):
            result = run(*arguments)
            assert (result.code, result.out) == (2, ""), arguments
            assert str(path) in result.err
        assert not (tmp_path / "new").exists()
    assert "a base is given with --base" in run("inspect", base).err
    run("convert", file, tmp_path / "peft", "--to", "peft")
    for path, says in (
        (file, "is an adapter, and no base"),
        (tmp_path / "peft", "is a PEFT adapter's folder, and no base"),
        (cut, "not a sound safetensors file"),
        (pickle, "not a sound safetensors file but a pickle, as torch.save writes it"),
        (base / "config.json", "not a sound safetensors file but JSON. A base can be saved as safetensors"),
        (tmp_path / "absent", "there is no file or folder"),
    ):
        for result in (
            run("verify", file, "--base", path),
            run("fuse", "--adapter", file, "--base", path, "--out", tmp_path / "out"),
        ):
            assert (result.code, result.out) == (2, ""), path
            assert says in result.err
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for arguments in (("convert", file, tmp_path / "new", "--to", "peft"), ("diff", file, tmp_path / "peft")):
        result = run(*arguments)
        assert result.code == 2
        assert "is damaged: its checksum is wrong" in result.err


def test_verify_a_wider_base(file: Path, tmp_path: Path) -> None:
    config = transformers.BertConfig(**{**BERT, "hidden_size": 32})
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "wide")
    result = run("verify", file, "--base", tmp_path / "wide")
    assert result.code == 1
    assert "the base's weight is (32, 32), the adapter's update (16, 16)" in result.out
    assert "'classifier.weight': the base's is (3, 32)" in result.out


# convert and diff


def test_convert_there_and_back(file: Path, tmp_path: Path) -> None:
    result = run("convert", file, tmp_path / "peft", "--to", "peft")
    assert result.code == 0
    assert "note: PEFT takes any module whose name ends with" in result.err
    assert run("convert", tmp_path / "peft", tmp_path / "b.safetensors", "--to", "minilora").code == 0
    result = run("diff", file, tmp_path / "b.safetensors")
    assert (result.code, result.out) == (0, "the same\n")
    one = minilora.load(CASES["bert"].build(), file)
    for path in (tmp_path / "b.safetensors", tmp_path / "peft"):
        two = minilora.load(CASES["bert"].build(), path)
        assert_close(logits("bert", one), logits("bert", two))
        assert_same_state(one, two)


@pytest.mark.peft
def test_peft_loads_what_was_converted(file: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    run("convert", file, tmp_path / "peft", "--to", "peft")
    theirs = peft.PeftModel.from_pretrained(CASES["bert"].build(), tmp_path / "peft")
    expected = logits("bert", minilora.load(CASES["bert"].build(), file))
    assert_close(logits("bert", theirs), expected)


def test_convert_refuses(file: Path, tmp_path: Path) -> None:
    assert "format already" in run("convert", file, tmp_path / "b", "--to", "minilora").err
    assert "exists already" in run("convert", file, tmp_path, "--to", "peft").err
    model = minilora.inject(CASES["mlp"].build(), ["up"], AdapterConfig(bottleneck=2))
    minilora.save(model, tmp_path / "bottleneck.safetensors")
    result = run("convert", tmp_path / "bottleneck.safetensors", tmp_path / "c", "--to", "peft")
    assert result.code == 2
    assert "PEFT has no bottleneck adapters" in result.err
    assert not (tmp_path / "c").exists()


def test_diff(file: Path, tmp_path: Path) -> None:
    model = trained()
    one = injected_modules(model)["bert.encoder.layer.0.attention.self.query"][0]
    with torch.no_grad():
        one.lora_B.mul_(1.5)
    minilora.save(model, tmp_path / "b.safetensors")
    result = run("diff", file, tmp_path / "b.safetensors")
    assert result.code == 1
    assert result.out == (
        "bert.encoder.layer.0.attention.self.query (LoRA): other values, 50 % of the first's size apart\n"
    )
    other = minilora.inject(CASES["bert"].build(), ["query", "key"], LoRAConfig(r=4), trainable=())
    other.bert.encoder.layer[0].attention.self.query.base.weight.data.add_(1)
    minilora.save(other, tmp_path / "c.safetensors")
    out = run("diff", file, tmp_path / "c.safetensors").out
    assert "'bert.encoder.layer.*.attention.self.key' (x2): LoRA in the second alone" in out
    assert "'classifier': trained in full in the first alone" in out
    assert "'bert.encoder.layer.*.attention.self.query' (x2): r 2 -> 4, alpha 3 -> 16" in out
    assert "trained on different bases" in out


def test_diff_puts_layers_of_a_stack_on_one_line(file: Path, tmp_path: Path) -> None:
    model = trained()
    with torch.no_grad():
        for i, layer in enumerate(model.bert.encoder.layer):
            layer.attention.self.query.lora_B.mul_(1.25 + 0.25 * i)
            layer.attention.self.value.lora_B.zero_()
    minilora.save(model, tmp_path / "b.safetensors")
    result = run("diff", file, tmp_path / "b.safetensors")
    assert result.out.splitlines() == [
        "bert.encoder.layer.*.attention.self.value (x2, LoRA): other values, 100 % of the first's size apart",
        "bert.encoder.layer.*.attention.self.query (x2, LoRA): other values, 25..50 % of the first's size "
        "apart",
    ]
    result = run("diff", tmp_path / "b.safetensors", file)
    assert "self.value (x2, LoRA): other values, and zero in the first\n" in result.out
    found = json.loads(run("diff", tmp_path / "b.safetensors", file, "--json").out)
    assert not found["same"]
    assert [change["distance"] for change in found["changes"] if "value" in change["site"]] == [None] * 2
    assert json.loads(run("diff", file, file, "--json").out)["same"]


def test_diff_for_programs(file: Path, tmp_path: Path) -> None:
    other = minilora.inject(CASES["bert"].build(), ["query", "key"], LoRAConfig(r=4), trainable=())
    minilora.save(other, tmp_path / "b.safetensors")
    found = json.loads(run("diff", file, tmp_path / "b.safetensors", "--json").out)
    assert {"site": "classifier", "kind": "trainable"} in found["first_alone"]
    assert {place["kind"] for place in found["second_alone"]} == {"lora"}
    assert len(found["second_alone"]) == len(found["changes"]) == 2
    assert found["changes"][0]["config"] == {"r": [2, 4], "alpha": [3, 16]}
    assert found["changes"][0]["distance"] == pytest.approx(1)  # the second was not trained
    assert found["bases"].startswith("the same base")


def test_diff_of_what_is_not_finite(file: Path, tmp_path: Path) -> None:
    contents = read(file)
    tensors = {key: tensor.clone() for key, tensor in contents.tensors.items()}
    tensors["classifier.bias"][0] = torch.nan
    tensors["classifier.weight"][0] = torch.inf
    nan = tmp_path / "nan.safetensors"
    native.write(nan, dataclasses.replace(contents, tensors=tensors))
    assert run("diff", nan, nan).out == "the same\n"
    assert (
        run("diff", file, nan).out == "classifier (trained in full): other values, not all of them finite\n"
    )
    assert json.loads(run("diff", file, nan, "--json").out)["changes"][0]["distance"] is None
    tensors = {key: tensor for key, tensor in contents.tensors.items() if key != "classifier.bias"}
    native.write(nan, dataclasses.replace(contents, tensors=tensors))
    assert run("diff", file, nan).out == "classifier (trained in full): other values, other shapes\n"


def test_updates_are_measured_without_being_formed() -> None:
    one = updates.LowRank(torch.randn(2, 7).double(), torch.randn(5, 2).double(), scaling=-1.5)
    two = updates.LowRank(torch.randn(9, 7).double(), torch.randn(5, 9).double(), scaling=0.5)
    for update in (one, two, one.minus(two)):
        assert update.norm() == pytest.approx((update.scaling * update.B @ update.A).norm().item())
    full = one.scaling * one.B @ one.A - two.scaling * two.B @ two.A
    assert one.minus(two).norm() == pytest.approx(full.norm().item())
    assert one.minus(updates.LowRank(torch.ones(1, 8), torch.ones(5, 1), 1.0)) is None
    assert one.minus(updates.Values({})) is None
    assert updates.Values({"a": torch.ones(2)}).minus(updates.Values({"b": torch.ones(2)})) is None


# The terminal


def test_in_a_process_of_its_own_without_transformers(file: Path, base: Path, tmp_path: Path) -> None:
    arguments = ["fuse", "--base", str(base), "--adapter", str(file), "--out", str(tmp_path / "out")]
    script = "import sys; sys.modules['transformers'] = None; from minilora_command import main; "
    done = ended(started("-c", f"{script} sys.argv[1:] = {arguments!r}; sys.exit(main())"))
    assert (done.code, done.out) == (0, ""), done.err
    assert "[1/1] model.safetensors" in done.err
    done = ended(started("-m", "minilora", "diff", file, base))
    assert (done.code, done.out) == (2, "")


def test_usage() -> None:
    for arguments in (["fuse"], ["unknown"], ["convert", "a", "b", "--to", "pickle"]):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 2


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    alone = run()
    assert alone.code == 0
    assert not alone.err
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == alone.out
    for code in (0, 1, 2, 3, 130, 141):
        assert f"\n  {code} " in alone.out
    for command in ("inspect", "verify", "diff", "convert", "fuse"):
        assert f"\n    {command} " in alone.out
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert f"example:\n  minilora {command} " in out
        assert "exit codes: 0, " in out


@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "convert", "fuse"])
def test_the_examples_in_the_help_run(
    command: str,
    file: Path,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    example = re.search(r"example:\n  minilora (.*)", capsys.readouterr().out)[1]
    for name in ("adapter", "monday", "tuesday"):
        shutil.copyfile(file, tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    assert main(example.split()) == 0


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"minilora {minilora.__version__}\n")


def without_reader() -> Any:
    """Return the end of a pipe whose other end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w")


@pytest.mark.skipif(os.name != "posix", reason="pipes end otherwise there")
def test_a_reader_that_goes_away(file: Path, base: Path, tmp_path: Path) -> None:
    name, out = str(file), str(tmp_path / "out")
    for arguments in (["inspect", name], ["inspect", name, "--json"], ["diff", name, name]):
        with without_reader() as stream, contextlib.redirect_stdout(stream):
            assert main(arguments) == 141
    with without_reader() as stream, contextlib.redirect_stdout(stream), pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    with without_reader() as stream, contextlib.redirect_stderr(stream):  # nobody hears of the progress
        assert main(["fuse", "--base", str(base), "--adapter", name, "--out", out]) == 0
    assert Path(out, "model.safetensors").exists()


@pytest.mark.skipif(os.name != "posix", reason="pipes end otherwise there")
def test_a_reader_that_goes_away_from_a_process(file: Path) -> None:
    """Python itself flushes once more at its end, and would complain."""
    process = started("-m", "minilora", "inspect", file)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=300)) == (b"", 141)
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_result_that_cannot_be_written(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full):
        assert main(["inspect", str(file)]) == 2
    assert re.fullmatch("minilora: error: .*\n", capsys.readouterr().err)


class Umlauts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.größe = nn.Linear(4, 4)


def test_an_ascii_terminal(tmp_path: Path) -> None:
    model = minilora.inject(nn.ModuleDict({"bell\x07": Umlauts()}), "größe", LoRAConfig(r=1))
    minilora.save(model, tmp_path / "ä.safetensors")
    result = run("inspect", tmp_path / "ä.safetensors", encoding="ascii")
    assert result.code == 0
    assert "\\xe4.safetensors: minilora, " in result.out
    assert "  bell\\x07.gr\\xf6\\xdfe  x1 " in result.out
    assert "  bell\\x07.größe  x1 " in run("inspect", tmp_path / "ä.safetensors").out
    result = run("inspect", tmp_path / "ä.safetensors", "--json", encoding="ascii")
    assert json.loads(result.out)["sites"][0]["site"] == "bell\x07.größe"
    result = run("inspect", tmp_path / "é.safetensors", encoding="ascii")
    assert (result.code, result.out) == (2, "")
    assert "\\xe9.safetensors" in result.err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file name is text")
def test_a_file_name_that_is_no_text(file: Path, base: Path, tmp_path: Path) -> None:
    odd, odd_base = tmp_path / os.fsdecode(b"caf\xe9.safetensors"), tmp_path / os.fsdecode(b"b\xe4se")
    result = run("inspect", odd)
    assert (result.code, result.out) == (2, "")
    assert "caf\\udce9.safetensors" in result.err
    shutil.copyfile(file, odd)
    result = run("inspect", odd)
    assert result.code == 0, result.err
    assert "caf\\udce9.safetensors: minilora, " in result.out
    assert json.loads(run("inspect", odd, "--json").out)["path"] == str(odd)
    base.rename(odd_base)
    assert run("verify", odd, "--base", odd_base).code == 0
    out = tmp_path / os.fsdecode(b"\xff")
    result = run("fuse", "--base", odd_base, "--adapter", odd, "--out", out)
    assert result.code == 0, result.err


@pytest.mark.skipif(os.name != "posix", reason="signals are sent otherwise there")
def test_an_interruption_while_torch_is_imported(file: Path, tmp_path: Path) -> None:
    lines = ["import time", "try:", "    print('importing', flush=True)", "    time.sleep(300)"]
    lines += ["except BaseException:", "    print('caught, and the import goes on')"]
    (tmp_path / "torch.py").write_text("\n".join(lines))
    process = started("minilora_command.py", "inspect", file, PYTHONPATH=str(tmp_path))
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert (done.code, done.out, done.err) == (130, "", "minilora: interrupted\n")


class Stack(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4) for _ in range(layers)])
        self.heads = nn.ModuleList([nn.Linear(3, 4) for _ in range(layers)])


def traced(run: Callable[[], Output]) -> tuple[int, Output]:
    """Return how many lines of Python the package runs, a measure of work that is no clock."""
    count = 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(str(ROOT / "minilora")):
            return None
        count += event == "line"  # a comprehension has one for each of its rounds
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        output = run()
    finally:
        sys.settrace(before)
    return count, output


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("inspect a", 0),
        ("diff a b", 1),
        ("diff a few", 1),
        ("verify a --base longer", 0),
        ("verify a --base renamed", 0),
        ("verify a --base wide", 1),
        ("verify a --base strange", 1),
        ("fuse --adapter a --base same --out out", 0),
        ("fuse --adapter a --base other --out out", 2),
        ("fuse --adapter a --base twins --out out", 2),
    ],
)
def test_many_sites_take_time_in_proportion(
    command: str, code: int, many_sites: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times the sites are four times the work, where comparing each with each would be sixteen."""
    work = []
    for folder in many_sites:
        monkeypatch.chdir(folder)
        steps, output = traced(lambda: run(*command.split()))
        assert output.code == code, output.err
        assert len((output.out + output.err).splitlines()) < 10
        work.append(steps)
    assert work[1] < 4.5 * work[0]


@pytest.fixture(scope="module")
def many_sites(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders with adapters, and bases of all sorts: of some sites, and of four times as many."""
    return [write_sites(tmp_path_factory.mktemp("sites"), layers) for layers in (20, 80)]


def write_sites(folder: Path, layers: int) -> Path:
    model = Stack(layers)
    bare = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    everything = re.compile(r"layers\.\d+"), re.compile(r"heads\.\d+")
    for name, (targets, trainable) in {
        "a": everything,
        "b": everything,
        "few": ("layers.0", ["heads.0"]),
    }.items():
        minilora.inject(model, targets, LoRAConfig(r=1), trainable=trainable)
        minilora.save(randomise(model, seed=len(name) + (name == "b")), folder / name)
        minilora.eject(model)
    sites = [f"layers.{i}.weight" for i in range(layers)]
    bases = {
        "same": bare,
        "longer": {f"model.{name}": tensor for name, tensor in bare.items()},
        "renamed": {name.replace("layers", "old"): tensor for name, tensor in bare.items()},
        "wide": {name: torch.ones(5, 5) for name in bare},
        "other": {name: tensor + 1 for name, tensor in bare.items()},
        "strange": {f"x{name}": tensor for name, tensor in bare.items()},
        "twins": bare | {f"copy.{name}": bare[name] for name in sites},
    }
    for name, tensors in bases.items():
        (folder / name).mkdir()
        stored = {key: tensor.clone() for key, tensor in tensors.items()}
        safetensors.torch.save_file(stored, folder / name / "model.safetensors")
    (folder / "renamed" / "config.json").write_text('{"model_type": "stack"}')
    return folder
