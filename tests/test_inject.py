"""inject and eject: an identity, all or nothing, and the very same model back."""

import contextlib
import copy
import random
import re
import sys

import pytest
import torch
from checks import (
    Is,
    assert_equal_to_rounding,
    assert_far,
    frozen,
    injected_modules,
    interrupted,
    picture,
    randomise,
    raw,
    reference,
    state,
    unchanged,
)
from models import CASES, MLP, Attention, Shared, Tied, in_dtypes, on_adapter_sites, on_grid
from torch import nn

import minilora
from minilora import AdapterConfig, LoRAConfig, TargetError
from minilora.files.loading import meant_instead
from minilora.frozen import keeps_statistics
from minilora.manifest import Manifest
from minilora.plan import build
from minilora.sites import Sites


def adapter_targets(case):
    """Return where a bottleneck adapter can stand: anywhere but on the out_proj of nn.MultiheadAttention."""
    return [target for target in case.targets if target != "out_proj"]


def inject_adapters(case, model, **options):
    config = AdapterConfig(bottleneck=4, **options)
    return minilora.inject(model, adapter_targets(case), config, trainable=())


@on_grid
@in_dtypes
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_injection_is_a_bit_exact_identity(case, dtype, mode):
    model = getattr(case.build(dtype), mode)()
    expected = case.run(frozen(model))
    minilora.inject(model, case.targets, trainable=())
    assert raw(case.run(model)) == raw(expected)
    assert all(m.training is (mode == "train") for m in model.modules() if not keeps_statistics(m))


@on_adapter_sites
@in_dtypes
@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_adapter_injection_is_a_bit_exact_identity(case, dtype, placement):
    # In eval the fused path of nn.TransformerEncoderLayer rounds otherwise.
    model = case.build(dtype).train()
    expected = case.run(frozen(model))
    inject_adapters(case, model, placement=placement)
    assert raw(case.run(model)) == raw(expected)


@on_grid
@in_dtypes
def test_outputs_are_those_of_the_formula(case, dtype):
    bare = case.build(dtype)
    model = randomise(minilora.inject(copy.deepcopy(bare), case.targets, trainable=()))
    expected = case.run(reference(bare, model))
    assert_far(expected, case.run(bare))
    assert_equal_to_rounding(case.run(model), expected)


