"""save, load, adapter_state_dict: one file, the same bits, checked whole before anything changes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from checks import injected_modules, picture, randomise, raw, state, unchanged
from models import CASES, MLP, Shared, Tied, in_dtypes, on_grid
from torch import nn

import minilora
from minilora import AdapterConfig, CheckpointError, LoRAConfig, MiniLoRAError
from minilora.files.tensors import TensorFile

TESTS = Path(__file__).parent


def mlp() -> nn.Module:
    """Return the bare model that all files of this module belong to."""
    return CASES["mlp"].build()


def trained(model=None, seed=0):
    model = minilora.inject(model or mlp(), ["up", "down"], LoRAConfig(r=4, alpha=3), trainable="classifier")
    minilora.inject(model, "down", AdapterConfig(bottleneck=2, activation="relu"))
    return randomise(model, seed)


def lora_alone(seed=0):
    return randomise(minilora.inject(mlp(), ["up", "down"], LoRAConfig(r=4), trainable="classifier"), seed)


@pytest.fixture
def file(tmp_path):
    minilora.save(trained(), tmp_path / "good.safetensors")
    return tmp_path / "good.safetensors"


def contents(file):
    with safetensors.safe_open(file, "pt") as opened:
        return opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


KEYS = {
    "up.lora_A": (4, 16),
    "up.lora_B": (32, 4),
    "down.lora_A": (4, 32),
    "down.lora_B": (16, 4),
    "down.adapter_down.weight": (2, 16),
    "down.adapter_down.bias": (2,),
    "down.adapter_up.weight": (16, 2),
    "down.adapter_up.bias": (16,),
    "classifier.weight": (3, 16),
    "classifier.bias": (3,),
}


def test_the_file_holds_what_was_trained_and_its_configuration(file):
    header, tensors = contents(file)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == KEYS
    manifest = json.loads(header["minilora"])
    assert manifest["format_version"] == 1
    assert [(i["kind"], i["sites"]) for i in manifest["injections"]] == [
        ("lora", ["up", "down"]),
        ("adapter", ["down"]),
    ]
    assert LoRAConfig.from_dict(manifest["injections"][0]["config"]) == LoRAConfig(r=4, alpha=3)
    assert manifest["trainable"] == ["classifier"]
    assert len(file.read_bytes()) < 10_000  # and nothing of the base


def test_adapter_state_dict_shares_memory_and_has_the_files_names(file):
    model = trained()
    live = minilora.adapter_state_dict(model)
    _, stored = contents(file)
    assert {key: raw(tensor) for key, tensor in live.items()} == {key: raw(t) for key, t in stored.items()}
    assert not any(tensor.requires_grad for tensor in live.values())
    live["up.lora_A"].zero_()
    assert not model.up.lora_A.any()


@on_grid
@in_dtypes
def test_the_same_bits_come_back(case, dtype, tmp_path):
    head = [name for name in ("classifier",) if hasattr(case.build(), name)]
    model = case.build(dtype)
    minilora.inject(model, case.targets, LoRAConfig(r=3, rslora=True), trainable=head)
    if case.targets[-1] != "out_proj":
        minilora.inject(model, case.targets[-1], AdapterConfig(bottleneck=2, dtype=dtype), trainable=())
    randomise(model)
    minilora.save(model, tmp_path / "a.safetensors")
    fresh = case.build(dtype)
    assert minilora.load(fresh, tmp_path / "a.safetensors") is fresh
    assert state(fresh) == state(model)
    assert raw(case.run(fresh)) == raw(case.run(model))
    assert [n for n, p in fresh.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    assert all(module.training is False for module in fresh.modules())


def test_the_same_bits_come_back_in_a_fresh_process(tmp_path):
    names = ["mlp", "encoder", "tied"]
    expected = {}
    for name in names:
        model = CASES[name].build()
        head = "classifier" if hasattr(model, "classifier") else ()
        randomise(minilora.inject(model, CASES[name].targets, trainable=head))
        minilora.save(model, tmp_path / f"{name}.safetensors")
        expected[name] = CASES[name].run(model)
    program = """
