"""Adapters come, go and are saved: in place, whole or not at all, and nothing is compiled again."""

import copy
import gc
import os

import pytest
import torch
from banks import SHAPES, injected, side_by_side
from checks import distance, interrupted, raw, state
from models import CASES, MLP
from test_bank import empty, filled, two
from torch import nn

import minilora
from minilora import Bank, CheckpointError, LoRAConfig, MiniLoRAError


def everything(bank):
    """Return all that an operation which fails must leave alone."""
    return state(bank.model), bank.names, [dict(place.configs) for place in bank._places.values()]


def identities(bank):
    """Return the modules and tensors of a model: what a compiled model looks at."""
    model = bank.model
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, id(module)) for name, module in model.named_modules()], [(n, id(t)) for n, t in tensors]


@pytest.fixture
def files(tmp_path):
    """Three adapters of one base, as files, and models that carry them alone."""
    alone = {name: injected(CASES["mlp"], name, torch.float32) for name in ("first", "narrow", "headless")}
    for name, model in alone.items():
        minilora.save(model, tmp_path / name)
    return tmp_path, alone


def served(bank, name):
    with bank.rows(name):
        return CASES["mlp"].run(bank.model)


def test_adapters_come_and_go_in_place(files):
    folder, alone = files
    bank = Bank(CASES["mlp"].build(), {"first": folder / "first"}, slots=3)
    before = identities(bank)
    bank.load("narrow", folder / "narrow")
    bank.load("headless", folder / "headless")
    assert [bank.slot(name) for name in bank.names] == [1, 2, 3]
    for name, model in alone.items():
        assert distance(served(bank, name), CASES["mlp"].run(model)) < 1e-6
    bank.remove("first")
    assert len(bank) == 2
    bank.load("again", folder / "first")
    assert bank.slot("again") == 1
    bank.replace("narrow", folder / "headless")  # of other sites: nothing of the old one remains
    for name, model in (("again", "first"), ("narrow", "headless"), ("headless", "headless")):
        assert distance(served(bank, name), CASES["mlp"].run(alone[model])) < 1e-6
    assert identities(bank) == before
    assert repr(bank) == "Bank(3 of 3 slots, r<=4: 'narrow', 'headless', 'again')"


def test_what_one_adapter_does_moves_no_other(files):
    folder, _ = files
    bank = Bank(CASES["mlp"].build(), {"first": folder / "first"}, slots=3)
    expected = raw(served(bank, "first"))
    bank.load("narrow", folder / "narrow")
    bank.add("new", LoRAConfig(r=2))
    bank.parameters("new")
    bank.replace("narrow", folder / "headless")
    bank.freeze("new")
    bank.remove("new")
    assert raw(served(bank, "first")) == expected


def test_an_empty_slot_holds_nothing(files):
    folder, _ = files
    bank = Bank(CASES["mlp"].build(), {"first": folder / "first"}, slots=1)
    bank.parameters("first")
    bank.remove("first")
    for name, tensor in bank.model.named_buffers():
        assert not tensor.any(), name
    assert not any(p.requires_grad for p in bank.model.parameters())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda bank, folder: bank.load("third", folder / "first"), "its 2 slots hold 'first', 'narrow'"),
        (lambda bank, folder: bank.add("third"), "the bank is full"),
        (lambda bank, folder: bank.load("narrow", folder / "first"), r"bank\.replace\(name, path\) puts"),
        (lambda bank, folder: bank.add("narrow"), r"bank\.replace\(name, path\) puts"),
        (lambda bank, folder: bank.replace("narow", folder / "first"), "'narow'; nearest: 'narrow'"),
        (lambda bank, folder: bank.remove("x"), "no adapter 'x'; it holds 'first', 'narrow'"),
        (lambda bank, folder: bank.save("x", folder / "x"), "no adapter 'x'"),
        (lambda bank, folder: bank.parameters(3), "no adapter 3"),
        (lambda bank, folder: bank.freeze(None), "no adapter None"),
        (lambda bank, folder: bank.replace("narrow", folder / "wide"), r"rank 9, .* for 4: Bank\(..., r=9\)"),
        (lambda bank, folder: bank.replace("narrow", folder / "double"), "cannot hold without loss"),
        (lambda bank, folder: bank.replace("narrow", folder / "elsewhere"), "'classifier': the bank"),
        (lambda bank, folder: bank.replace("narrow", folder / "base"), "not the base that"),
        (lambda bank, folder: bank.replace("narrow", folder / "half"), "not a sound safetensors file"),
        (lambda bank, folder: bank.replace("narrow", 3), "path must be a string"),
        (lambda bank, folder: bank.save("narrow", folder / "x", format="gguf"), "format must be one of"),
    ],
)  # fmt: skip
def test_what_fails_leaves_the_slot_as_it_was(files, act, message):
    folder, _ = files
    case = CASES["mlp"]
    adapters = {"first": folder / "first", "narrow": folder / "narrow"}
    bank = Bank(case.build(), adapters)
    for name, targets, config in (
        ("wide", ["up"], LoRAConfig(r=9)),
        ("double", ["up"], LoRAConfig(r=1, dtype="float64")),
        ("elsewhere", ["classifier"], LoRAConfig(r=1)),
    ):
        minilora.save(minilora.inject(case.build(), targets, config, trainable=()), folder / name)
    torch.manual_seed(1)
    minilora.save(minilora.inject(MLP(), "up", LoRAConfig(r=1), trainable=()), folder / "base")
    (folder / "half").write_bytes((folder / "first").read_bytes()[:-100])
    bank.parameters("narrow")
    before = everything(bank)
    with pytest.raises(MiniLoRAError, match=message):
        act(bank, folder)
    assert everything(bank) == before


