"""The command line, most of it in this process; `fuse` against the merged model in transformers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from checks import injected_modules, randomise
from models import CASES
from torch import Tensor, nn

import minilora
from minilora import AdapterConfig, LoRAConfig
from minilora.cli import base_files, fuse_files, main

transformers = pytest.importorskip("transformers")


class Output:
    """What a command returned and printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Run = Callable[..., Output]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> Output:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Output(code, captured.out, captured.err)

    return run


def trained(name: str = "bert", trainable: Any = ("classifier",), targets: Any = None) -> nn.Module:
    case = CASES[name]
    model = minilora.inject(
        case.build(), targets or case.targets, LoRAConfig(r=2, alpha=3), trainable=trainable
    )
    return randomise(model)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    minilora.save(trained(), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    CASES["bert"].build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def logits(name: str, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return CASES[name].run(model.eval())


def loaded(name: str, folder: Path, **kwargs: Any) -> nn.Module:
    """Load a folder with transformers, and assert that it found every tensor and no other."""
    owner = type(CASES[name].make())
    model, report = owner.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(report.values()), report
    return model


# inspect


def test_inspect(file: Path, run: Run) -> None:
    result = run("inspect", file)
    assert result.code == 0
    assert not result.err
    assert "minilora, " in result.out
    assert re.search(
        r"bert\.encoder\.layer\.\*\.attention\.self\.query +x2 +lora_A 2x16 lora_B 16x2 +norm", result.out
    )
    assert "trained in full: classifier  bias 3 weight 3x16" in result.out
    assert "base: 8 weights recorded (float32)" in result.out


def test_inspect_for_programs(file: Path, run: Run, tmp_path: Path) -> None:
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
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "peft").iterdir())


def test_inspect_tells_damage_and_bottlenecks(tmp_path: Path, run: Run) -> None:
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


@pytest.mark.parametrize("command", ["inspect", "diff", "convert"])
def test_errors_go_to_stderr(command: str, tmp_path: Path, run: Run) -> None:
    more = {"inspect": [], "diff": [tmp_path], "convert": [tmp_path / "b", "--to", "peft"]}[command]
    result = run(command, tmp_path / "absent", *more)
    assert result.code == 2
    assert not result.out
    assert "minilora: error:" in result.err
    assert "absent" in result.err


# verify


def test_verify(file: Path, base: Path, run: Run, tmp_path: Path) -> None:
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


def test_verify_a_wider_base(file: Path, run: Run, tmp_path: Path) -> None:
    from models import BERT

    config = transformers.BertConfig(**{**BERT, "hidden_size": 32})
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "wide")
    result = run("verify", file, "--base", tmp_path / "wide")
    assert result.code == 1
    assert "the base's weight is (32, 32), the adapter's update (16, 16)" in result.out
    assert "'classifier.weight': the base's is (3, 32)" in result.out


# convert and diff


def test_convert_there_and_back(file: Path, tmp_path: Path, run: Run) -> None:
    result = run("convert", file, tmp_path / "peft", "--to", "peft")
    assert result.code == 0
    assert "note: PEFT takes any module whose name ends with" in result.err
    assert run("convert", tmp_path / "peft", tmp_path / "b.safetensors", "--to", "minilora").code == 0
    result = run("diff", file, tmp_path / "b.safetensors")
    assert (result.code, result.out) == (0, "the same\n")
    one = minilora.load(CASES["bert"].build(), file)
    for path in (tmp_path / "b.safetensors", tmp_path / "peft"):
        assert torch.equal(logits("bert", one), logits("bert", minilora.load(CASES["bert"].build(), path)))


@pytest.mark.peft
def test_peft_loads_what_was_converted(file: Path, tmp_path: Path, run: Run) -> None:
    peft = pytest.importorskip("peft")
    run("convert", file, tmp_path / "peft", "--to", "peft")
    theirs = peft.PeftModel.from_pretrained(CASES["bert"].build(), tmp_path / "peft")
    expected = logits("bert", minilora.load(CASES["bert"].build(), file))
    torch.testing.assert_close(logits("bert", theirs), expected, rtol=0, atol=2e-5)


def test_convert_refuses(file: Path, tmp_path: Path, run: Run) -> None:
    assert "format already" in run("convert", file, tmp_path / "b", "--to", "minilora").err
    assert "exists already" in run("convert", file, tmp_path, "--to", "peft").err
    model = minilora.inject(CASES["mlp"].build(), ["up"], AdapterConfig(bottleneck=2))
    minilora.save(model, tmp_path / "bottleneck.safetensors")
    result = run("convert", tmp_path / "bottleneck.safetensors", tmp_path / "c", "--to", "peft")
    assert result.code == 2
    assert "PEFT has no bottleneck adapters" in result.err
    assert not (tmp_path / "c").exists()


