"""freeze, trainable_parameters, disabled, summary."""

import contextlib
import sys

import pytest
import torch
from checks import assert_equal_to_rounding, assert_far, frozen, picture, randomise, raw, unchanged
from models import CASES, MLP, in_dtypes, on_grid
from torch import nn

import minilora
from minilora import AdapterConfig, LoRAConfig, LoRALinear, MiniLoRAError


def names(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_freeze_leaves_what_was_injected():
    model = minilora.inject(MLP(), "up", trainable="classifier")
    minilora.inject(model, "down", AdapterConfig(bottleneck=2))
    trained = names(model)
    model.requires_grad_(True)
    assert minilora.freeze(model) is model
    assert names(model) == trained
    model.up.lora_A.requires_grad_(False)
    minilora.freeze(model)
    assert "up.lora_A" not in names(model)  # what somebody froze stays frozen


def test_freeze_on_a_bare_model():
    assert names(minilora.freeze(MLP())) == []


def test_trainable_parameters():
    model = minilora.inject(MLP(), "up", trainable="classifier")
    head = model.classifier.trained
    expected = [model.up.lora_A, model.up.lora_B, head.weight, head.bias]
    assert list(map(id, minilora.trainable_parameters(model))) == list(map(id, expected))


def test_trainable_parameters_refuses_what_would_train_nothing():
    with pytest.raises(MiniLoRAError, match="no parameter of this model requires a gradient"):
        minilora.trainable_parameters(MLP().requires_grad_(False))
    model = minilora.merge(minilora.inject(MLP(), ["up", "down"]))
    with pytest.raises(
        MiniLoRAError, match=r"2 sites are merged, and a merged layer does not train; call .*unmerge"
    ):
        minilora.trainable_parameters(model)


@on_grid
@in_dtypes
@pytest.mark.parametrize("merged", [False, True])
def test_disabled_is_the_base_and_afterwards_all_is_as_before(case, dtype, merged):
    model = case.build(dtype)
    base = raw(case.run(frozen(model)))
    head = [name for name in ("classifier",) if hasattr(model, name)]
    randomise(minilora.inject(model, case.targets, trainable=head))
    if merged:
        minilora.merge(model)
    active, before = case.run(model), picture(model)["state"]
    with minilora.disabled(model) as same:
        assert same is model
        assert raw(case.run(model)) == base
        with minilora.disabled(model):  # once more changes nothing
            assert raw(case.run(model)) == base
        assert raw(case.run(model)) == base
    assert raw(case.run(model)) == raw(active)
    assert_far(active, torch.zeros_like(active))
    assert raw(active) != base
    assert picture(model)["state"] == before
    assert all(layer.merged is merged for layer in model.modules() if isinstance(layer, minilora.LoRALinear))


@torch.no_grad()
def test_disabled_on_adapters():
    model, x = MLP(), torch.randn(2, 16)
    base = frozen(model)(x)
    randomise(minilora.inject(model, ["up", "down"], AdapterConfig(bottleneck=2)))
    active = model(x)
    with minilora.disabled(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), active)


def test_disabled_ends_with_an_exception_too():
    model = minilora.merge(randomise(minilora.inject(MLP(), "up")))
    before = picture(model)["state"]
    with pytest.raises(ZeroDivisionError), minilora.disabled(model):
        raise ZeroDivisionError
    assert picture(model)["state"] == before
    assert model.up.merged
    assert model.up.enabled


def test_disabled_weight_is_the_bases_own():
    model = randomise(minilora.inject(MLP(), "up"))
    with minilora.disabled(model):
        assert model.up.weight is model.up.base.weight
    assert not torch.equal(model.up.weight, model.up.base.weight)