# An interrupt as a `with` block is left keeps it from closing its file, which is Python's own doing.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_an_interrupted_change_leaves_the_slot_as_it_was(files):
    folder, _ = files
    bank = Bank(CASES["mlp"].build(), {"first": folder / "first"}, slots=2)
    bank.parameters("first")
    before, came = everything(bank), 0
    for at in range(1500, 2600, 23):
        fresh = copy.deepcopy(bank)
        if interrupted(lambda bank=fresh: bank.replace("first", folder / "headless"), at):
            came += 1
            assert everything(fresh) in (before, everything_after(bank, folder))
    gc.collect()  # whatever an interrupt left open is warned of here, not in another test
    assert came > 5


def everything_after(bank, folder):
    done = copy.deepcopy(bank)
    done.replace("first", folder / "headless")
    return everything(done)


def test_an_explicit_dtype_rounds(files):
    folder, alone = files
    bank = Bank(CASES["mlp"].build(), {"first": folder / "first"}, dtype="bfloat16")
    assert bank.model.up.lora_A.values.dtype == torch.bfloat16
    difference = distance(served(bank, "first"), CASES["mlp"].run(alone["first"]))
    assert 0 < difference < 2e-2


# Compiled.


def counted(model):
    """Return a model compiled in one graph, and the number of times that this was done."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    return torch.compile(model, fullgraph=True, backend=backend), graphs


def test_nothing_is_compiled_again_when_adapters_come_and_go(files):
    folder, alone = files
    case = CASES["mlp"]
    torch.compiler.reset()
    bank = Bank(case.build(), {"first": folder / "first"}, slots=3)
    compiled, graphs = counted(bank.model)

    def check(rows):
        with bank.rows(rows):
            found, eager = case.run(compiled), case.run(bank.model)
        assert distance(found, eager) < 1e-6
        return found

    check(None)
    assert len(graphs) == 1
    check(["first", None, "first"])
    check([None, "first", "first"])
    check(["first", "first", None])
    assert len(graphs) == 2
    bank.load("narrow", folder / "narrow")
    bank.add("new", LoRAConfig(r=2, alpha=5))
    changed = check(["narrow", "first", "new"])
    assert distance(changed[0], case.run(alone["narrow"])[0]) < 1e-6
    bank.replace("narrow", folder / "headless")
    bank.remove("new")
    check(["narrow", None, "first"])
    check(torch.tensor([2, 0, 1]))
    assert len(graphs) == 2
    check("first")  # one adapter for all rows: another number of rows
    check("narrow")
    check(None)
    assert len(graphs) <= 3


def test_training_compiles_in_one_graph(files):
    folder, _ = files
    torch.compiler.reset()
    bank = Bank(CASES["mlp"].build(), {"first": folder / "first"}, slots=3)
    bank.add("new", LoRAConfig(r=2))
    parameters = {name: bank.parameters(name) for name in bank.names}
    compiled, graphs = counted(bank.model)
    gradients = []
    for model in (bank.model, compiled):
        with bank.rows(["new", None, "first"]):
            CASES["mlp"].call(model).square().sum().backward()
        gradients.append([p.grad for each in parameters.values() for p in each])
        for each in parameters.values():
            for p in each:
                p.grad = None
    assert all(distance(a, b) < 1e-5 for a, b in zip(*gradients, strict=True) if b.any())
    assert len(graphs) == 1


# Files.


@pytest.mark.parametrize("name", [*SHAPES, "tied"])
@pytest.mark.parametrize("format", ["minilora", "peft"])
def test_what_a_bank_saves_is_the_file_that_it_loaded(name, format, tmp_path):
    side = side_by_side(name, tmp_path)
    for adapter in ("first", "narrow", "headless"):
        side.bank.parameters(adapter)  # whether it trains or not
        side.bank.save(adapter, tmp_path / "saved", format=format)
        minilora.save(side.alone[adapter], tmp_path / "expected", format=format)
        assert content(tmp_path / "saved") == content(tmp_path / "expected")
        loaded = minilora.load(side.case.build(), tmp_path / "saved")
        assert raw(side.case.run(loaded)) == raw(side.case.run(side.alone[adapter]))
        side.bank.freeze(adapter)
        side.bank.save(adapter, tmp_path / "saved", format=format)
        assert content(tmp_path / "saved") == content(tmp_path / "expected")


def content(path):
    if path.is_dir():
        return {name: (path / name).read_bytes() for name in sorted(os.listdir(path))}
    return path.read_bytes()


def test_every_file_that_load_reads(tmp_path):
    """PEFT's folders and loralib's state dicts, beside minilora's own."""
    from safetensors.torch import save_file

    case = CASES["mlp"]
    alone = {name: injected(case, name, torch.float32) for name in ("first", "narrow", "headless")}
    minilora.save(alone["first"], tmp_path / "first", format="peft")
    minilora.save(alone["narrow"], tmp_path / "narrow")
    state = {name: t.contiguous() for name, t in minilora.adapter_state_dict(alone["headless"]).items()}
    save_file(state, tmp_path / "headless.safetensors")
    bank = Bank(case.build(), {name: tmp_path / name for name in ("first", "narrow")}, slots=3)
    config = LoRAConfig(r=3, alpha=-2)
    bank.load("headless", tmp_path / "headless.safetensors", format="loralib", config=config)
    for name, model in alone.items():
        assert distance(served(bank, name), case.run(model)) < 1e-6


