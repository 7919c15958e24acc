"""Manifest and build: what shall stand where becomes wrappers, or every problem at once."""

import torch
from checks import Is, randomise, unchanged
from models import MLP, Shared, Tied
from torch import nn

import minilora
from minilora import AdapterConfig, LoRAConfig
from minilora.manifest import Manifest, grouped
from minilora.plan import build
from minilora.problems import Problems
from minilora.sites import Sites, injected_sites

SMALL, BOTTLENECK = LoRAConfig(r=2), AdapterConfig(bottleneck=2)
OVERLAPS = "trainable names what is, contains or lies inside an injected site or another trainable module"
UNTIES = "a trained copy would untie them."


def lines(model, injections=(), trainable=()):
    """Return the problems that a manifest has on a model, which is left as it was."""
    with unchanged(model):
        return build(Manifest(tuple(injections), tuple(trainable)), Sites(model))[1].lines()


def test_a_manifest_of_a_model_builds_the_same_on_a_bare_one():
    model = minilora.inject(MLP(), "up", SMALL, trainable="classifier")
    minilora.inject(model, ["up", "down"], BOTTLENECK)
    manifest = Manifest.of(injected_sites(model))
    assert manifest.trainable == ("classifier",)
    assert manifest.placed() == {
        ("up", "lora"): SMALL,
        ("up", "adapter"): BOTTLENECK,
        ("down", "adapter"): BOTTLENECK,
        ("classifier", "trainable"): None,
    }
    twin = MLP()
    plan, problems = build(manifest, Sites(twin))
    assert not problems
    assert [(name, [w.kind for w in site.wrappers]) for name, site in plan.sites().items()] == [
        ("up", ["adapter", "lora"]),
        ("down", ["adapter"]),
        ("classifier", ["trainable"]),
    ]
    plan.put_in_place()
    assert Manifest.of(injected_sites(twin)) == manifest


def test_a_manifest_leaves_out_what_brings_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert Manifest.of(injected_sites(minilora.inject(model, "0", SMALL))) == Manifest(((SMALL, ("0",)),), ())


def test_sites_of_one_config_are_grouped():
    other = LoRAConfig(r=3)
    assert grouped([(SMALL, "a"), (other, "b"), (LoRAConfig(r=2), "c")]) == (
        (SMALL, ("a", "c")),
        (other, ("b",)),
    )


def test_building_touches_nothing_until_it_is_put_in_place():
    model = Shared()
    with unchanged(model):
        plan, _ = build(Manifest(((SMALL, ("first",)),), ()), Sites(model))
    layer = model.first
    plan.put_in_place()
    assert model.first is model.again is model.stack[1] is plan.wrappers["first"][0]
    assert model.first.base is layer


def test_without_values_parameters_are_on_meta():
    model = MLP()
    plan, _ = build(
        Manifest(((SMALL, ("up",)), (BOTTLENECK, ("up",))), ()), Sites(model), without_values=True
    )
    tensors = [t for wrapper in plan.wrappers["up"] for t in wrapper.saved_state().values()]
    assert len(tensors) == 6
    assert all(tensor.is_meta for tensor in tensors)


def test_problems_are_collected_and_grouped():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3)])
    names = [f"{i}.1" for i in range(3)]
    assert lines(model, [(SMALL, (*names, "0.0", "0.0", "9.0"))], ["0.1", "1.0", "1.0"]) == [
        "'*.*' (x3): GELU has no weight of its own",
        "'0.0': listed twice for lora",
        "'9.0': the model has no such module or parameter",
        f"'0.1': {OVERLAPS} ('0.1'); choose one of the two",
        "'1.0': listed twice to be trained in full",
    ]


def test_a_shared_module_goes_by_its_first_name():
    first = "the model has this module first as 'first', and files name it so"
    assert lines(Shared(), [(SMALL, ("again",))], ["stack.1"]) == [
        f"'again': {first}",
        f"'stack.1': to be trained in full, but {first}",
    ]


def test_what_is_there_already_is_named():
    model = randomise(minilora.inject(MLP(), "up", SMALL, trainable="classifier"))
    assert lines(model, [(SMALL, ("up", "classifier"))], ["up"]) == [
        "'up': carries LoRA r=2 alpha=16 already; leave it out with exclude=..., or call "
        "minilora.eject(model) first",
        "'classifier': lies in 'classifier', which is trained in full; leave it out with exclude=...",
        f"'up': {OVERLAPS} ('up'); choose one of the two",
    ]


def test_a_tie_is_named_with_what_can_be_done():
    assert lines(Tied(), trainable=["head", "embedding"]) == [
        f"'head': trainable names a module whose weight is tied to 'embedding.weight'; {UNTIES} Give it as "
        "a target for LoRA instead, or untie the weights first",
        f"'embedding': trainable names a module whose weight is tied to 'head.weight'; {UNTIES} Give it as "
        "a target for LoRA instead, or untie the weights first",
    ]


def test_problems_of_the_same_text_are_one_line():
    problems = Problems()
    assert not problems
    for site in ("a.0", "a.1", "b"):
        problems.add(site, "is odd")
    problems.add("c", "is even")
    assert len(problems) == 2
    assert problems.lines() == ["'a.*' (x2), 'b': is odd", "'c': is even"]
    assert problems.lines(lambda sites: f"; {len(sites)}") == [
        "'a.*' (x2), 'b': is odd; 3",
        "'c': is even; 1",
    ]


def test_statistics_are_frozen_whatever_is_asked_for():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    norm = model[1]
    plan, problems = build(Manifest((), ()), Sites(model))
    assert not problems
    assert [Is(module) for module in plan.replacements] == [Is(norm)]
    plan.put_in_place()
    model.train()(torch.randn(3, 4))
    assert not norm.running_mean.any()
