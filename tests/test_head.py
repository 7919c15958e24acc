"""TrainableHead: a copy is trained, the original stays as it was."""

import re

import pytest
import torch
from checks import injected_modules, picture, randomise, raw, state, unchanged
from models import MLP, Tied
from torch import nn

import minilora
from minilora import TargetError, TrainableHead


class Classifier(nn.Module):
    """A body, and a head with buffers, dropout and several layers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.head = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def step(model):
    optimizer = torch.optim.SGD(minilora.trainable_parameters(model), lr=0.5)
    model.train()(torch.randn(8, 16)).square().sum().backward()
    optimizer.step()
    return model.eval()


def test_copy_is_trained_and_the_original_is_not():
    model = minilora.inject(Classifier(), "body", trainable="head")
    head = model.head
    original, copied = state(head.base), state(head.trained)
    assert list(copied.values()) == list(original.values())
    step(model)
    assert state(head.base) == original
    changed = {key for key, value in state(head.trained).items() if value != copied[key]}
    assert changed == set(Classifier().head.state_dict())  # the running statistics, too
    assert not any(p.requires_grad for p in head.base.parameters())


def test_forward_is_the_copys_or_in_disabled_the_originals():
    model = step(minilora.inject(Classifier(), "body", trainable=["head"]))
    x = torch.randn(4, 16)
    assert torch.equal(model.head(x), model.head.trained(x))
    with minilora.disabled(model):
        assert torch.equal(model.head(x), model.head.base(x))
    assert not torch.equal(model.head.trained(x), model.head.base(x))


def test_attributes_are_those_of_the_copy():
    model = step(minilora.inject(MLP(), "up", trainable="classifier"))
    assert model.classifier.weight is model.classifier.trained.weight
    with minilora.disabled(model):
        assert model.classifier.weight is model.classifier.base.weight


def test_a_parameter_that_is_set_is_the_copys_own_as_it_is_when_read():
    model = minilora.inject(MLP(), "up", trainable="classifier")
    original, new = model.classifier.base.weight, nn.Parameter(torch.zeros(3, 16))
    model.classifier.weight = new
    assert model.classifier.weight is model.classifier.trained.weight is new
    assert model.classifier.base.weight is original


def test_eject_gives_the_original_back_and_fuse_leaves_the_copy():
    model = Classifier()
    before = picture(model)
    minilora.inject(model, "body", trainable="head")
    step(model)
    minilora.eject(model)
    model.train().requires_grad_(True)
    assert picture(model) == before

    minilora.inject(model, "body", trainable="head")
    trained = step(model).head.trained
    x = torch.randn(4, 16)
    expected = model(x)
    minilora.fuse(model)
    assert model.head is trained
    assert list(model.state_dict()) == list(before["state"])
    torch.testing.assert_close(model(x), expected)


def test_trained_parameters_that_were_frozen_are_thawed_in_the_copy():
    model = MLP().requires_grad_(False)
    minilora.inject(model, "up", trainable="classifier")
    assert all(p.requires_grad for p in model.classifier.trained.parameters())


def test_saved_under_its_own_names():
    model = minilora.inject(Classifier(), "body", trainable="head")
    saved = minilora.adapter_state_dict(model)
    own = [f"head.{key}" for key in Classifier().head.state_dict()]
    assert [key for key in saved if key.startswith("head")] == own
    assert raw(saved["head.0.weight"]) == raw(model.head.trained[0].weight)


@pytest.mark.parametrize(
    ("targets", "trainable", "says"),
    [
        ("body", "head.2", "without floating-point parameters"),
        ("head.0", "head", r"injected site or another trainable module \('head.0'\)"),
        ("body", "body", r"another trainable module \('body'\)"),
        ("body", ["head", "head.0"], r"another trainable module \('head.0'\)"),
        ("body", re.compile(r"head(\.[03])?"), r"another trainable module \('head'\)"),
        ("body", "heda", r"trainable: 'heda' matches no module; nearest: 'head' \(x1\)"),
    ],
)
def test_what_cannot_be_trained_in_full(targets, trainable, says):
    model = Classifier()
    with unchanged(model), pytest.raises(TargetError, match=says):
        minilora.inject(model, targets, trainable=trainable)


def listing(of):
    """Return a model that keeps layers in a container which is only read, never called."""
    model = nn.Module()
    model.body = nn.Linear(16, 16)
    model.heads = of
    return model


LISTS = {
    "list": (nn.ModuleList([nn.Linear(16, 4), nn.ReLU(), nn.Linear(16, 2)]), ["heads.0", "heads.2"]),
    "dict": (nn.ModuleDict({"a": nn.Linear(16, 4), "b": nn.LayerNorm(4)}), ["heads.a", "heads.b"]),
    "nested": (
        nn.ModuleList([nn.ModuleDict({"a": nn.Linear(16, 4)}), nn.Sequential(nn.Linear(16, 2))]),
        ["heads.0.a", "heads.1"],
    ),
}


@pytest.mark.parametrize(("of", "members"), LISTS.values(), ids=LISTS)
def test_of_a_list_of_modules_the_members_are_trained(of, members):
    model = minilora.inject(listing(of), "body", trainable=["heads"])
    assert [
        name for name, found in injected_modules(model).items() if found[0].kind == "trainable"
    ] == members
    assert isinstance(model.heads, (nn.ModuleList, nn.ModuleDict))  # which can be read as before
    assert len(model.heads) == len(of)
    assert minilora.eject(model).heads is of


@pytest.mark.parametrize(
    ("of", "says"),
    [
        (
            nn.ParameterList([torch.zeros(3)]),
            "a ParameterList is never called itself; choose the module that",
        ),
        (nn.ParameterDict({"a": torch.zeros(3)}), "a ParameterDict is never called itself"),
        (nn.ModuleList([nn.ReLU()]), "a ModuleList is never called itself; choose the modules inside it"),
        (nn.ModuleList(), "a ModuleList is never called itself"),
    ],
)
def test_a_container_without_a_module_to_train_is_refused(of, says):
    model = listing(of)
    with unchanged(model), pytest.raises(TargetError, match=f"'heads': {says}"):
        minilora.inject(model, "body", trainable=["heads"])


def test_a_container_that_is_called_is_one_head():
    class Heads(nn.ModuleDict):
        def __init__(self):
            super().__init__({"a": nn.Linear(16, 4)})
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self["a"](x) * self.gain

    model = minilora.inject(listing(Heads()), "body", trainable="heads")
    assert isinstance(model.heads, TrainableHead)
    assert "heads.gain" in minilora.adapter_state_dict(model)


def test_a_tied_embedding_is_sent_to_lora_which_takes_it():
    model = Tied()
    says = (
        r"'embedding': .*tied to 'head.weight'; a trained copy would untie them. Give it as a target for LoRA"
    )
    with unchanged(model), pytest.raises(TargetError, match=says):
        minilora.inject(model, "body", trainable="embedding")
    minilora.inject(model, "embedding")


def test_tied_head_is_refused_with_the_tie_and_the_fix():
    model = Tied()
    with (
        unchanged(model),
        pytest.raises(TargetError, match=r"tied to 'embedding.weight'.*target for LoRA instead"),
    ):
        minilora.inject(model, "body", trainable="head")


def test_injecting_into_what_is_trained_in_full_is_refused():
    model = minilora.inject(Classifier(), "body", trainable="head")
    for targets, trainable in (("head.0", ()), ("head", ()), (lambda name, module: name == "head.3", ())):
        with unchanged(model), pytest.raises(TargetError, match="lies in 'head', which is trained in full"):
            minilora.inject(model, targets, minilora.LoRAConfig(r=2), trainable=trainable)
    other = minilora.inject(Classifier(), "head.0", trainable=())
    with unchanged(other), pytest.raises(TargetError, match="trainable names what is, contains"):
        minilora.inject(other, "body", trainable="head")


def test_shared_head_is_one():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    model["same"] = model["head"]
    minilora.inject(model, "body", minilora.LoRAConfig(r=2), trainable=["head", "same"])
    assert isinstance(model["head"], TrainableHead)
    assert model["same"] is model["head"]
    assert list(minilora.adapter_state_dict(randomise(model)))[-2:] == ["head.weight", "head.bias"]


def test_description():
    assert TrainableHead(nn.Linear(2, 2)).description() == "trained in full (Linear)"
