"""InjectedModule: attributes, names of sites, replacement, wrapped models, checkpoints of the bare model."""

import pytest
import torch
from checks import assert_equal_to_rounding, injected_modules, picture, randomise, raw, state, unchanged
from models import MLP, Shared, on_grid
from torch import nn

import minilora
from minilora import AdapterConfig, LoRAConfig, MiniLoRAError
from minilora.module import InjectedModule, generator_for
from minilora.sites import Sites, replace_modules


class Counting(nn.Linear):
    """A linear layer with an attribute, a method and a private name of its own."""

    num_heads = 3
    _secret = "mine"

    def describe(self) -> str:
        return "counting"


def test_public_attributes_are_looked_up_on_the_base():
    model = minilora.inject(nn.Sequential(Counting(4, 4)), "0", LoRAConfig(r=2))
    minilora.inject(model, "0", AdapterConfig(bottleneck=2))
    assert (model[0].num_heads, model[0].describe(), model[0].in_features) == (3, "counting", 4)
    for absent in ("_secret", "no_such"):
        with pytest.raises(AttributeError, match=absent):
            getattr(model[0], absent)


@pytest.mark.parametrize("training", [True, False])
def test_wrapper_is_in_the_mode_of_its_base(training):
    model = MLP().train(not training)
    model.up.train(training)
    minilora.inject(model, "up", trainable=["classifier"])
    assert model.up.training is model.up.base.training is training
    assert model.classifier.training is model.classifier.trained.training is not training


def test_names_of_sites_are_those_of_the_bare_model():
    model = nn.ModuleDict({"block": MLP(), "head": nn.Linear(16, 16)})
    names = list(Sites(model))
    minilora.inject(model, ["block.up", "head"], trainable=["block.classifier"])
    minilora.inject(model, ["block"], AdapterConfig(bottleneck=2, hidden_size=3))
    minilora.inject(model, ["head"], AdapterConfig(bottleneck=2))
    assert list(Sites(model)) == names
    assert {name: [w.kind for w in found] for name, found in injected_modules(model).items()} == {
        "block": ["adapter"],
        "block.up": ["lora"],
        "block.classifier": ["trainable"],
        "head": ["adapter", "lora"],
    }


def test_shared_module_is_replaced_under_all_parents_and_found_once():
    model = Shared()
    old, new = model.first, nn.Identity()
    replace_modules(model, {old: new})
    assert model.first is model.again is model.stack[1] is new
    assert old not in set(model.modules())
    minilora.inject(model := Shared(), "first")
    assert model.first is model.again is model.stack[1]
    assert list(injected_modules(model)) == ["first"]


def test_generator_depends_on_seed_and_name_and_leaves_the_global_state():
    before = torch.get_rng_state()
    draw = torch.rand(3, generator=generator_for("a"))
    assert torch.equal(draw, torch.rand(3, generator=generator_for("a")))
    assert not torch.equal(draw, torch.rand(3, generator=generator_for("b")))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert not torch.equal(draw, torch.rand(3, generator=generator_for("a")))


ACTIONS = {
    "inject": lambda model: minilora.inject(model, "up"),
    "load": lambda model: minilora.load(model, "never-read.safetensors"),
    "save": lambda model: minilora.save(model, "never-written.safetensors"),
    "merge": minilora.merge,
    "unmerge": minilora.unmerge,
    "fuse": minilora.fuse,
    "eject": minilora.eject,
    "adapter_state_dict": minilora.adapter_state_dict,
}


@pytest.mark.parametrize("action", ACTIONS)
def test_wrapped_models_are_refused_with_the_fix(action):
    for wrapped, fix in (
        (nn.DataParallel(minilora.inject(MLP(), "down")), r"`parallel\.module`"),
        (torch.compile(minilora.inject(MLP(), "down"), backend="eager"), r"`compiled\._orig_mod`"),
        (nn.Sequential(nn.DataParallel(minilora.inject(MLP(), "down"))), "'0' is wrapped in DataParallel"),
    ):
        with unchanged(wrapped), pytest.raises(MiniLoRAError, match=fix):
            ACTIONS[action](wrapped)