import sys, safetensors.torch, minilora
from models import CASES
outputs = {}
for name in sys.argv[2:]:
    model = minilora.load(CASES[name].build(), f"{sys.argv[1]}/{name}.safetensors")
    outputs[name] = CASES[name].run(model)
safetensors.torch.save_file(outputs, f"{sys.argv[1]}/outputs.safetensors")
"""
    run(program, str(tmp_path), *names)
    outputs = safetensors.torch.load_file(tmp_path / "outputs.safetensors")
    assert {name: raw(out) for name, out in outputs.items()} == {n: raw(out) for n, out in expected.items()}


def run(program, *arguments):
    """Run a program in a fresh process that finds this minilora and the models of the tests."""
    root = Path(minilora.__file__).parents[1]  # which `python -c` searches first
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-c", program, *arguments]
    subprocess.run(command, cwd=root, env=environment, check=True, timeout=120)


def test_merged_or_disabled_the_same_bytes_are_written(file, tmp_path):
    expected, model = file.read_bytes(), trained()
    other = tmp_path / "other.safetensors"
    for _ in range(2):
        minilora.save(model, other)
        assert contents(other)[1].keys() == KEYS.keys()
        assert other.read_bytes() == expected
    minilora.merge(model, skip_adapters=True)
    with unchanged(model):
        minilora.save(model, other)
    assert other.read_bytes() == expected
    with minilora.disabled(model):
        minilora.save(model, other)
    assert other.read_bytes() == expected


def test_load_into_a_model_that_carries_the_same_injections(file):
    model = trained(seed=1)
    before = {site: list(wrappers) for site, wrappers in injected_modules(model).items()}
    parameters = list(map(id, minilora.trainable_parameters(model)))
    minilora.load(model, file)
    assert state(model) == state(trained())
    assert injected_modules(model) == before
    assert list(map(id, minilora.trainable_parameters(model))) == parameters  # an optimizer's stay valid


def test_loaded_while_disabled_the_new_values_are_there_afterwards(file):
    model = minilora.merge(trained(seed=1), skip_adapters=True)
    with minilora.disabled(model):
        minilora.load(model, file)
    expected = minilora.merge(trained(), skip_adapters=True)
    assert raw(model.up.base.weight) == raw(expected.up.base.weight)


def load_changes_nothing(model, file, says):
    with unchanged(model), pytest.raises(CheckpointError, match=f"(?s){says}") as caught:
        minilora.load(model, file)
    return str(caught.value)


def test_load_into_a_model_with_other_injections(file):
    model = randomise(minilora.inject(mlp(), "up", LoRAConfig(r=2)))
    message = load_changes_nothing(model, file, r"minilora\.eject\(model\)")
    for says in (
        "'up': injected with another configuration",
        "'classifier', 'down' (x2): in the file, but not",
    ):
        assert says in message
    other = randomise(minilora.inject(mlp(), "classifier", LoRAConfig(r=2)))
    assert "'classifier': injected in the model, but not in the file" in load_changes_nothing(
        other, file, "eject"
    )


def test_load_into_a_merged_model(file):
    model = minilora.merge(trained(seed=1), skip_adapters=True)
    load_changes_nothing(model, file, r"'up', 'down': merged; call minilora\.unmerge\(model\), then load")


def test_load_is_not_for_meta_or_wrapped_models(file):
    on_meta = mlp().to("meta")
    with pytest.raises(CheckpointError, match="the model is on the meta device: give it its weights first"):
        minilora.load(on_meta, file)
    assert type(on_meta.up) is nn.Linear
    wrapped = nn.DataParallel(mlp())
    with unchanged(wrapped), pytest.raises(MiniLoRAError, match=r"`parallel\.module`"):
        minilora.load(wrapped, file)


def test_the_base_may_be_in_another_dtype_but_nothing_trained_loses_precision_unasked(file, tmp_path):
    load_changes_nothing(
        mlp().bfloat16(),
        file,
        "'classifier.weight', 'classifier.bias': torch.float32, which torch.bfloat16 cannot",
    )
    model = randomise(minilora.inject(mlp(), "up"))
    minilora.save(model, tmp_path / "a.safetensors")
    loaded = minilora.load(mlp().bfloat16(), tmp_path / "a.safetensors")
    assert raw(loaded.up.lora_A) == raw(model.up.lora_A)
    assert loaded.up.base.weight.dtype == torch.bfloat16


# What is done to a good file, as (tensors, manifest) -> None, and what the message must say of it.
def drop(key):
    return lambda tensors, manifest: tensors.pop(key)


def put(key, value):
    return lambda tensors, manifest: tensors.update({key: value})


def fill(key, value):
    return lambda tensors, manifest: tensors[key].view(-1)[1].fill_(value)


def say(**entries):
    return lambda tensors, manifest: manifest.update(entries)


def site(number, *names):
    return lambda tensors, manifest: manifest["injections"][number].update(sites=list(names))


def field(**values):
    return lambda tensors, manifest: manifest["injections"][0]["config"].update(values)


ALTERED = {
    "wrong shape": (
        put("up.lora_A", torch.ones(4, 15)),
        r"'up.lora_A': shape \(4, 15\), the model needs \(4, 16\)",
    ),
    "wrong rank": (put("up.lora_A", torch.ones(3, 16)), r"'up.lora_A': shape \(3, 16\)"),
    "missing key": (drop("down.lora_B"), "missing from the file: 'down.lora_B'"),
    "missing head": (drop("classifier.bias"), "missing from the file: 'classifier.bias'"),
    "extra key": (put("up.lora_C", torch.ones(1)), "called for by nothing: 'up.lora_C'"),
    "NaN": (fill("up.lora_B", torch.nan), "'up.lora_B': not finite"),
    "infinity": (fill("classifier.weight", torch.inf), "'classifier.weight': not finite"),
    "wider dtype": (put("up.lora_A", torch.ones(4, 16).double()), "float64, which torch.float32 cannot hold"),
    "integers": (put("up.lora_A", torch.ones(4, 16).long()), "int64, which torch.float32 cannot hold"),
    "newer format": (
        say(format_version=2),
        "format version 2 and this minilora reads version 1: upgrade minilora",
    ),
    "no format version": (say(format_version=None), "no format_version"),
    "unknown entry": (say(extras={}), "which is not this format"),
    "injections no list": (say(injections=3), "injections are not a list"),
    "no sites": (say(injections=[{"kind": "lora", "config": {}}]), "not made of kind, config and sites"),
    "unknown kind": (say(injections=[{"kind": "dora", "config": {}, "sites": []}]), "unknown kind 'dora'"),
    "kind no string": (say(injections=[{"kind": ["x"], "config": {}, "sites": []}]), "unknown kind"),
    "sites no names": (site(0, 3), "no list of names"),
    "trainable no list": (say(trainable="classifier"), "no list of names"),
    "unknown field": (
        field(vera=True),
        "(?s)config in the header is not valid: .*LoRAConfig has no argument 'vera'",
    ),
    "bad field": (field(r=0), "r must be an int from 1 to"),
    "huge number": (field(alpha=10**400), "alpha must be a finite number"),
    "another rank": (field(r=5), r"'up.lora_A': shape \(4, 16\), the model needs \(5, 16\)"),
    "unknown site": (
        site(0, "upp", "down"),
        "'upp': the model has no such module or parameter; nearest: 'up'",
    ),
    "site listed twice": (site(0, "up", "down", "up"), "'up': listed twice for lora"),
    "head listed twice": (
        say(trainable=["classifier", "classifier"]),
        r"'classifier': listed twice to be trained",
    ),
    "unknown head": (say(trainable=["head"]), "'head': .*no such module"),
    "head that is a site": (say(trainable=["classifier", "up"]), "'up': trainable names what is"),
}


def altered(file, change):
    header, tensors = contents(file)
    manifest = json.loads(header["minilora"])
    change(tensors, manifest)
    header["minilora"] = json.dumps(manifest)
    bad = file.with_name("bad.safetensors")
    safetensors.torch.save_file(tensors, bad, header)
    return bad


@pytest.mark.parametrize("how", ALTERED)
def test_an_altered_file_is_refused_and_the_model_is_as_it_was(file, how):
    change, says = ALTERED[how]
    bad = altered(file, change)
    assert "bad.safetensors" in load_changes_nothing(mlp(), bad, says)
    # A model that is injected already is compared with the file first, which may be said in other words.
    if "listed twice" not in how:  # here the list is only compared, and twice the same is the same
        load_changes_nothing(trained(seed=1), bad, "")


def test_every_problem_of_a_file_comes_at_once(file):
    def spoil(tensors, manifest):
        for how in ("wrong shape", "missing key", "extra key", "infinity"):
            ALTERED[how][0](tensors, manifest)

    message = load_changes_nothing(mlp(), altered(file, spoil), "4 problems; .* has not been changed")
    for how in ("missing key", "extra key", "infinity"):
        assert ALTERED[how][1] in message


def test_a_file_without_our_header_is_refused(file):
    for header in (None, {"format": "pt"}):
        safetensors.torch.save_file(contents(file)[1], file, header)
        load_changes_nothing(mlp(), file, "is no minilora file: its header has no 'minilora' entry")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"format_version": ' + "1" * 5000 + "}", "nul", ""])
def test_a_header_that_is_no_json_is_refused(file, text):
    safetensors.torch.save_file(contents(file)[1], file, {"minilora": text})
    load_changes_nothing(mlp(), file, "not valid JSON|sound")


@pytest.mark.parametrize("text", ["null", "[]", "3", '"minilora"', "{}"])
def test_a_header_that_is_other_json_is_refused(file, text):
    safetensors.torch.save_file(contents(file)[1], file, {"minilora": text})
    load_changes_nothing(mlp(), file, "no format_version")


def test_a_file_cut_anywhere_is_refused(file):
    whole = file.read_bytes()
    model = mlp()
    before = picture(model)
    for length in [*range(0, 16), *range(16, len(whole), 97), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="not a sound safetensors file, or was cut or altered"):
            minilora.load(model, file)
    for noise in (b"\x80\x02}q\x00.", os.urandom(1000), whole + b"x", b"\xff" * 8 + whole[8:]):
        file.write_bytes(noise)
        with pytest.raises(CheckpointError, match="not a sound safetensors file"):
            minilora.load(model, file)
    assert picture(model) == before


def test_a_missing_file_is_an_os_error(tmp_path):
    model = mlp()
    with unchanged(model), pytest.raises(FileNotFoundError, match="absent"):
        minilora.load(model, tmp_path / "absent.safetensors")


def test_a_failure_while_values_are_given_changes_nothing(file, monkeypatch):
    """The last moment that something can go wrong: values on their way to a device."""
    real, calls = torch.Tensor.to, []

    def out_of_memory(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError
        return real(self, *args, **kwargs)

    for model in (mlp(), trained(seed=1)):
        with unchanged(model), monkeypatch.context() as patch:
            calls.clear()
            patch.setattr(torch.Tensor, "to", out_of_memory)
            with pytest.raises(MemoryError):
                minilora.load(model, file)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda model: model.up.lora_B.data.fill_(torch.nan), "'up.lora_B': not finite"),
        (
            lambda model: model.classifier.trained.bias.data.fill_(torch.inf),
            "'classifier.bias': not finite",
        ),
        (lambda model: model.to("meta"), "'up.lora_A', .*: on the meta device, without values"),
    ],
)
def test_what_should_not_be_saved_is_not_and_the_old_file_stays(file, spoil, says):
    expected, model = file.read_bytes(), trained()
    spoil(model)
    with pytest.raises(CheckpointError, match=says) as caught:
        minilora.save(model, file)
    assert "nothing has been written" in str(caught.value)
    assert file.read_bytes() == expected
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(file, monkeypatch, function):
    expected = file.read_bytes()

    def disk_full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, disk_full)
    with pytest.raises(OSError, match="No space left"):
        minilora.save(trained(seed=1), file)
    assert file.read_bytes() == expected
    assert os.listdir(file.parent) == [file.name]


def test_no_folder_or_a_folder_is_an_os_error_that_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder '.*absent'; make it first: '.*absent/a'"):
        minilora.save(trained(), tmp_path / "absent" / "a")
    with pytest.raises(FileNotFoundError, match=r"no folder '.*absent'; make it first: '.*absent/a'"):
        minilora.save(lora_alone(), tmp_path / "absent" / "a", format="peft")
    with pytest.raises(IsADirectoryError, match=r"it is a folder; name a file in it: '.*'"):
        minilora.save(trained(), tmp_path)
    assert os.listdir(tmp_path) == []


KILLED = """
import builtins, os, signal, sys
import minilora
from test_checkpoint import trained

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()

