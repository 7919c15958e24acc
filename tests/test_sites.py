"""Site and Sites: one walk over a model, and the names that it had before any injection."""

import pytest
import torch
from checks import picture
from models import CASES, MLP, Shared, on_grid
from torch import nn

import minilora
from minilora import AdapterConfig, LoRAConfig, MiniLoRAError
from minilora.module import InjectedModule
from minilora.names import ends
from minilora.sites import Sites, injected_sites, replace_modules, require_enabled, require_injected


@on_grid
def test_the_walk_is_that_of_named_modules(case):
    model = case.build()
    named = dict(list(model.named_modules(remove_duplicate=False))[1:])
    assert list(Sites(model)) == list(named)
    assert all(site.bare is named[name] and not site.wrappers for name, site in Sites(model).items())
    assert [site.name for site in Sites(model).unique()] == list(dict(model.named_modules()))[1:]


@on_grid
def test_names_and_bare_modules_are_the_same_before_and_after(case):
    model = case.build()
    before = [(name, site.bare) for name, site in Sites(model).items()]
    head = [name for name in ("classifier",) if hasattr(model, name)]
    minilora.inject(model, case.targets, LoRAConfig(r=2), trainable=head)
    assert [(name, site.bare) for name, site in Sites(model).items()] == before
    assert not any(isinstance(site.bare, InjectedModule) for site in Sites(model).values())
    minilora.eject(model)
    assert [(name, site.bare) for name, site in Sites(model).items()] == before


def test_wrappers_are_the_outermost_first():
    model = minilora.inject(MLP(), "up", LoRAConfig(r=2))
    bare = model.up.base
    minilora.inject(model, "up", AdapterConfig(bottleneck=2))
    site = Sites(model)["up"]
    assert [wrapper.kind for wrapper in site.wrappers] == ["adapter", "lora"]
    assert site.outermost is model.up is site.wrappers[0]
    assert site.bare is bare
    assert Sites(model)["down"].outermost is Sites(model)["down"].bare is model.down
    assert list(injected_sites(model)) == ["up"]
    assert injected_sites(MLP()) == {}


def test_a_shared_module_has_every_name_and_is_known_by_the_first():
    sites = Sites(Shared())
    assert {"first", "again", "stack.0", "stack.1"} < set(sites)
    assert sites.shared() == {"first", "again", "stack.1"}
    assert [sites.first_name(sites[name]) for name in ("again", "stack.1", "stack.0")] == [
        "first",
        "first",
        "stack.0",
    ]
    assert [site.name for site in sites.unique()] == ["first", "stack", "stack.0"]
    assert sites.by_end["again"] == ["first"]


def test_modules_by_the_ends_of_their_names():
    sites = Sites(CASES["bert"].build())
    for end in {end for name in sites for end in ends(name)}:
        assert sites.by_end[end] == [name for name in sites if end in ends(name)]
    assert len(sites.by_end["query"]) == 2


def test_what_an_injection_needs_of_a_model():
    with pytest.raises(MiniLoRAError, match=r"this MLP carries no injection .*minilora\.inject\(model"):
        require_injected(MLP())
    model = minilora.inject(MLP(), "up")
    assert list(require_injected(model)) == list(require_enabled(model, "merge")) == ["up"]
    with (
        minilora.disabled(model),
        pytest.raises(MiniLoRAError, match=r"merge cannot work inside minilora\.disabled; leave its block"),
    ):
        require_enabled(model, "merge")


def test_a_swap_that_fails_half_way_is_taken_back(monkeypatch):
    model = Shared()
    old, before = model.first, picture(model)
    calls = []
    real = minilora.sites.put_child

    def failing(parent, name, child):
        calls.append(name)
        if len(calls) == 2:
            raise MemoryError
        real(parent, name, child)

    monkeypatch.setattr("minilora.sites.put_child", failing)
    with pytest.raises(MemoryError):
        replace_modules(model, {old: nn.Identity()})
    assert len(calls) > 2
    assert picture(model) == before


def test_what_fsdp1_has_flattened_is_refused_with_the_fix():
    model = MLP()
    model.up.weight._fsdp_flattened = True
    with pytest.raises(MiniLoRAError, match=r"'up.weight' are flattened by FSDP: inject or load first"):
        minilora.inject(model, "down")


def test_a_distributed_tensor_is_known_by_its_type_without_importing_it():
    class DTensor(torch.Tensor):
        pass

    model = MLP()
    model.up.weight = nn.Parameter(model.up.weight.detach().as_subclass(DTensor))
    with pytest.raises(MiniLoRAError, match=r"'up.weight': sharded .*fully_shard"):
        minilora.inject(model, "down")