@pytest.mark.parametrize("action", sorted(set(ACTIONS) - {"inject", "load"}))
def test_bare_models_are_refused_with_the_fix(action):
    model = MLP()
    with (
        unchanged(model),
        pytest.raises(MiniLoRAError, match=r"carries no injection .*minilora\.inject\(model"),
    ):
        ACTIONS[action](model)


def all_kinds(case):
    """Return a model of the grid with LoRA, an adapter around one site of it, and a trained head if any."""
    model = case.build()
    head = [name for name in ("classifier",) if hasattr(model, name)]
    minilora.inject(model, case.targets, trainable=head)
    site = next(reversed(case.targets))
    if "out_proj" not in site:  # whose weight nn.MultiheadAttention computes with
        minilora.inject(model, site, AdapterConfig(bottleneck=2), trainable=())
    return randomise(model)


@on_grid
@pytest.mark.parametrize("assign", [False, True])
def test_bare_checkpoint_loads_into_an_injected_model(case, assign):
    other = case.build()
    for value in other.state_dict().values():
        if value.is_floating_point():
            value.mul_(1.5)
    model = all_kinds(case)
    trained = {key: raw(t) for key, t in minilora.adapter_state_dict(model).items()}
    model.load_state_dict(other.state_dict(), assign=assign)
    assert {key: raw(t) for key, t in minilora.adapter_state_dict(model).items()} == trained
    minilora.eject(model)
    assert state(model) == state(other)


def headed():
    head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    return nn.ModuleDict({"body": nn.Linear(4, 4), "head": head, "norm": nn.LayerNorm(2)})


@pytest.mark.parametrize("assign", [False, True])
def test_heads_that_have_learnt_nothing_start_from_the_checkpoint_and_others_stay(assign):
    """As A, B and DoRA's magnitude do; a head is one, with its statistics: none of it stays, or all."""
    for learnt in ([], ["head"], ["norm.bias"], ["head", "norm.bias"]):
        model, other = (
            minilora.inject(headed(), "body", LoRAConfig(r=2), trainable=["head", "norm.bias"]),
            headed(),
        )
        nn.init.normal_(other["norm"].bias)
        with torch.no_grad():
            if "head" in learnt:
                model["head"].train()(
                    torch.randn(8, 4)
                )  # which moves the statistics of the copy, and no more
            if "norm.bias" in learnt:
                model["norm"].trained.add_(1)
        before = {key: raw(t) for key, t in minilora.adapter_state_dict(model).items()}
        model.load_state_dict(other.state_dict(), assign=assign)
        for key, value in minilora.adapter_state_dict(model).items():
            stays = key.startswith("body.lora") or any(key.startswith(name) for name in learnt)
            assert raw(value) == (before[key] if stays else raw(other.state_dict()[key])), key
        assert all(p.requires_grad for p in minilora.trainable_parameters(model))
        assert len(minilora.trainable_parameters(model)) == 2 + 4 + 1
        for wrapper in (model["head"], model["norm"]):
            wrapper.reset_parameters()
        found = minilora.adapter_state_dict(model)
        for key, value in other.state_dict().items():
            assert key not in found or raw(found[key]) == raw(value), key


def test_a_head_made_without_values_starts_from_the_checkpoint():
    with torch.device("meta"):
        model = minilora.inject(MLP(), "up", trainable=["classifier", "down.weight"])
    source = MLP()
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model.classifier.trained.weight, source.classifier.weight)
    assert torch.equal(model.down.trained, source.down.weight)


def test_bare_checkpoint_assigned_to_a_trained_head_is_not_shared_with_its_original():
    model = minilora.inject(MLP(), "up", trainable=["classifier"])
    model.load_state_dict(MLP().state_dict(), assign=True)
    head = model.classifier
    assert head.base.weight.data_ptr() != head.trained.weight.data_ptr()
    assert (head.base.weight.requires_grad, head.trained.weight.requires_grad) == (False, True)


@on_grid
def test_state_dict_round_trip(case):
    model, twin = all_kinds(case), randomise(all_kinds(case), seed=1)
    twin.load_state_dict(model.state_dict())
    assert state(twin) == state(model)
    assert torch.equal(case.run(twin), case.run(model))