def test_diff(file: Path, tmp_path: Path, run: Run) -> None:
    model = trained()
    one = injected_modules(model)["bert.encoder.layer.0.attention.self.query"][0]
    with torch.no_grad():
        one.lora_B.mul_(1.5)
    minilora.save(model, tmp_path / "b.safetensors")
    result = run("diff", file, tmp_path / "b.safetensors")
    assert result.code == 1
    assert result.out == (
        "bert.encoder.layer.0.attention.self.query (lora): other values, 50 % of the first's size apart\n"
    )
    other = minilora.inject(CASES["bert"].build(), ["query", "key"], LoRAConfig(r=4), trainable=())
    other.bert.encoder.layer[0].attention.self.query.base.weight.data.add_(1)
    minilora.save(other, tmp_path / "c.safetensors")
    out = run("diff", file, tmp_path / "c.safetensors").out
    assert "'bert.encoder.layer.*.attention.self.key' (x2): lora in the second alone" in out
    assert "'classifier': trainable in the first alone" in out
    assert "'bert.encoder.layer.*.attention.self.query' (x2): r 2 -> 4, alpha 3 -> 16" in out
    assert "trained on different bases" in out


# fuse


FUSED = {
    "bert": (("query", "value", "output.dense"), ("classifier",)),
    "gpt2": (("c_attn", "c_fc", "attn.c_proj"), ()),
    "t5": (("q", "v", "wo"), ()),
    "vit": (("fc1", "fc2"), ("classifier",)),
    "llama": (("q_proj", "v_proj", "down_proj", "lm_head"), ()),
}


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_files_compute_what_the_merged_model_does(
    name: str, sharded: bool, tmp_path: Path, run: Run
) -> None:
    targets, trainable = FUSED[name]
    CASES[name].build().save_pretrained(tmp_path / "base", max_shard_size="8KB" if sharded else "1GB")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists() == sharded
    model = trained(name, trainable, targets)
    minilora.save(model, tmp_path / "a.safetensors")
    result = run(
        "fuse",
        "--base",
        tmp_path / "base",
        "--adapter",
        tmp_path / "a.safetensors",
        "--out",
        tmp_path / "out",
    )
    assert result.code == 0, result.err
    assert "the same base" in result.err
    assert torch.equal(logits(name, loaded(name, tmp_path / "out")), logits(name, minilora.merge(model)))
    before, after = (_described(tmp_path / folder) for folder in ("base", "out"))
    assert before == after
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def _described(folder: Path) -> Any:
    base = base_files.BaseFiles.open(folder)
    index = {key: value for key, value in (base.index or {}).items() if key != "metadata"}
    sizes = (base.index or {}).get("metadata", {}).get("total_size")
    return dict(base.tensors), index, sizes, base.config


def test_weights_under_other_names_are_known_by_their_values(run: Run, tmp_path: Path) -> None:
    """transformers saves a ViT under the names of its first version."""
    CASES["vit"].build().save_pretrained(tmp_path / "base")
    stored = base_files.BaseFiles.open(tmp_path / "base").tensors
    model = trained("vit", ["classifier"], ["fc1"])
    assert not any(f"{site}.weight" in stored for site in injected_modules(model) if "fc1" in site)
    minilora.save(model, tmp_path / "a.safetensors")
    assert run("verify", tmp_path / "a.safetensors", "--base", tmp_path / "base").code == 0
    tensors = safetensors.torch.load_file(tmp_path / "base" / "model.safetensors")
    copies = {f"again.{name}": tensor.clone() for name, tensor in tensors.items()}
    (tmp_path / "twice").mkdir()
    safetensors.torch.save_file({**tensors, **copies}, tmp_path / "twice" / "model.safetensors")
    result = run("verify", tmp_path / "a.safetensors", "--base", tmp_path / "twice")
    assert result.code == 1
    assert "the base has no weight of that name" in result.out
    inner = trained("vit", ["layernorm"], ["fc1"])
    minilora.save(inner, tmp_path / "b.safetensors")
    stored_names = {name.split(".", 1)[1] for name in stored}
    assert ("layernorm.weight" in stored_names) == (
        run("verify", tmp_path / "b.safetensors", "--base", tmp_path / "base").code == 0
    )


@pytest.mark.peft
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_peft_folder_is_fused_as_peft_would(name: str, tmp_path: Path, run: Run) -> None:
    peft = pytest.importorskip("peft")
    CASES[name].build().save_pretrained(tmp_path / "base")
    fields = (
        {"target_modules": ["query"]}
        if name == "bert"
        else {"target_modules": ["c_proj"], "fan_in_fan_out": True}
    )
    theirs = peft.get_peft_model(CASES[name].build(), peft.LoraConfig(r=4, init_lora_weights=False, **fields))
    theirs.save_pretrained(tmp_path / "peft")
    result = run(
        "fuse", "--base", tmp_path / "base", "--adapter", tmp_path / "peft", "--out", tmp_path / "out"
    )
    assert result.code == 0, result.err
    found = logits(name, loaded(name, tmp_path / "out"))
    torch.testing.assert_close(found, logits(name, theirs.merge_and_unload()), rtol=0, atol=1e-5)