class Dying:
    "A file that takes half of what it is given, and then the process is gone."
    def __init__(self, file):
        self.file = file
    def __enter__(self):
        return self
    def __exit__(self, *args):
        die()
    def write(self, content):
        content = bytes(content)
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        die()

real_open = builtins.open
def dying_open(path, mode="r", *args, **kwargs):
    file = real_open(path, mode, *args, **kwargs)
    return Dying(file) if "x" in mode or "w" in mode else file

model = trained(seed=1)
for point in ("write", "fsync", "replace"):
    child = os.fork()
    if child == 0:
        if point == "write":
            builtins.open = dying_open
        else:
            setattr(os, point, die)
        minilora.save(model, sys.argv[1])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, point
    assert real_open(sys.argv[1], "rb").read() == real_open(sys.argv[2], "rb").read(), point
    print(point)
minilora.save(model, sys.argv[1])  # left alone, the same call does replace the file
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_save_killed_in_the_middle_leaves_the_old_file(file, tmp_path):
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    run(KILLED, str(file), str(copy))
    assert state(minilora.load(mlp(), file)) == state(trained(seed=1))
    assert state(minilora.load(mlp(), copy)) == state(trained())


def test_a_shared_layer_is_saved_once_and_a_file_that_names_it_twice_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    minilora.save(randomise(minilora.inject(CASES["shared"].build(), "again")), file)
    assert set(contents(file)[1]) == {"first.lora_A", "first.lora_B"}
    fresh = minilora.load(CASES["shared"].build(), file)
    assert fresh.first is fresh.again is fresh.stack[1]

    untied = Shared()
    untied.again = nn.Linear(16, 16)
    minilora.save(randomise(minilora.inject(untied, ["first", "again"])), file)
    model = Shared()
    load_changes_nothing(model, file, "'again': the model has this module first as 'first'")