def test_missing_and_unexpected_keys_of_a_bare_checkpoint_are_reported_by_torch():
    model = minilora.inject(MLP(), "up")
    checkpoint = MLP().state_dict()
    del checkpoint["up.weight"]
    with pytest.raises(RuntimeError, match=r"Missing.*up\.base\.weight"):
        model.load_state_dict(checkpoint)
    with pytest.raises(RuntimeError, match=r"Unexpected.*up\.base\.stray"):
        model.load_state_dict(MLP().state_dict() | {"up.stray": torch.zeros(1)})


class Filling(nn.Linear):
    """A layer that fills in what an old checkpoint lacks, as loaders in the wild do."""

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        state_dict.setdefault(prefix + "bias", torch.zeros(self.out_features))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Refusing(nn.Linear):
    """A layer whose own loader cannot be called with less than all it wants."""

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        raise KeyError(prefix + "scale")


@pytest.mark.parametrize("kind", [Filling, Refusing])
@pytest.mark.parametrize("anew", [True, False])
def test_loading_an_adapter_does_not_run_the_bases_own_loader(kind, anew, tmp_path):
    def make():
        return nn.Sequential(kind(8, 8), nn.Linear(8, 8))

    source = randomise(minilora.inject(make(), "0", LoRAConfig(r=2), trainable=["1"]))
    minilora.save(source, tmp_path / "adapter.safetensors")
    model = make()
    model[0].weight.data.copy_(source[0].base.weight)
    before = raw(model[0].weight), raw(model[0].bias)
    layer = model[0]
    if not anew:
        minilora.inject(model, "0", LoRAConfig(r=2), trainable=["1"])
    minilora.load(model, tmp_path / "adapter.safetensors")
    assert (raw(layer.weight), raw(layer.bias)) == before
    assert raw(model[0].lora_B) == raw(source[0].lora_B)


def test_saved_state_is_given_and_taken_in_place():
    model = minilora.inject(MLP(), "up", trainable="classifier")
    minilora.inject(model, "up", AdapterConfig(bottleneck=2))
    wrappers = [wrapper for found in injected_modules(model).values() for wrapper in found]
    assert [wrapper.kind for wrapper in wrappers] == ["adapter", "lora", "trainable"]
    for wrapper in wrappers:
        before = wrapper.saved_state()
        values = {name: torch.randn_like(tensor) for name, tensor in before.items()}
        wrapper.load_saved_state(values)
        for name, tensor in wrapper.saved_state().items():
            assert tensor is before[name]
            assert raw(tensor) == raw(values[name])


class WithBase(nn.Module):
    """A block that has a child of the name which wrappers use."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)

    def forward(self, x):
        return self.other(self.base(x))


def around(model):
    return minilora.inject(model, "0", AdapterConfig(bottleneck=2, hidden_size=4))


def copied(model):
    return minilora.inject(model, "1", LoRAConfig(r=2), trainable=["0"])


def inside(model):
    return minilora.inject(model, ["0.base", "1"], LoRAConfig(r=2))


@pytest.mark.parametrize("inject", [around, copied, inside])
@pytest.mark.parametrize("of", ["bare", "injected"])
def test_base_with_a_child_called_base(inject, of):
    def make():
        return nn.Sequential(WithBase(), nn.Linear(4, 4))

    model = inject(make())
    assert list(Sites(model)) == ["0", "0.base", "0.other", "1"]
    source = make() if of == "bare" else randomise(inject(make()))
    model.load_state_dict(source.state_dict())
    x = torch.randn(3, 4)
    assert_equal_to_rounding(model(x), source(x))
    for side in (model, source) if of == "injected" else (model,):
        minilora.eject(side)
    assert state(model) == state(source)


def test_nothing_is_replaced_when_nothing_matches():
    model = MLP()
    before = picture(model)
    replace_modules(model, {nn.Linear(1, 1): nn.Identity()})
    assert picture(model) == before
    assert not any(isinstance(module, InjectedModule) for module in model.modules())


def test_outputs_after_a_bare_checkpoint():
    model = randomise(minilora.inject(MLP(), ["up", "down"]))
    other = MLP()
    model.load_state_dict(other.state_dict())
    x = torch.randn(2, 16)
    with minilora.disabled(model):
        assert_equal_to_rounding(model(x), other(x))