@on_grid
def test_outputs_are_those_of_the_formula_under_autocast(case):
    bare = case.build()
    model = randomise(minilora.inject(copy.deepcopy(bare), case.targets, trainable=()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = case.run(model)
        expected = case.run(reference(bare, model))
    assert_equal_to_rounding(actual.bfloat16(), expected.bfloat16())


def train_a_step(case, model):
    before = picture(model)
    optimizer = torch.optim.AdamW(minilora.trainable_parameters(model), lr=0.1)
    for _ in range(2):  # B is zero at first, so that A moves at the second step only
        case.call(model.train()).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return {name for name, content in picture(model)["state"].items() if content != before["state"][name]}


@on_grid
@in_dtypes
def test_a_step_changes_the_update_and_not_one_byte_of_the_base(case, dtype):
    model = case.build(dtype)
    bare = state(model)
    minilora.inject(model, case.targets, trainable=())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name in dict(model.named_parameters()) if "lora_" in name
    }
    changed = train_a_step(case, model)
    saved = set(minilora.adapter_state_dict(model))
    assert saved <= changed
    assert {name for name in changed if "lora_" not in name} == set()
    minilora.eject(model)
    assert state(model) == bare


@on_adapter_sites
def test_a_step_of_an_adapter_leaves_the_base(case):
    model = inject_adapters(case, case.build())
    changed = train_a_step(case, model)
    assert changed
    assert all(".adapter_" in name for name in changed)


@on_grid
@in_dtypes
def test_eject_gives_the_very_same_model_back(case, dtype):
    model, merging = case.build(dtype), dtype == torch.bfloat16
    # On the model itself, or, where nothing is merged, on what is often a site.
    hooked = model if merging else model.get_submodule(list(dict(model.named_modules()))[-1])
    hook = hooked.register_forward_hook(lambda *_: None)
    before = picture(model)
    minilora.inject(model, case.targets, trainable=())
    if case.targets[-1] != "out_proj":
        minilora.inject(model, case.targets[-1], AdapterConfig(bottleneck=2), trainable=())
    randomise(model)
    if merging:
        minilora.merge(model, skip_adapters=True)
    minilora.eject(model)
    model.requires_grad_(True)
    assert picture(model) == before
    hook.remove()


def test_eject_leaves_the_base_frozen():
    model = minilora.eject(minilora.inject(MLP(), "up"))
    assert not any(p.requires_grad for p in model.parameters())


def test_eject_inside_disabled_is_refused():
    model = minilora.merge(randomise(minilora.inject(MLP(), "up")))
    with (
        minilora.disabled(model),
        unchanged(model),
        pytest.raises(minilora.MiniLoRAError, match="leave its block"),
    ):
        minilora.eject(model)
    assert model.up.merged


def test_returns_the_model_itself():
    model = MLP()
    assert minilora.inject(model, "up") is model
    assert minilora.eject(model) is model


def test_shared_module_is_injected_once_and_everywhere():
    model = Shared()
    layer = model.first
    minilora.inject(model, "again")
    assert model.first is model.again is model.stack[1]
    assert model.first.base is layer
    assert list(minilora.adapter_state_dict(model)) == ["first.lora_A", "first.lora_B"]
    minilora.eject(model)
    assert model.first is model.again is model.stack[1] is layer


def test_tied_weight_stays_tied():
    model = Tied()
    minilora.inject(model, "head")
    assert model.head.base.weight is model.embedding.weight
    minilora.eject(model)
    assert model.head.weight is model.embedding.weight


BAD = {
    "typo among good targets": ({"targets": ["up", "dwon"]}, "'dwon' matches no module; nearest: 'down'"),
    "no match": ({"targets": "nothing"}, "'nothing' matches no module"),
    "no targets": ({"targets": []}, "targets: none given"),
    "unsupported site": ({"targets": ["up", "act"]}, "'act': Tanh has no weight of its own"),
    "width unknown": (
        {"targets": ["up", "act"], "config": AdapterConfig()},
        r"'act': the output width of Tanh .*hidden_size=",
    ),
    "trained and adapted": (
        {"targets": ["up"], "trainable": "up"},
        r"'up': trainable names what is.*choose one of the two",
    ),
    "typo in trainable": (
        {"targets": ["up"], "trainable": "clasifier"},
        "trainable: 'clasifier' matches no module; nearest: 'classifier'",
    ),
    "typo in exclude": (
        {"targets": ["up"], "exclude": "dwon"},
        "exclude: 'dwon' matches no module; nearest: 'down'",
    ),
}


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("injected", [False, True])
def test_bad_input_leaves_the_model_as_it_was(arguments, says, injected):
    model = MLP()
    model.act = nn.Tanh()
    if injected:
        randomise(minilora.inject(model, "down"))
    with unchanged(model), pytest.raises(TargetError, match=says):
        minilora.inject(model, **arguments)


@pytest.mark.parametrize("config", [LoRAConfig(r=2), AdapterConfig(bottleneck=2)])
@pytest.mark.parametrize("nested", [False, True])
def test_double_injection_is_refused(config, nested):
    model = minilora.inject(MLP(), "up", config)
    if nested:
        minilora.inject(model, "up", {LoRAConfig: AdapterConfig(), AdapterConfig: LoRAConfig()}[type(config)])
    randomise(model)
    for again in (config, type(config)()):
        says = r"'up': carries (LoRA r=2|adapter m=2).* already; leave it out with exclude=\.\.\., or .*eject"
        with unchanged(model), pytest.raises(TargetError, match=says):
            minilora.inject(model, ["up", "down"], again)


def test_config_of_another_type_is_refused():
    model = MLP()
    for config in ({"r": 4}, LoRAConfig, None):
        with (
            unchanged(model),
            pytest.raises(TypeError, match="must be a LoRAConfig, an AdapterConfig or a RowsConfig"),
        ):
            minilora.inject(model, "up", config)


def test_config_of_a_subclass_is_its_kind():
    kind = type("MyConfig", (LoRAConfig,), {})
    assert isinstance(minilora.inject(MLP(), "up", kind(r=2)).up, minilora.LoRALinear)


def test_failure_while_building_changes_nothing(monkeypatch):
    model = MLP()
    real, calls = minilora.LoRALinear.reset_parameters, []

    def out_of_memory(self, site=""):
        calls.append(site)
        if len(calls) == 2:
            raise MemoryError
        real(self, site)

    monkeypatch.setattr(minilora.LoRALinear, "reset_parameters", out_of_memory)
    with unchanged(model), pytest.raises(MemoryError):
        minilora.inject(model, ["up", "down"])


@pytest.mark.slow
def test_interrupted_at_any_line_a_model_is_injected_or_it_is_not():
    """And ejected or not: a shared layer stands at three places, of which no two may differ.

    Frozen or not, likewise, its BatchNorm's statistics included.
    """
    at, seen = 0, set()
    lora = [f"{layer}.lora_{matrix}" for layer in ("first", "stack.0") for matrix in "AB"]
    while True:
        model = Shared()
        model.norm = nn.BatchNorm1d(4)
        bare, everything = list(model.modules()), [name for name, _ in model.named_parameters()]
        came = interrupted(lambda model=model: minilora.inject(model, ["first", "stack.0"]), at := at + 1)
        wrapped = isinstance(model.first, minilora.LoRALinear)
        assert isinstance(model.stack[0], minilora.LoRALinear) == wrapped
        assert model.first is model.again is model.stack[1]
        seen.add(wrapped)
        training = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert training == (lora if wrapped else everything)
        assert isinstance(model.norm, minilora.FrozenStatistics) == wrapped
        assert (model.norm.base if wrapped else model.norm).training != wrapped
        if not came:
            break
        if wrapped:
            minilora.eject(model)
        assert list(model.modules()) == bare
    assert seen == {False, True}
    came, at = True, 0
    while came:
        minilora.inject(model := Shared(), ["first", "stack.0"])
        came = interrupted(lambda model=model: minilora.eject(model), at := at + 1)
        assert isinstance(model.stack[0], minilora.LoRALinear) == isinstance(model.first, minilora.LoRALinear)
        assert model.first is model.again is model.stack[1]


@torch.no_grad()
@pytest.mark.parametrize("first", ["lora", "adapter"])
def test_both_kinds_on_one_site_whatever_the_order(first):
    configs = [LoRAConfig(r=2), AdapterConfig(bottleneck=2)]
    model, x = MLP(), torch.randn(2, 16)
    expected = frozen(model)(x)
    for config in configs if first == "lora" else reversed(configs):
        minilora.inject(model, "up", config)
    assert [wrapper.kind for wrapper in injected_modules(model)["up"]] == ["adapter", "lora"]
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_nested_sites():
    """An adapter around a block, LoRA on a layer inside it, and the other way round."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    before, x = picture(model), torch.randn(3, 4)
    expected = frozen(model)(x)
    minilora.inject(model, ["0", "0.0"], AdapterConfig(bottleneck=2))
    minilora.inject(model, "0.0", LoRAConfig(r=2))
    assert {site: [w.kind for w in found] for site, found in injected_modules(model).items()} == {
        "0": ["adapter"],
        "0.0": ["adapter", "lora"],
    }
    assert torch.equal(model(x), expected)
    randomise(model)
    assert not torch.equal(model(x), expected)
    minilora.eject(model).requires_grad_(True)
    assert picture(model) == before


def test_second_injection_leaves_the_first_trainable_and_as_it_is():
    model = randomise(minilora.inject(MLP(), "up", trainable="classifier"))
    first = {key: raw(tensor) for key, tensor in minilora.adapter_state_dict(model).items()}
    minilora.inject(model, "down", LoRAConfig(r=2))
    assert {
        key: raw(tensor) for key, tensor in minilora.adapter_state_dict(model).items()
    }.items() >= first.items()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        *(f"{site}.lora_{half}" for site in ("up", "down") for half in "AB"),
        "classifier.trained.weight",
        "classifier.trained.bias",
    }


def test_root_module_is_no_site():
    model = nn.Linear(4, 4)
    for targets in ("all-linear", "", lambda name, module: True):
        with unchanged(model), pytest.raises(TargetError, match=r"matches no module|of the model itself"):
            minilora.inject(model, targets)


def initial(order, seed=0):
    model = MLP()
    torch.manual_seed(seed)
    for names in order:
        minilora.inject(model, names, LoRAConfig(r=2))
    minilora.inject(model, "classifier", AdapterConfig(bottleneck=2))
    return {key: raw(tensor) for key, tensor in minilora.adapter_state_dict(model).items()}


def test_initial_values_follow_from_the_seed_and_the_name_alone():
    first = initial([["up", "down"]])
    assert initial([["down"], ["up"]]) == first
    torch.randn(7)  # whatever was drawn before
    assert initial([["up", "down"]]) == first
    other = initial([["up", "down"]], seed=1)
    drawn = [key for key in first if key.endswith(("lora_A", "adapter_down.weight"))]
    assert len(drawn) == 3
    assert all(other[key] != first[key] for key in drawn)


def test_equal_layers_start_from_different_values():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    minilora.inject(model, "all-linear", LoRAConfig(r=2))
    minilora.inject(model, ["0", "1"], AdapterConfig(bottleneck=2))
    assert raw(model[0].base.lora_A) != raw(model[1].base.lora_A)
    assert raw(model[0].adapter_down.weight) != raw(model[1].adapter_down.weight)


def test_random_state_is_left_alone():
    model = MLP()
    before = torch.get_rng_state(), random.getstate()
    minilora.inject(model, "up", trainable="classifier")
    minilora.inject(model, "up", AdapterConfig())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_initial_values_are_the_same_in_every_dtype():
    full = minilora.inject(MLP(), "up").up.lora_A
    half = minilora.inject(MLP().bfloat16(), "up", LoRAConfig(dtype=torch.bfloat16)).up.lora_A
    assert torch.equal(half, full.bfloat16())


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_frozen_head_warns_and_says_how_to_change_it(name):
    model = CASES[name].build()
    says = r"'classifier' of this \w+ stays frozen.*pass trainable=\['classifier'\]; if frozen is meant.*\(\)"
    with pytest.warns(UserWarning, match=says) as caught:
        minilora.inject(model, CASES[name].targets)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", ["t5", "gpt2", "llama", "mlp", "encoder"])
def test_no_head_no_warning(name):
    minilora.inject(CASES[name].build(), CASES[name].targets)  # a warning is an error here


@pytest.mark.parametrize("trainable", [(), "classifier"])
def test_told_what_to_do_with_the_head_nothing_warns(trainable):
    minilora.inject(CASES["bert"].build(), "query", trainable=trainable)


def test_adapted_head_does_not_warn():
    model = minilora.inject(CASES["bert"].build(), ["query", "classifier"], LoRAConfig(r=2))
    minilora.inject(model, "key", LoRAConfig(r=2))


def test_a_warning_turned_into_an_error_leaves_the_model_as_it_was():
    model = CASES["bert"].build()
    with unchanged(model), pytest.raises(UserWarning):
        minilora.inject(model, "query")


def test_tie_weights_after_injection_keeps_the_update_and_the_tie():
    model = randomise(minilora.inject(CASES["gpt2"].build(), ["c_attn", "lm_head"]))
    head, expected = model.lm_head, CASES["gpt2"].run(model)
    model.transformer.wte.weight = nn.Parameter(model.transformer.wte.weight.detach().clone())
    assert head.base.weight is not model.transformer.wte.weight
    model.tie_weights()
    assert model.lm_head is head
    assert head.base.weight is model.transformer.wte.weight
    assert_equal_to_rounding(CASES["gpt2"].run(model), expected)


def test_tying_merged_weights_is_refused():
    model = minilora.merge(randomise(minilora.inject(CASES["gpt2"].build(), "lm_head")))
    model.transformer.wte.weight = nn.Parameter(model.transformer.wte.weight.detach().clone())
    with pytest.raises(minilora.MiniLoRAError, match=r"'weight' cannot be set on a merged layer; .*unmerge"):
        model.tie_weights()


@pytest.mark.parametrize("training", [True, False])
def test_attention_keeps_its_own_output_where_gradients_are_computed(training):
    """To rounding: attention computes with out_proj's `.weight`, and torch chooses by what that requires."""
    model = Attention().train(training)
    x = torch.randn(2, 3, 16)
    expected = model(x)
    minilora.inject(model, "all-linear")
    assert_equal_to_rounding(model(x), expected)


class Offloaded(nn.Module):
    """What accelerate's offloading meets: a layer, a block of several, a head."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.block(self.layer(x)))


@pytest.mark.parametrize(
    ("part", "arguments"),
    [
        ("layer", {"targets": "layer"}),
        ("layer", {"targets": "layer", "config": AdapterConfig(bottleneck=2)}),
        ("block", {"targets": "block", "config": AdapterConfig(bottleneck=2, hidden_size=8)}),
        ("head", {"targets": "layer", "trainable": ["head"]}),
        ("block", {"targets": "layer", "trainable": ["block"]}),
    ],
)
def test_weights_that_are_offloaded_are_refused(part, arguments):
    """Between calls they are on the meta device: what is made beside them would be without values."""
    accelerate = pytest.importorskip("accelerate")
    model, x = Offloaded(), torch.randn(3, 8)
    expected = model(x)
    accelerate.cpu_offload(getattr(model, part), execution_device=torch.device("cpu"))
    before = list(map(Is, model.modules())), list(map(Is, model.parameters()))
    with pytest.raises(TargetError, match=r"offloaded.*inject or load first, then dispatch"):
        minilora.inject(model, **arguments)
    assert (list(map(Is, model.modules())), list(map(Is, model.parameters()))) == before
    assert_equal_to_rounding(model(x), expected)


def test_injected_first_and_offloaded_then_it_computes_and_trains():
    accelerate = pytest.importorskip("accelerate")
    model, x = minilora.inject(Offloaded(), ["layer", "block.0"], trainable=["head"]), torch.randn(3, 8)
    expected = randomise(model)(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.layer.base.weight.is_meta
    assert_equal_to_rounding(model(x), expected)


@pytest.mark.parametrize("managed", ["dispatched", "hooked"])
def test_a_model_that_accelerate_holds_in_memory_is_injected_merged_and_trained(managed):
    """As `device_map="auto"` leaves a model that fits: its layers have a hook, their weights are here."""
    accelerate = pytest.importorskip("accelerate")
    model, x = Offloaded(), torch.randn(3, 8)
    if managed == "dispatched":
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    else:
        for module in model.modules():
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook())
    minilora.inject(model, ["layer", "block.0"])
    expected = randomise(model)(x)
    for tokens in (1, 200):
        model(torch.randn(tokens, 8)).sum().backward()
    assert model.layer.lora_A.grad.any()
    minilora.merge(model.eval())
    assert_equal_to_rounding(model(x), expected)


def test_no_targets_are_fine_where_trainable_names_something():
    model = minilora.inject(MLP(), [], trainable=["classifier"])
    assert list(minilora.adapter_state_dict(model)) == ["classifier.weight", "classifier.bias"]
    model = MLP()
    for trainable in ((), [], None):
        with unchanged(model), pytest.raises(TargetError, match=r"1 problem.*\n  - targets: none given"):
            minilora.inject(model, [], trainable=trainable)
    with unchanged(model), pytest.raises(TargetError, match=r"1 problem.*\n  - trainable: 'clasifier'"):
        minilora.inject(model, [], trainable=["clasifier"])


@pytest.mark.peft
def test_a_layer_that_peft_wraps_is_refused_with_the_fix():
    peft = pytest.importorskip("peft")
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["up"], r=2), MLP())
    says = r"is wrapped by PEFT already, or .*; take PEFT's layers out first: model = model\.unload\(\)"
    for target in ("up", "base_layer"):
        with unchanged(model), pytest.raises(TargetError, match=f"'up.*': {says}"):
            minilora.inject(model, target)
        with unchanged(model), pytest.raises(TargetError, match=f"'up.*': {says}"):
            minilora.inject(model, "down", trainable=[target])
    minilora.inject(model, "down")


@pytest.mark.peft
def test_layers_that_peft_wraps_are_one_line_and_what_is_in_them_is_no_advice():
    peft = pytest.importorskip("peft")
    stack = nn.Sequential(*(nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(12)))
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q"], r=2), stack)
    with (
        unchanged(model),
        pytest.raises(TargetError, match=r"'\*\.q' \(x12\): is wrapped by PEFT") as caught,
    ):
        minilora.inject(model, ["q"], trainable=["0"])
    assert len(str(caught.value).splitlines()) == 5  # two problems, and the table
    assert "lora_A" not in str(caught.value)
    assert "base_layer" not in str(caught.value)
    assert "*.v  Linear 4 -> 4  x12" in str(caught.value)


def test_overlaps_in_every_layer_of_a_stack_are_one_line():
    stack = nn.Sequential(*(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(12)))
    with unchanged(stack), pytest.raises(TargetError, match=r"1 problem.*\n.*'\*\.q' \(x12\): .*\('\*\.q'\)"):
        minilora.inject(stack, "q", trainable="q")
    minilora.inject(stack, [], trainable="q")
    with (
        unchanged(stack),
        pytest.raises(TargetError, match=r"1 problem.*\n.*'\*\.q' \(x12\): lies in '\*\.q'"),
    ):
        minilora.inject(stack, "q")
    grus = nn.Sequential(*(nn.GRUCell(4, 4) for _ in range(12)))
    says = r"1 problem.*\n.*'\*' \(x12\): GRUCell has no weight .*; give 'weight_ih', 'weight_hh' of it as"
    with unchanged(grus), pytest.raises(TargetError, match=says):
        minilora.inject(grus, lambda name, module: isinstance(module, nn.GRUCell))


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("target_modules", r"inject\(model, targets=\[\.\.\.\]\)"),
        ("modules_to_save", r"trainable=\[\.\.\.\]\)"),
        ("lora_alpha", r"LoRAConfig\(alpha=\.\.\.\)"),
        ("r", r"LoRAConfig\(r=\.\.\.\)"),
        ("peft_config", r"config=LoRAConfig\(\.\.\.\)"),
    ],
)
def test_words_of_other_libraries_are_answered_with_ours(word, ours):
    model = MLP()
    with unchanged(model), pytest.raises(minilora.MiniLoRAError) as caught:
        minilora.inject(model, "up", **{word: 1})
    assert re.search(rf"inject has no argument '{word}': here it is .*{ours}", str(caught.value))
    assert str(caught.value).endswith("inject takes model, targets, config, trainable, exclude")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("bert-base-uncased", "nn.Module, not 'bert-base-uncased' of type str; the model comes first"),
        (None, "not None of type NoneType"),
        (MLP, "not the class MLP: make an instance of it first"),
        ({"up": 1}, "not {'up': 1} of type dict"),
        (list(range(1000)), "of type list"),
    ],
)
def test_what_is_no_model_is_named(value, says):
    for act in (
        lambda model: minilora.inject(model, "up"),
        minilora.eject,
        minilora.freeze,
        minilora.merge,
        minilora.unmerge,
        minilora.fuse,
        minilora.summary,
        minilora.trainable_parameters,
        minilora.adapter_state_dict,
        lambda model: minilora.disabled(model).__enter__(),
    ):
        with pytest.raises(minilora.MiniLoRAError, match=says) as caught:
            act(value)
        assert len(str(caught.value)) < 300
        assert "minilora.load" not in str(caught.value)


class TheirConfig:
    """As PEFT's LoraConfig."""

    peft_type, r, lora_alpha, lora_dropout, use_rslora = "LORA", 4, 8, 0.1, True


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"r": 8}, r"not {'r': 8}; write config=minilora\.LoRAConfig\(r=\.\.\., alpha=\.\.\.\)"),
        (LoRAConfig, r"make one: LoRAConfig\(\.\.\.\)"),
        (TheirConfig(), r"PEFT's; write .*LoRAConfig\(r=4, alpha=8, dropout=0\.1, rslora=True\)$"),
    ],
)
def test_what_is_no_config_is_answered_with_one(config, says):
    model = MLP()
    with unchanged(model), pytest.raises(TypeError, match=says):
        minilora.inject(model, "up", config)