def test_a_tied_head_is_saved_without_its_base(tmp_path):
    model = randomise(minilora.inject(CASES["tied"].build(), "head"))
    minilora.save(minilora.merge(model), tmp_path / "a.safetensors")
    fresh = minilora.load(CASES["tied"].build(), tmp_path / "a.safetensors")
    assert fresh.head.base.weight is fresh.embedding.weight
    assert isinstance(fresh, Tied)


class TiedHead(nn.Module):
    """A head in which two layers use one weight."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.head = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        self.head[1].weight = self.head[0].weight


def test_a_tie_inside_a_trained_head_survives(tmp_path):
    model = randomise(minilora.inject(TiedHead(), "body", trainable="head"))
    minilora.save(model, tmp_path / "a.safetensors")
    base = TiedHead()
    base.body.load_state_dict(model.body.base.state_dict())
    head = minilora.load(base, tmp_path / "a.safetensors").head.trained
    assert head[0].weight is head[1].weight
    assert raw(head[0].weight) == raw(model.head.trained[0].weight)


def test_no_code_in_a_file_is_run(tmp_path):
    """A pickle under our name is refused unread."""

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"up.lora_A": Payload()}, tmp_path / "a.safetensors")
    load_changes_nothing(mlp(), tmp_path / "a.safetensors", "not a sound safetensors file")
    assert not (tmp_path / "ran").exists()


def test_paths_may_be_strings(tmp_path):
    minilora.save(trained(), str(tmp_path / "a.safetensors"))
    minilora.load(mlp(), str(tmp_path / "a.safetensors"))


def test_a_model_that_was_loaded_can_be_saved_again_with_the_same_bytes(file, tmp_path):
    minilora.save(minilora.load(mlp(), file), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_another_base_is_refused_unless_told_otherwise(file):
    torch.manual_seed(1)
    model = MLP()
    load_changes_nothing(model, file, r"not the base that the adapter was trained on.*check_base=False")
    minilora.load(model, file, check_base=False)
    assert raw(model.up.lora_A) == raw(trained().up.lora_A)


# What a new user meets


def test_what_trains_and_is_not_saved_is_told(file):
    model = trained()
    model.up.base.bias.requires_grad_(True)
    model.extra = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match=r"trained, but not saved, since no injection brought it") as told:
        minilora.save(model, file)
    text = str(told[0].message)
    assert "'up.base.bias', 'extra.*.weight', 'extra.*.bias'" in text.replace("extra.0", "extra.*")
    assert "minilora.inject(model, [], trainable=['up.bias', 'extra.0'])" in text
    assert "minilora.freeze(model)" in text
    assert told[0].filename == __file__
    minilora.freeze(model)
    minilora.save(model, file)  # without a warning, which would be an error here


def test_the_warnings_advice_for_a_head_assigned_after_injecting_can_be_followed(file, tmp_path):
    model = lora_alone()
    model.classifier, model.up.base.bias.requires_grad = nn.Linear(16, 5), True
    with pytest.warns(UserWarning, match="trained, but not saved") as told:
        minilora.save(model, tmp_path / "a")
    advice = re.search(r"minilora\.inject\(.*\]\)", str(told[0].message))[0]
    assert advice == "minilora.inject(model, [], trainable=['up.bias', 'classifier'])"
    lora, head = raw(model.up.lora_B), raw(model.classifier.weight)
    eval(advice, {"minilora": minilora, "model": model, "re": re})
    minilora.save(model, tmp_path / "a")  # without a warning, which would be an error here
    assert (raw(model.up.lora_B), raw(model.classifier.trained.weight)) == (lora, head)
    base = mlp()
    base.classifier = nn.Linear(16, 5)
    loaded = minilora.load(base, tmp_path / "a")
    assert (raw(loaded.up.lora_B), raw(loaded.classifier.trained.weight)) == (lora, head)


def test_the_warnings_advice_names_nothing_that_would_be_refused_or_be_more(file, tmp_path):
    model = lora_alone()
    model.up.base.weight.requires_grad = True
    with pytest.warns(UserWarning, match=r"Leave it to LoRA alone, or freeze it: minilora\.freeze\(model\)$"):
        minilora.save(model, tmp_path / "a")
    minilora.freeze(model)
    model.head = nn.Linear(2, 2)
    model.inner = nn.ModuleDict({"head": nn.Linear(2, 2).requires_grad_(False)})
    with pytest.warns(UserWarning, match=r"trainable=\[re\.compile\('head'\)\]"):
        minilora.save(model, tmp_path / "a")


def test_layers_that_fit_badly_in_the_same_way_are_one_line(tmp_path):
    def stack(width):
        return nn.Sequential(*(nn.ModuleDict({"query": nn.Linear(width, width)}) for _ in range(12)))

    minilora.save(minilora.inject(stack(4), "query", LoRAConfig(r=2)), tmp_path / "a")
    message = load_changes_nothing(stack(6), tmp_path / "a", "2 problems")
    assert message.splitlines()[1:] == [
        "  - '*.query.lora_A' (x12): shape (2, 4), the model needs (2, 6)",
        "  - '*.query.lora_B' (x12): shape (4, 2), the model needs (6, 2)",
    ]


def test_the_default_device_does_not_matter(file, tmp_path):
    expected, model, fresh, third = file.read_bytes(), trained(), mlp(), lora_alone()
    with torch.device("meta"):
        minilora.save(model, tmp_path / "again")
        minilora.load(fresh, file)
        minilora.save(third, tmp_path / "peft", format="peft")
        minilora.load(minilora.eject(model), tmp_path / "peft")
    assert (tmp_path / "again").read_bytes() == expected
    assert state(fresh) == state(trained())
    assert state(model) == state(third)


@pytest.mark.parametrize("format", ["minilora", "peft"])
def test_saving_and_loading_pin_no_storage(format, tmp_path):
    """FSDP resizes the storage of what it shards, which numpy's view of a tensor forbids for ever."""
    model = lora_alone()
    minilora.save(model, tmp_path / "a", format=format)
    again = minilora.load(mlp(), tmp_path / "a")
    for each in (model, again):
        assert all(parameter.untyped_storage().resizable() for parameter in each.parameters())