def test_fuse_into_another_dtype(file: Path, base: Path, run: Run, tmp_path: Path) -> None:
    CASES["bert"].build().save_pretrained(base, max_shard_size="8KB")
    (base / "model.safetensors").unlink(missing_ok=True)
    result = run("fuse", "--base", base, "--adapter", file, "--out", tmp_path / "out", "--dtype", "bfloat16")
    assert result.code == 0, result.err
    index = base_files.BaseFiles.open(tmp_path / "out").index
    assert index["metadata"]["total_size"] == sum(
        2 * torch.Size(described.shape).numel()
        for described in base_files.BaseFiles.open(tmp_path / "out").tensors.values()
    )
    model = loaded("bert", tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = minilora.fuse(minilora.load(CASES["bert"].build(), file), dtype=torch.bfloat16)
    assert torch.equal(logits("bert", model), logits("bert", expected))


def test_other_files_are_carried_along_but_no_other_weights(
    file: Path, base: Path, run: Run, tmp_path: Path
) -> None:
    (base / "tokenizer.json").write_text("{}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("[]")
    (base / "pytorch_model.bin").write_bytes(b"old")
    result = run("fuse", "--base", base, "--adapter", file, "--out", tmp_path / "out")
    assert result.code == 0
    assert "not carried along, being the unfused weights in other forms: 'pytorch_model.bin'" in result.err
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert found == {"config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"}


def test_a_base_saved_from_the_bare_model(run: Run, tmp_path: Path) -> None:
    """Its names lack the prefix `bert.`; transformers adds it, and so does fuse."""
    CASES["bert"].build().bert.save_pretrained(tmp_path / "base")
    model = trained("bert", (), ["query"])
    minilora.save(model, tmp_path / "a.safetensors")
    result = run(
        "fuse",
        "--base",
        tmp_path / "base",
        "--adapter",
        tmp_path / "a.safetensors",
        "--out",
        tmp_path / "out",
    )
    assert result.code == 0, result.err
    fused = transformers.BertModel.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(8)[None]
    assert torch.equal(fused(ids).last_hidden_state, minilora.merge(model).bert(ids).last_hidden_state)
    minilora.save(trained(), tmp_path / "b.safetensors")
    result = run(
        "fuse", "--base", tmp_path / "base", "--adapter", tmp_path / "b.safetensors", "--out", tmp_path / "no"
    )
    assert result.code == 2
    assert "'classifier.weight' was trained in full and lies outside 'bert'" in result.err


def test_an_adapter_of_the_bare_model(base: Path, run: Run, tmp_path: Path) -> None:
    bare = minilora.inject(CASES["bert"].build().bert, ["query"], LoRAConfig(r=2), trainable=["pooler"])
    minilora.save(randomise(bare), tmp_path / "a.safetensors")
    result = run("fuse", "--base", base, "--adapter", tmp_path / "a.safetensors", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    ids = torch.arange(8)[None]
    fused = loaded("bert", tmp_path / "out").bert.eval()
    assert torch.equal(fused(ids).pooler_output, minilora.merge(bare)(ids).pooler_output)


def test_a_head_that_the_base_does_not_have(run: Run, tmp_path: Path) -> None:
    stored = {k: v for k, v in CASES["bert"].build().state_dict().items() if "classifier" not in k}
    (tmp_path / "base").mkdir()
    safetensors.torch.save_file(stored, tmp_path / "base" / "model.safetensors")
    CASES["bert"].build().config.save_pretrained(tmp_path / "base")
    minilora.save(trained(), tmp_path / "a.safetensors")
    result = run(
        "fuse",
        "--base",
        tmp_path / "base",
        "--adapter",
        tmp_path / "a.safetensors",
        "--out",
        tmp_path / "out",
    )
    assert result.code == 0, result.err
    assert "new in this checkpoint: 'classifier.bias', 'classifier.weight'" in result.err
    assert torch.equal(logits("bert", loaded("bert", tmp_path / "out")), logits("bert", trained()))


def test_tied_weights_are_refused(run: Run, tmp_path: Path) -> None:
    model = CASES["gpt2"].build()
    model.save_pretrained(tmp_path / "base")  # one of the two names only
    minilora.save(trained("gpt2", (), ["lm_head"]), tmp_path / "a.safetensors")
    arguments = ("--adapter", tmp_path / "a.safetensors", "--out", tmp_path / "out")
    result = run("fuse", "--base", tmp_path / "base", *arguments)
    assert result.code == 2
    assert "'lm_head': its weight is tied to 'transformer.wte.weight'" in result.err
    both = {key: value.clone() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(both, tmp_path / "base" / "model.safetensors")
    result = run("fuse", "--base", tmp_path / "base", *arguments)
    assert result.code == 2
    assert "'lm_head': its weight is tied to 'transformer.wte.weight'" in result.err
    head_only = {key: value for key, value in both.items() if "wte" not in key}
    safetensors.torch.save_file(head_only, tmp_path / "base" / "model.safetensors")
    result = run("fuse", "--base", tmp_path / "base", *arguments)
    assert result.code == 2
    assert "tied to the embedding" in result.err
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused_unless_told(file: Path, run: Run, tmp_path: Path) -> None:
    other = CASES["bert"].build()
    other.bert.encoder.layer[0].output.dense.weight.data.add_(0.1)
    other.save_pretrained(tmp_path / "base")
    arguments = ("fuse", "--base", tmp_path / "base", "--adapter", file, "--out", tmp_path / "out")
    result = run(*arguments)
    assert result.code == 2
    assert "not the base that the adapter was trained on" in result.err
    assert not (tmp_path / "out").exists()
    assert run(*arguments, "--no-check-base").code == 0


def test_what_cannot_be_fused(base: Path, file: Path, run: Run, tmp_path: Path) -> None:
    model = minilora.inject(
        CASES["bert"].build(), ["output.dense"], AdapterConfig(bottleneck=2), trainable=()
    )
    minilora.save(model, tmp_path / "b.safetensors")
    result = run("fuse", "--base", base, "--adapter", tmp_path / "b.safetensors", "--out", tmp_path / "out")
    assert "a bottleneck adapter is not linear" in result.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    assert "exists already" in run("fuse", "--base", base, "--adapter", file, "--out", tmp_path / "full").err
    assert (
        "has neither"
        in run("fuse", "--base", tmp_path / "full", "--adapter", file, "--out", tmp_path / "out").err
    )
    quantised = {
        key: value.to(torch.int8) if "query.weight" in key else value.clone()
        for key, value in CASES["bert"].build().state_dict().items()
    }
    safetensors.torch.save_file(quantised, base / "model.safetensors")
    assert "is I8, quantised" in run("fuse", "--base", base, "--adapter", file, "--out", tmp_path / "out").err
    assert not (tmp_path / "out").exists()


def test_an_index_that_lies(file: Path, run: Run, tmp_path: Path) -> None:
    CASES["bert"].build().save_pretrained(tmp_path / "base", max_shard_size="8KB")
    index = tmp_path / "base" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    arguments = ("fuse", "--base", tmp_path / "base", "--adapter", file, "--out", tmp_path / "out")
    for weight_map, says in (
        ({**good["weight_map"], "classifier.bias": "../../a.safetensors"}, "files elsewhere"),
        (
            {k: v for k, v in good["weight_map"].items() if k != "classifier.bias"},
            "disagree on 'classifier.bias'",
        ),
        ([], "no weight_map"),
    ):
        index.write_text(json.dumps({**good, "weight_map": weight_map}))
        result = run(*arguments)
        assert result.code == 2
        assert says in result.err


@pytest.mark.parametrize("dies", ["in the first shard", "while files are carried along"])
def test_an_interruption_leaves_nothing(
    dies: str, file: Path, base: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    if dies == "in the first shard":
        monkeypatch.setattr(fuse_files, "effective_weight", interrupted)
    else:
        monkeypatch.setattr(shutil, "copyfile", interrupted)
    result = run("fuse", "--base", base, "--adapter", file, "--out", tmp_path / "out")
    assert result.code == 130
    assert "nothing has been written" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "base"]


def test_one_tensor_in_memory_at_a_time(
    file: Path, base: Path, run: Run, tmp_path: Path, monkeypatch: Any
) -> None:
    """What was read of the base is let go before the next is read, so no shard need fit in memory."""
    import weakref

    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0
    read = base_files.BaseFiles.tensor

    def counted(self: Any, name: str) -> Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(base_files.BaseFiles, "tensor", counted)
    assert run("fuse", "--base", base, "--adapter", file, "--out", tmp_path / "out").code == 0
    assert 1 <= most <= 2


def test_in_a_process_of_its_own_without_transformers(file: Path, base: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['transformers'] = None; from minilora.cli import main; "
        f"sys.exit(main(['fuse', '--base', {str(base)!r}, '--adapter', {str(file)!r}, "
        f"'--out', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "[1/1] model.safetensors" in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "minilora", "diff", file, file], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "the same\n")


def test_usage(run: Run) -> None:
    for arguments in ([], ["fuse"], ["unknown"], ["convert", "a", "b", "--to", "pickle"]):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