def test_a_rank_above_the_smaller_side_is_honoured_with_one_warning():
    model = CASES["bert"].build()
    with pytest.warns(UserWarning, match="r exceeds the smaller side") as caught:
        minilora.inject(model, ["query", "classifier"], LoRAConfig(r=20), trainable=())
    assert [w.filename for w in caught] == [__file__]
    named = "'bert.encoder.layer.*.attention.self.query' (x2), 'classifier': r exceeds"
    assert str(caught[0].message).startswith(named)
    assert model.classifier.lora_A.shape == (20, 16)


def test_a_rank_of_the_smaller_side_does_not_warn():
    minilora.inject(MLP(), ["up", "classifier"], LoRAConfig(r=3))


def test_where_something_else_is_wrong_the_rank_is_not_the_matter():
    with pytest.raises(TargetError):  # a warning would be an error here
        minilora.inject(MLP(), ["classifier", "no_such"], LoRAConfig(r=20))


def counted(act):
    """Return how many calls of functions, Python's and C's, it takes."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        with contextlib.suppress(TargetError):
            act()
    finally:
        sys.setprofile(before)
    return calls


def many(n):
    return nn.Sequential(
        *[nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4)) for _ in range(n)]
    )


def misfits(model, names):
    """Return what `load` says of a file with LoRA at these sites."""
    sites = Sites(model)
    _, problems = build(Manifest(((LoRAConfig(r=2), tuple(names)),), ()), sites)
    return problems.lines(lambda names: meant_instead(names, sites))


def of_kind(kind):
    return lambda name, module: isinstance(module, kind)


WORK = {
    "every site fits": lambda n: minilora.inject(many(n), "all-linear", LoRAConfig(r=2)),
    "every site has a rank too wide": lambda n: minilora.inject(many(n), "all-linear", LoRAConfig(r=8)),
    "every site fails": lambda n: minilora.inject(many(n), of_kind(nn.LayerNorm)),
    "every site is a container": lambda n: minilora.inject(many(n), of_kind(nn.Sequential)),
    "every site is named": lambda n: minilora.inject(many(n), [f"{i}.0" for i in range(n)], LoRAConfig(r=2)),
    "every site is misspelt": lambda n: minilora.inject(many(n), [f"{i}.query" for i in range(n)]),
    "every norm is trained": lambda n: minilora.inject(
        many(n), "0.0", LoRAConfig(r=2), trainable=of_kind(nn.LayerNorm)
    ),
    "every trained norm is a site": lambda n: minilora.inject(
        many(n), of_kind(nn.LayerNorm), AdapterConfig(bottleneck=2), trainable=of_kind(nn.LayerNorm)
    ),
    "a file is of a model of other names": lambda n: misfits(many(n), [f"zzz.{i}.0" for i in range(n)]),
    "every site is there already": lambda n: minilora.inject(
        minilora.inject(many(n), "all-linear", LoRAConfig(r=2)), "all-linear", LoRAConfig(r=2)
    ),
    "merge and back": lambda n: minilora.eject(
        minilora.unmerge(minilora.merge(minilora.inject(many(n), "all-linear", LoRAConfig(r=2))))
    ),
    "fuse": lambda n: minilora.fuse(minilora.inject(many(n), "all-linear", LoRAConfig(r=2))),
    "summary": lambda n: str(minilora.summary(minilora.inject(many(n), "all-linear", LoRAConfig(r=2)))),
}


@pytest.mark.filterwarnings("ignore:.*r exceeds the smaller side:UserWarning")
@pytest.mark.parametrize("work", WORK)
def test_the_work_grows_with_the_number_of_sites_and_no_faster(work):
    _, few, more = (counted(lambda n=n: WORK[work](n)) for n in (2, 50, 200))  # the first loads and warms
    assert more < 5 * few