class Filling(nn.Linear):
    """A layer that fills in what an old checkpoint lacks, as loaders in the wild do."""

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        state_dict.setdefault(prefix + "bias", torch.zeros(self.out_features))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def test_the_bases_own_loader_does_not_run(tmp_path):
    model = nn.Sequential(Filling(8, 8))
    bias = raw(model[0].bias)
    minilora.save(minilora.inject(model, "0", LoRAConfig(r=2)), tmp_path / "a")
    minilora.load(model, tmp_path / "a")
    assert raw(model[0].base.bias) == bias
    minilora.load(minilora.eject(model), tmp_path / "a")
    assert raw(model[0].base.bias) == bias


def test_a_load_beside_saves_finds_one_of_them(tmp_path):
    """Only whole files ever stand under the name; a load takes one of them, header and values."""
    for seed in (0, 1):
        minilora.save(trained(seed=seed), tmp_path / f"{seed}")
    real = TensorFile.get_tensor

    def replaced_before_values_are_read(self, name):
        if (tmp_path / "1").exists():
            os.replace(tmp_path / "1", tmp_path / "0")
        return real(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorFile, "get_tensor", replaced_before_values_are_read)
        assert state(minilora.load(mlp(), tmp_path / "0")) == state(trained(seed=0))
    assert state(minilora.load(mlp(), tmp_path / "0")) == state(trained(seed=1))


@pytest.mark.parametrize("name", ["adapter.safetensors", "peft"])
def test_files_of_version_0_1_0(name):
    fixtures = TESTS / "fixtures" / "0.1.0"
    model = mlp()
    model.load_state_dict(safetensors.torch.load_file(fixtures / "base.safetensors"))
    bare = CASES["mlp"].run(model)
    expected = safetensors.torch.load_file(fixtures / "expected.safetensors")[name]
    found = CASES["mlp"].run(minilora.load(model, fixtures / name))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - bare).abs().max() > 0.1
    assert [type(w).__name__ for w in injected_modules(model)["down"]] == (
        ["Adapter", "LoRALinear"] if name == "adapter.safetensors" else ["LoRALinear"]
    )
    assert model.up.scaling == 1.5