def test_what_a_bank_trained_is_an_ordinary_adapter(tmp_path):
    bank = empty(trainable=["classifier"])
    bank.add("new", LoRAConfig(r=2, dropout=0.1))
    bare = copy.deepcopy(bank.model)
    optimizer = torch.optim.SGD(bank.parameters("new"), lr=0.5)
    x = torch.randn(4, 16)
    for _ in range(3):
        with bank.rows(["new", None, "new", "new"]):
            bank.model(x)[0].sum().backward()
        optimizer.step()
    bank.save("new", tmp_path / "new")
    model = minilora.load(minilora.eject(bare), tmp_path / "new")
    with bank.rows("new"):
        assert distance(model(x), bank.model(x)) < 1e-6
    assert model.up.config == LoRAConfig(r=2, dropout=0.1)
    with torch.no_grad():
        bank.parameters("new")[0].fill_(torch.nan)
    with pytest.raises(CheckpointError, match=r"'up.lora_A': not finite"):
        bank.save("new", tmp_path / "nan")
    assert not (tmp_path / "nan").exists()


def test_a_new_adapter_begins_as_inject_would_begin_it():
    bank, alone = empty(), MLP().eval()
    alone.load_state_dict(
        {k.replace("base.", ""): v for k, v in bank.model.state_dict().items() if "lora" not in k}
    )
    torch.manual_seed(5)
    bank.add("new", LoRAConfig(r=2))
    torch.manual_seed(5)
    minilora.inject(alone, ["up", "down"], LoRAConfig(r=2), trainable=())
    for own, other in zip(bank.parameters("new"), minilora.trainable_parameters(alone), strict=True):
        assert torch.equal(own, other)
    with pytest.raises(MiniLoRAError, match="config must be a LoRAConfig"):
        bank.add("neck", minilora.AdapterConfig())


def test_two_banks_are_two():
    bank, other = two(), filled(empty(), "z", 3, r=1)
    x = torch.randn(2, 16)
    with bank.rows("a"), other.rows("z"):
        mine, its = bank.model(x), other.model(x)
    with other.rows("z"):
        assert torch.equal(other.model(x), its)
    with bank.rows("a"):
        assert torch.equal(bank.model(x), mine)
    assert isinstance(bank.model, nn.Module)