def test_summary_prints_at_a_glance():
    model = minilora.inject(MLP(), ["up", "down"], LoRAConfig(r=2, dropout=0.1), trainable="classifier")
    minilora.inject(model, "down", AdapterConfig(bottleneck=4))
    minilora.merge(model, skip_adapters=True)
    assert str(minilora.summary(model)).splitlines() == [
        "MLP",
        "-----------------------------------------------------------------",
        "site            kind                           parameters  state",
        "-----------------------------------------------------------------",
        "up          x1  LoRA r=2 alpha=16 dropout=0.1          96  merged",
        "down        x1  adapter m=4 gelu sequential           148  active",
        "down        x1  LoRA r=2 alpha=16 dropout=0.1          96  merged",
        "classifier  x1  trained in full (Linear)               51  active",
        "-----------------------------------------------------------------",
        "trainable: 391 parameters, 35.3 % of the base's 1,107",
        "LoRA reaches 100 % of the base's matrix weights",
    ]


def test_summary_groups_stacks_and_counts():
    model = minilora.inject(CASES["bert"].build(), ["query", "value"], LoRAConfig(r=4), trainable=())
    summary = minilora.summary(model)
    assert [(row.sites, row.count, row.parameters) for row in summary.rows] == [
        ("bert.encoder.layer.*.attention.self.query", 2, 2 * 2 * 4 * 16),
        ("bert.encoder.layer.*.attention.self.value", 2, 2 * 2 * 4 * 16),
    ]
    assert summary.trainable == 4 * 2 * 4 * 16
    assert summary.base == sum(p.numel() for p in CASES["bert"].build().parameters())
    with minilora.disabled(model):
        assert {row.state for row in minilora.summary(model).rows} == {"disabled"}


def test_summary_of_a_bare_model_and_of_a_tied_one():
    summary = minilora.summary(MLP())
    assert (summary.rows, summary.trainable, summary.base) == ((), 1107, 1107)
    tied = CASES["tied"].build()
    assert minilora.summary(tied).base == sum(p.numel() for p in tied.parameters())


def test_reading_changes_nothing():
    model = randomise(minilora.inject(MLP(), "up", trainable="classifier"))
    with unchanged(model):
        minilora.summary(model)
        minilora.trainable_parameters(model)
        minilora.adapter_state_dict(model)


def test_disabled_gives_the_very_merged_weights_back_and_computes_nothing(monkeypatch):
    model = minilora.merge(randomise(minilora.inject(MLP(), ["up", "down"])))

    def out_of_memory(self, dtype=None):
        raise MemoryError

    monkeypatch.setattr(LoRALinear, "effective_weight", out_of_memory)
    with unchanged(model):
        with minilora.disabled(model):
            assert not model.up.merged
        with contextlib.suppress(ZeroDivisionError), minilora.disabled(model):
            raise ZeroDivisionError


@pytest.mark.parametrize("stuck", ["up", "down"])
def test_a_model_cast_inside_disabled_is_merged_anew_or_not_at_all(monkeypatch, stuck):
    model = minilora.merge(randomise(minilora.inject(MLP(), ["up", "down"])).eval())
    x = torch.randn(3, 16)
    expected = model(x).double()
    with minilora.disabled(model):
        model.double()
    assert model.up.merged
    assert_equal_to_rounding(model(x.double()).float(), expected.float())

    real = LoRALinear.effective_weight

    def out_of_memory(self, dtype=None):
        if self is getattr(model, stuck):
            raise MemoryError
        return real(self, dtype)

    monkeypatch.setattr(LoRALinear, "effective_weight", out_of_memory)
    with pytest.raises(MemoryError), minilora.disabled(model):
        model.float()
    assert not model.up.merged
    assert not model.down.merged
    assert model.up.enabled
    monkeypatch.undo()
    assert_equal_to_rounding(model(x), expected.float())


def test_summary_shows_what_trains_and_no_injection_brought():
    model = minilora.inject(CASES["bert"].build(), "query", LoRAConfig(r=2), trainable=())
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.bias"):
            parameter.requires_grad_(True)
    model.extra = torch.nn.Linear(16, 2)
    rows = {row.sites: row for row in minilora.summary(model).rows if row.state == "not saved"}
    assert {name: (row.count, row.parameters, row.description) for name, row in rows.items()} == {
        "bert.embeddings.LayerNorm.bias": (1, 16, "trains, not injected"),
        "bert.encoder.layer.*.attention.output.LayerNorm.bias": (2, 32, "trains, not injected"),
        "bert.encoder.layer.*.output.LayerNorm.bias": (2, 32, "trains, not injected"),
        "extra.weight": (1, 32, "trains, not injected"),
        "extra.bias": (1, 2, "trains, not injected"),
    }
    assert "not saved" in str(minilora.summary(model))
    minilora.freeze(model)
    assert not [row for row in minilora.summary(model).rows if row.state == "not saved"]


