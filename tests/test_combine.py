"""`combine`: a weighted sum of adapters is an adapter, and what a smaller rank loses is told."""

import copy

import pytest
import torch
from checks import assert_equal_to_rounding, distance, injected_modules
from command_line import run
from models import CASES, MLP
from test_bank import two
from torch import nn

import minilora
from minilora import CheckpointError, LoRAConfig, MiniLoRAError, combine

WEIGHTS = {"a": 0.7, "b": -1.5, "c": 2}


def filled(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for tensor in minilora.adapter_state_dict(model).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


@pytest.fixture
def adapters(tmp_path, monkeypatch):
    """Three adapters of one base in the working directory: of other ranks, scales and sites."""
    monkeypatch.chdir(tmp_path)
    base = CASES["mlp"].build(torch.float64)
    settings = {
        "a": (["up", "down"], LoRAConfig(r=2, alpha=3)),
        "b": (["up"], LoRAConfig(r=3, rslora=True)),
        "c": (["down", "classifier"], LoRAConfig(r=1, alpha=2)),
    }
    for seed, (name, (targets, config)) in enumerate(settings.items()):
        model = minilora.inject(copy.deepcopy(base), targets, config, trainable=())
        minilora.save(filled(model, seed), name)
    return base


def updates(base, path):
    """Return scaling B A at each site of an adapter, in float64."""
    model = minilora.load(copy.deepcopy(base), path)
    return {name: layer.delta_weight().detach() for name, (layer,) in injected_modules(model).items()}


def expected(base, weights):
    total = {}
    for name, weight in weights.items():
        for site, update in updates(base, name).items():
            total[site] = total.get(site, 0) + weight * update
    return total


def test_what_begins_at_the_weight_is_summed_and_dora_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = CASES["mlp"].build(torch.float64)
    for name, config in {
        "a": LoRAConfig(r=2, init="pissa"),
        "b": LoRAConfig(r=2),
        "c": LoRAConfig(r=2, dora=True),
    }.items():
        minilora.save(filled(minilora.inject(copy.deepcopy(base), ["up"], config, trainable=()), 3), name)
    weights = {"a": 0.5, "b": -2.0}
    assert combine(weights, "out").ranks == {"up": 6}
    assert distance(updates(base, "out")["up"], expected(base, weights)["up"]) < 1e-12
    with pytest.raises(CheckpointError, match="'c': 'up': DoRA scales the weight itself, and has no sum"):
        combine({"a": 1.0, "c": 1.0}, "none")


@pytest.mark.parametrize("format", ["minilora", "peft"])
def test_a_combination_is_the_weighted_sum_exactly(adapters, format):
    made = combine(WEIGHTS, "out", format=format)
    found, want = updates(adapters, "out"), expected(adapters, WEIGHTS)
    assert found.keys() == want.keys() == {"up", "down", "classifier"}
    assert all(distance(found[site], want[site]) < 1e-14 for site in want)
    assert made.ranks == {"up": 5, "down": 3, "classifier": 1}
    assert made.loss == 0
    assert set(made.lost.values()) == {0}


def test_a_smaller_rank_is_the_nearest_matrix_and_the_loss_is_told(adapters):
    made = combine(WEIGHTS, "out", r=2)
    found, want = updates(adapters, "out"), expected(adapters, WEIGHTS)
    assert made.ranks == {"up": 2, "down": 2, "classifier": 1}
    for site, whole in want.items():
        U, sigma, Vh = torch.linalg.svd(whole)
        nearest = (U[:, :2] * sigma[:2]) @ Vh[:2]
        assert distance(found[site], nearest) < 1e-12
        assert made.lost[site] == pytest.approx(float((whole - nearest).norm() / whole.norm()), abs=1e-12)
    left = sum(float((want[s] - found[s]).square().sum()) for s in want)
    assert made.loss == pytest.approx((left / sum(float(w.square().sum()) for w in want.values())) ** 0.5)
    assert made.loss > 0.05


def test_a_rank_above_the_layers_own_is_honoured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = nn.Sequential(nn.Linear(6, 2)).double()
    for seed, name in enumerate(("a", "b")):
        model = copy.deepcopy(base)
        with pytest.warns(UserWarning, match="r exceeds"):
            minilora.inject(model, "0", LoRAConfig(r=3))
        minilora.save(filled(model, seed), name)
    made = combine({"a": 1, "b": 1}, "out", r=4)
    assert made.loss < 1e-12
    with pytest.warns(UserWarning, match="r exceeds"):
        found = updates(base, "out")["0"]
    with pytest.warns(UserWarning, match="r exceeds"):
        assert distance(found, expected(base, {"a": 1, "b": 1})["0"]) < 1e-12


def test_stacks_of_experts_and_convolutions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts = 3
            self.stack = nn.Parameter(torch.randn(3, 5, 4, dtype=torch.float64))
            self.conv = nn.Conv2d(2, 4, 3, dtype=torch.float64)

        def forward(self, x):
            return x

    base = nn.ModuleDict({"layer": Experts()})
    for seed, name in enumerate(("a", "b")):
        model = minilora.inject(copy.deepcopy(base), ["layer.stack", "layer.conv.weight"], LoRAConfig(r=2))
        minilora.save(filled(model, seed), name)
    combine({"a": 0.5, "b": 2}, "out")
    combine({"a": 0.5, "b": 2}, "cut", r=1)

    def deltas(path):
        state = minilora.adapter_state_dict(minilora.load(copy.deepcopy(base), path))
        scaling = {"out": 1, "cut": 1}.get(path, 8)
        return {
            k[:-7]: scaling * state[f"{k[:-7]}.lora_B"] @ t for k, t in state.items() if k.endswith("lora_A")
        }

    both = {k: 0.5 * a + 2 * deltas("b")[k] for k, a in deltas("a").items()}
    assert all(distance(found, both[k]) < 1e-14 for k, found in deltas("out").items())
    for k, found in deltas("cut").items():
        U, sigma, Vh = torch.linalg.svd(both[k], full_matrices=False)
        assert distance(found, (U[..., :1] * sigma[..., None, :1]) @ Vh[..., :1, :]) < 1e-12


def test_adapters_of_a_bank_by_name_and_files_beside_them(tmp_path):
    bank = two(model=CASES["mlp"].build())
    bank.save("a", tmp_path / "copy of a")
    combine({"a": 0.5, "b": 1, tmp_path / "copy of a": 0.25}, tmp_path / "out", bank=bank)
    bank.save("b", tmp_path / "b")
    a, b, found = (updates(CASES["mlp"].build(), tmp_path / name) for name in ("copy of a", "b", "out"))
    assert found.keys() == {"up", "down"}
    assert all(distance(found[site], 0.75 * a[site] + b[site]) < 1e-6 for site in found)
    with pytest.raises(
        MiniLoRAError, match="'c' is neither an adapter of the bank nor a path; it holds 'a', 'b'"
    ):
        combine({"c": 1}, tmp_path / "no", bank=bank)


def test_heads_have_no_sum(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b")):
        model = minilora.inject(CASES["mlp"].build(), "up", LoRAConfig(r=1), trainable="classifier")
        minilora.save(filled(model, seed), name)
    with pytest.raises(CheckpointError, match=r"give heads=.*'a' has 'classifier'; 'b' has 'classifier'"):
        combine({"a": 1, "b": 1}, "out")
    combine({"a": 1, "b": 1}, "out", heads="b")
    head, its = (minilora.load(CASES["mlp"].build(), path).classifier.trained for path in ("out", "b"))
    assert torch.equal(head.weight, its.weight)


def test_everything_that_cannot_be_summed_is_told_at_once(adapters, tmp_path):
    torch.manual_seed(1)
    minilora.save(minilora.inject(MLP().double(), "up", LoRAConfig(r=1), trainable=()), "other")
    neck = minilora.inject(copy.deepcopy(adapters), "up", minilora.AdapterConfig(bottleneck=2), trainable=())
    minilora.save(neck, "neck")
    with pytest.raises(CheckpointError) as error:
        combine({"a": 1, "neck": 1, "other": 1}, "out")
    assert "2 problems; nothing has been written" in str(error.value)
    assert "'neck': 'up': a bottleneck adapter is not linear" in str(error.value)
    assert "'other' was trained on another base than" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "more", "message"),
    [
        ({}, {}, "give each adapter its weight"),
        (["a", "b"], {}, "give each adapter its weight"),
        ({"a": float("nan")}, {}, "the weight of 'a' must be a finite number, not nan"),
        ({"a": "much"}, {}, "the weight of 'a' must be"),
        ({"a": 1}, {"r": 0}, "r must be an int from 1 on"),
        ({"a": 1}, {"heads": "b"}, "heads must be one of 'a', not 'b'"),
        ({"a": 1}, {"format": "gguf"}, "format must be one of"),
    ],
)
def test_wrong_arguments(adapters, weights, more, message):
    with pytest.raises(MiniLoRAError, match=message):
        combine(weights, "out", **more)