def test_what_trains_in_a_bare_model_is_no_surprise():
    assert minilora.summary(MLP()).rows == ()


def test_a_trainer_that_never_asks_for_the_parameters_cannot_train_a_merged_model():
    model = minilora.inject(MLP(), ["up", "down"], trainable="classifier")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    minilora.merge(model.train())
    with pytest.raises(MiniLoRAError, match=r"does not train: call minilora\.unmerge"):
        model(torch.randn(3, 16)).sum().backward()
    with torch.no_grad():
        model(torch.randn(3, 16))
    minilora.unmerge(model)
    model(torch.randn(3, 16)).sum().backward()
    optimizer.step()


def test_parameter_groups_of_lora_plus():
    """B learns faster, vectors are not decayed, and every trained parameter is in one group."""
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), "head": nn.Linear(8, 2)})
    minilora.inject(model, "body.0", LoRAConfig(r=2, dora=True), trainable=["head", "body.1.bias"])
    groups = minilora.parameter_groups(model, lr=0.1, weight_decay=0.5, lora_plus_ratio=4)
    name_of = {id(p): name for name, p in model.named_parameters()}
    found = {
        (group["lr"], group["weight_decay"]): {name_of[id(p)] for p in group["params"]} for group in groups
    }
    assert found == {
        (0.1, 0.5): {"body.0.lora_A", "head.trained.weight"},
        (0.4, 0.5): {"body.0.lora_B"},
        (0.1, 0.0): {"body.0.lora_magnitude", "body.1.trained", "head.trained.bias"},
    }
    assert sum(len(group["params"]) for group in groups) == len(minilora.trainable_parameters(model))
    optimizer = torch.optim.SGD(groups)
    before = model["body"][0].lora_B.detach().clone()
    model["head"](model["body"](torch.randn(3, 8))).sum().backward()
    gradient = model["body"][0].lora_B.grad.clone()
    optimizer.step()
    assert_equal_to_rounding(model["body"][0].lora_B.detach(), before - 0.4 * (gradient + 0.5 * before))


def test_parameter_groups_refuse_what_is_no_rate_and_what_does_not_train():
    model = minilora.inject(MLP(), "up")
    with pytest.raises(MiniLoRAError, match="3 problems") as caught:
        minilora.parameter_groups(model, lr=-1.0, weight_decay="x", lora_plus_ratio=float("nan"))
    assert all(name in str(caught.value) for name in ("lr", "weight_decay", "lora_plus_ratio"))
    with pytest.raises(MiniLoRAError, match="merged"):
        minilora.parameter_groups(minilora.merge(model), lr=0.1)
    with pytest.raises(MiniLoRAError, match="no parameter"):
        minilora.parameter_groups(MLP().requires_grad_(False), lr=0.1)


def test_a_tied_weight_is_reached_once():
    """One matrix of (11, 16) under two names, one of them with LoRA, beside another of (16, 16)."""
    model = minilora.inject(CASES["tied"].build(), "head")
    for act in (minilora.merge, minilora.unmerge):
        found = minilora.summary(model)
        assert found.reached == 11 * 16 / (11 * 16 + 16 * 16)
        assert found.left_out == (("body", 1),)
        act(model)


def test_the_work_of_a_summary_is_in_proportion_to_the_sites():
    """Four times the sites are four times the lines that run, and not sixteen."""
    work = []
    for n in (10, 40):
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(n)])
        minilora.inject(model, "all-linear", LoRAConfig(r=1))
        lines = 0

        def trace(frame, event, argument):
            nonlocal lines
            lines += event == "line" and frame.f_code.co_filename.endswith("summary.py")
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            minilora.summary(model)
        finally:
            sys.settrace(before)
        work.append(lines)
    assert work[1] < 5 * work[0]