# On the command line.


def test_on_the_command_line(adapters):
    done = run("combine", "a", "b", "c", "--weights", "0.7", "-1.5", "2", "--out", "out")
    assert (done.code, done.err) == (0, "")
    assert done.out == "out: 3 sites, ranks 1 to 5, lost: 0 % of the update\n"
    want = expected(adapters, WEIGHTS)
    assert all(distance(found, want[site]) < 1e-14 for site, found in updates(adapters, "out").items())
    cut = run("combine", "a", "b", "--weights", "1", "1", "--out", "cut", "--r", "2", "--to", "peft")
    assert cut.code == 0
    assert "2 sites, rank 2, lost: " in cut.out
    assert minilora.load(copy.deepcopy(adapters), "cut").up.config.r == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "--weights", "1", "--out", "x"], "--weights has 1 numbers for 2 files"),
        (["a", "./a", "--weights", "1", "1", "--out", "x"], "a file is given twice"),
        (["a", "--weights", "1", "--out", "b"], "'b' exists already"),
        (["a", "z", "--weights", "1", "1", "--out", "x"], "there is no file or folder 'z'"),
    ],
)
def test_errors_on_the_command_line(adapters, arguments, message):
    done = run("combine", *arguments)
    assert done.code == 2
    assert message in done.err


def test_dtypes_are_the_widest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, dtype in (("a", "bfloat16"), ("b", "float32")):
        model = minilora.inject(CASES["mlp"].build(), "up", LoRAConfig(r=1, dtype=dtype), trainable=())
        for tensor in minilora.adapter_state_dict(model).values():
            tensor.fill_(0.5)  # in both dtypes
        minilora.save(model, name)
    combine({"a": 1, "b": -1}, "out")
    loaded, x = minilora.load(CASES["mlp"].build(), "out"), torch.randn(3, 16)
    assert loaded.up.lora_A.dtype == torch.float32
    assert_equal_to_rounding(loaded(x), CASES["mlp"].build()(x))
