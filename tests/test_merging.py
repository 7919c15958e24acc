"""merge, unmerge, fuse: one effective weight, swapped in and out and never written into the base."""

import copy

import pytest
import torch
from checks import (
    Is,
    assert_equal_to_rounding,
    assert_far,
    injected_modules,
    interrupted,
    picture,
    randomise,
    raw,
    reference,
    state,
    unchanged,
)
from models import CASES, MLP, Shared, Tied, in_dtypes, on_grid
from torch import nn

import minilora
from minilora import AdapterConfig, LoRAConfig, LoRALinear, MergeError, MiniLoRAError


def trained(case, dtype=torch.float32):
    return randomise(minilora.inject(case.build(dtype), case.targets, trainable=()))


@on_grid
@in_dtypes
def test_merged_is_unmerged_to_rounding(case, dtype):
    model = trained(case, dtype)
    base, unmerged = case.run(case.build(dtype)), case.run(model)
    minilora.merge(model)
    assert_equal_to_rounding(case.run(model), unmerged)
    assert_far(case.run(model), base)


@on_grid
@in_dtypes
def test_merge_swaps_in_the_effective_weight_and_touches_nothing_else(case, dtype):
    model = trained(case, dtype)
    before, bare = picture(model), case.build(dtype)
    expected = reference(bare, model)
    minilora.merge(model)
    sites = {site: layer for site, (layer,) in injected_modules(model).items()}
    for site, layer in sites.items():
        assert layer.merged
        assert_equal_to_rounding(layer.base.weight, expected.get_submodule(site).weight)
        assert layer.base.weight.requires_grad is False
    assert picture(model)["modules"] == before["modules"]
    assert state(model) == before["state"]  # what is stored is the original, merged or not


@on_grid
@in_dtypes
def test_unmerge_gives_the_same_objects_and_bits_back_after_100_rounds(case, dtype):
    model = trained(case, dtype)
    with unchanged(model):
        for _ in range(100 if case.name in ("mlp", "tied", "bert") else 2):
            minilora.merge(model)
            minilora.unmerge(model)


def test_merging_twice_is_merging_once_and_unmerging_an_unmerged_model_is_nothing():
    model = trained(CASES["mlp"], torch.bfloat16)
    with unchanged(model):
        assert minilora.unmerge(model) is model
        assert minilora.merge(model) is model
        with unchanged(model):
            minilora.merge(model)
        minilora.unmerge(model)


def test_merge_after_more_training_takes_the_new_values():
    model = trained(CASES["mlp"])
    minilora.merge(model)
    once = raw(model.up.base.weight)
    minilora.unmerge(model)
    randomise(model, seed=1)
    minilora.merge(model)
    assert raw(model.up.base.weight) != once


def test_part_merged_is_completed():
    model = trained(CASES["mlp"])
    with unchanged(model):
        model.up.merge()
        minilora.merge(model)
        assert model.down.merged
        minilora.unmerge(model)


def test_merging_a_tied_head_leaves_the_embedding():
    model = randomise(minilora.inject(Tied(), "head"))
    weight, before = model.embedding.weight, raw(model.embedding.weight)
    minilora.merge(model)
    assert model.embedding.weight is weight
    assert raw(weight) == before
    assert model.head.base.weight is not weight
    minilora.unmerge(model)
    assert model.head.base.weight is weight


def test_two_layers_with_one_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = weight = model[0].weight
    randomise(minilora.inject(model, ["0", "1"], LoRAConfig(r=2)))
    with unchanged(model):
        minilora.merge(model)
        assert raw(model[0].base.weight) != raw(model[1].base.weight)
        minilora.unmerge(model)
    assert model[0].base.weight is model[1].base.weight is weight


def test_merging_a_shared_layer():
    model = randomise(minilora.inject(Shared(), "first"))
    minilora.merge(model)
    assert model.stack[1].merged


def test_a_failure_in_the_middle_leaves_nothing_merged(monkeypatch):
    model = trained(CASES["mlp"])
    real = LoRALinear.effective_weight

    def out_of_memory(self, dtype=None):
        if self is model.down:
            raise MemoryError
        return real(self, dtype)

    monkeypatch.setattr(LoRALinear, "effective_weight", out_of_memory)
    with unchanged(model), pytest.raises(MemoryError):
        minilora.merge(model)


@pytest.mark.parametrize("action", [minilora.merge, minilora.fuse])
def test_adapters_are_named_and_refused_unless_skipped(action):
    model = randomise(minilora.inject(MLP().eval(), ["up", "down"]))
    minilora.inject(model, "down", AdapterConfig(bottleneck=2))
    randomise(model)
    expected = model(x := torch.randn(3, 16))
    with (
        unchanged(model),
        pytest.raises(MergeError, match=r"'down': a bottleneck adapter.*skip_adapters=True"),
    ):
        action(model)
    action(model, skip_adapters=True)
    assert isinstance(model.down, minilora.Adapter)
    assert_equal_to_rounding(model(x), expected)
    assert getattr(model.down.base, "merged", action is minilora.fuse)


@pytest.mark.parametrize("action", [minilora.merge, minilora.fuse])
def test_inside_disabled_is_refused(action):
    model = trained(CASES["mlp"])
    with (
        minilora.disabled(model),
        unchanged(model),
        pytest.raises(MiniLoRAError, match="leave its block first"),
    ):
        action(model)


def parametrised() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))


def with_buffer() -> nn.Module:
    layer = nn.Linear(16, 16)
    weight = layer.weight.data
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


@pytest.mark.parametrize("make", [parametrised, with_buffer])
def test_a_weight_that_nothing_can_take_the_place_of(make):
    """Assigning to it would write into the parameters behind it, or could not be taken back."""
    model = nn.Sequential(make(), nn.Linear(16, 16)).requires_grad_(False)
    x = torch.randn(40, 16)
    plain = model(x)
    randomise(minilora.inject(model, "all-linear"))
    before = model(x)
    assert_far(before, plain)
    for action in (minilora.merge, minilora.fuse):
        with (
            unchanged(model),
            pytest.raises(MergeError, match=r"'0': the weight of .* nothing can take its place"),
        ):
            action(model)
    outside = nn.functional.linear(x, model[0].weight, model[0].bias)
    assert_equal_to_rounding(outside, model[0](x))
    minilora.eject(model)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["mlp", "tied", "gpt2"])
def test_casting_while_merged_casts_the_original_too(name, to):
    case = CASES[name]
    model = trained(case).to(to)
    merged = minilora.merge(trained(case))
    weights = {key: Is(p) for key, p in minilora.unmerge(trained(case)).named_parameters()}
    merged.to(to)
    minilora.unmerge(merged)
    assert state(merged) == state(model)
    assert len(dict(merged.named_parameters())) == len(weights)  # what was tied is tied


def test_the_original_stays_the_same_object_through_a_cast():
    model = Tied()
    weight = model.embedding.weight
    minilora.merge(randomise(minilora.inject(model, "head"))).double().half()
    minilora.unmerge(model)
    assert model.head.base.weight is model.embedding.weight is weight


def test_to_the_meta_device_and_back_while_merged():
    model = minilora.merge(trained(CASES["mlp"]))
    model.to("meta").to_empty(device="cpu")
    minilora.unmerge(model)
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_loading_a_state_while_merged_is_refused():
    model = minilora.merge(trained(CASES["mlp"]))
    merged = raw(model.up.base.weight)
    for checkpoint in (MLP().state_dict(), trained(CASES["mlp"]).state_dict()):
        with pytest.raises(RuntimeError, match=r"'up' is merged: call minilora\.unmerge\(model\), then load"):
            model.load_state_dict(checkpoint)
        assert raw(model.up.base.weight) == merged
    before = state(minilora.unmerge(model))["up.base.weight"]
    assert before == raw(CASES["mlp"].build().up.weight)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: __import__("pickle").loads(__import__("pickle").dumps(m))]
)
def test_a_copy_of_a_merged_model_is_merged_and_unmerges_on_its_own(clone):
    model = minilora.merge(trained(CASES["tied"]))
    twin = clone(model)
    assert twin.head.merged
    assert raw(CASES["tied"].run(twin)) == raw(CASES["tied"].run(model))
    minilora.unmerge(twin)
    assert twin.head.base.weight is twin.embedding.weight
    assert model.head.merged
    assert state(twin) == state(model)


unties = pytest.mark.filterwarnings("ignore:.* was tied to another weight:UserWarning")


@unties
@on_grid
@in_dtypes
def test_fuse_restores_the_bare_model_with_the_update_in_its_weights(case, dtype):
    model = trained(case, dtype)
    expected, bare = case.run(model), case.build(dtype)
    plain = reference(bare, model)
    assert minilora.fuse(model) is model
    assert list(model.state_dict()) == list(bare.state_dict())
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in bare.named_modules()]
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            assert_equal_to_rounding(value, plain.state_dict()[name])
        else:
            assert raw(value) == raw(plain.state_dict()[name])
    assert_equal_to_rounding(case.run(model), expected)
    with pytest.raises(MiniLoRAError, match="carries no injection"):
        minilora.fuse(model)


@unties
@on_grid
def test_fused_is_merged_to_the_bit(case):
    merged, fused, from_merged = (trained(case) for _ in range(3))
    minilora.merge(merged)
    minilora.fuse(fused)
    minilora.fuse(minilora.merge(from_merged))
    expected = raw(case.run(merged))
    assert raw(case.run(fused)) == expected
    assert raw(case.run(from_merged)) == expected
    assert not any(isinstance(m, minilora.InjectedModule) for m in from_merged.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fuse_rounds_once(dtype):
    model = randomise(minilora.inject(MLP(), ["up", "down"], trainable="classifier"))
    exact = {name: getattr(model, name).weight.detach().clone() for name in ("up", "down", "classifier")}
    model.register_buffer("table", torch.rand(4))
    model.register_buffer("precise", torch.rand(4), persistent=False)
    model.register_buffer("count", torch.arange(4))
    minilora.fuse(model, dtype=dtype)
    for name, weight in exact.items():
        assert raw(getattr(model, name).weight) == raw(weight.to(dtype))
    assert {p.dtype for p in model.parameters()} == {model.table.dtype} == {dtype}
    assert (model.precise.dtype, model.count.dtype) == (torch.float32, torch.int64)


def test_fuse_keeps_precision_that_merging_in_16_bits_would_lose():
    """From a bfloat16 base to float32: the update is not rounded to bfloat16 on the way."""
    model = trained(CASES["mlp"], torch.bfloat16)
    layer = model.up
    exact = layer.base.weight.float() + layer.scaling * (layer.lora_B @ layer.lora_A)
    minilora.fuse(model, dtype=torch.float32)
    torch.testing.assert_close(model.up.weight, exact)


@pytest.mark.parametrize("merged", [False, True])
def test_fuse_with_a_tied_head_unties_it_says_so_and_leaves_the_embedding(merged):
    for dtype in (None, torch.bfloat16):
        model = randomise(minilora.inject(Tied(), ["head", "body"]))
        weight = model.embedding.weight
        before = raw(weight if dtype is None else weight.to(dtype))
        if merged:
            minilora.merge(model)
        with pytest.warns(
            UserWarning, match=r"'head.weight' was tied.*tie_word_embeddings = False"
        ) as caught:
            minilora.fuse(model, dtype=dtype)
        assert [w.filename for w in caught] == [__file__]
        assert model.embedding.weight is weight
        assert raw(weight) == before
        assert model.head.weight is not weight


def test_what_cannot_be_fused_and_what_is_untied_are_named_by_their_parameter():
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    minilora.inject(model, "in_proj_weight", LoRAConfig(r=1))
    with torch.no_grad():
        model[0].lora_B.fill_(float("nan"))
    with pytest.raises(MergeError, match=r"'0\.in_proj_weight': 48 of 48 values"):
        minilora.merge(model)
    with torch.no_grad():
        model[0].lora_B.fill_(0.5)
    model[1].register_parameter("other", model[0].base.in_proj_weight)
    with pytest.warns(UserWarning, match=r"'0\.in_proj_weight' was tied"):
        minilora.fuse(model)


def test_fuse_that_does_not_touch_the_tie_keeps_it():
    model = minilora.fuse(randomise(minilora.inject(Tied(), "body")), dtype=torch.bfloat16)
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("when", [0, 1])
def test_fuse_that_runs_out_of_memory_leaves_a_model_that_computes_the_same(monkeypatch, when):
    model = trained(CASES["mlp"])
    expected, stuck = CASES["mlp"].run(model), [model.up, model.down][when]
    real = LoRALinear.effective_weight

    def out_of_memory(self, dtype=None):
        if self is stuck:
            raise MemoryError
        return real(self, dtype)

    monkeypatch.setattr(LoRALinear, "effective_weight", out_of_memory)
    with pytest.raises(MemoryError):
        minilora.fuse(model)
    monkeypatch.undo()
    assert stuck in set(model.modules())
    assert_equal_to_rounding(CASES["mlp"].run(model), expected)
    minilora.fuse(model)
    assert_equal_to_rounding(CASES["mlp"].run(model), expected)


def test_fuse_refuses_integers():
    model = trained(CASES["mlp"])
    with unchanged(model), pytest.raises(MiniLoRAError, match=r"floating-point dtypes, not to torch\.int8"):
        minilora.fuse(model, dtype=torch.int8)


def test_fuse_keeps_hooks_and_the_very_modules():
    model = MLP()
    layers, calls = [model, model.up, model.classifier], []
    for layer in (model, model.classifier):  # on a layer that is fused there can be none
        layer.register_forward_hook(lambda *_: calls.append(1))
    minilora.fuse(minilora.inject(model, "up"))
    assert [model, model.up, model.classifier] == layers
    model(torch.randn(2, 16))
    assert calls == [1, 1]


def test_fuse_nested_adapter_around_a_block():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    minilora.inject(model, "0", AdapterConfig(bottleneck=2))
    minilora.inject(model, "all-linear", LoRAConfig(r=2))
    expected = randomise(model)(x := torch.randn(3, 4))
    minilora.fuse(model, skip_adapters=True)
    assert_equal_to_rounding(model(x), expected)
    assert [type(m).__name__ for m in model] == ["Adapter", "Linear"]


def hooked():
    layer = nn.Linear(16, 16)
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return layer


def replaced():
    layer = nn.Linear(16, 16)
    layer.forward = lambda input: nn.functional.linear(input, layer.weight.tanh(), layer.bias)
    return layer


@pytest.mark.parametrize("make", [hooked, replaced])
@pytest.mark.parametrize("tokens", [2, 200])
def test_where_an_instance_computes_in_its_own_way_the_update_comes_on_top_and_merging_is_refused(
    make, tokens
):
    model = nn.Sequential(make(), nn.Linear(16, 16))
    x = torch.randn(tokens, 16)
    plain = model[0](x)
    randomise(minilora.inject(model, "all-linear"))
    delta = nn.functional.linear(x, model[0].delta_weight())
    assert_equal_to_rounding(model[0](x), plain + delta)
    says = r"1 problem.*\n  - '0': .*; merged, it may not do the same: run it unmerged"
    for action in (minilora.merge, minilora.fuse):
        with unchanged(model), pytest.raises(MergeError, match=says):
            action(model)


def test_a_layer_in_two_models_is_merged_in_one_of_them_at_a_time():
    layer = nn.Linear(16, 16)
    weight, before = layer.weight, raw(layer.weight)
    first, second = nn.Sequential(layer), nn.Sequential(layer)
    for model in (first, second):
        randomise(minilora.inject(model, "0"))
    minilora.merge(first)
    says = "'0': it is merged in another model, which shares the layer: unmerge that one first"
    for action in (minilora.merge, minilora.fuse):
        with unchanged(second), pytest.raises(MergeError, match=says):
            action(second)
    with pytest.raises(minilora.TargetError, match=says):
        minilora.inject(nn.Sequential(layer), "0")
    minilora.unmerge(first)
    minilora.unmerge(minilora.merge(second))
    for model in (first, second):
        minilora.eject(model)
    assert layer.weight is weight
    assert raw(weight) == before


def test_float8_is_no_weight_to_merge_into():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    eight = model[1].weight.detach().to(torch.float8_e4m3fn)
    model[1].weight = nn.Parameter(eight, requires_grad=False)
    minilora.inject(model, ["0", "1"])
    says = r"'1': the weight of Linear, a Parameter of torch\.float8_e4m3fn, is not a plain floating-point"
    before = [Is(module) for module in model.modules()], [Is(p) for p in model.parameters()]
    for action in (minilora.merge, minilora.fuse):
        with pytest.raises(MergeError, match=says):
            action(model)
    assert ([Is(module) for module in model.modules()], [Is(p) for p in model.parameters()]) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_what_is_not_finite_is_not_merged(value, half):
    model = trained(CASES["mlp"])
    getattr(model.down, half).data[0, 0] = value
    says = r"'down': \d+ of 512 values of W \+ scaling B A are not finite in torch\.float32: A or B holds NaN"
    for action in (minilora.merge, minilora.fuse):
        with unchanged(model), pytest.raises(MergeError, match=says):
            action(model)


def test_what_was_not_finite_in_the_base_is_not_the_updates_doing():
    model = CASES["mlp"].build()
    model.down.weight.data[0, 0] = float("inf")
    model = randomise(minilora.inject(model, ["up", "down"]))
    minilora.unmerge(minilora.merge(model))
    minilora.fuse(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("act", [minilora.merge, minilora.fuse])
@pytest.mark.parametrize("trained", ["classifier", "classifier.bias"])
def test_what_was_trained_in_full_and_is_not_finite_is_refused(trained, act, value):
    model = minilora.inject(MLP(), "up", trainable=trained).eval()
    with torch.no_grad():
        model.classifier.bias[1] = value
    says = rf"'{trained}': 1 of 3 values of 'bias', trained in full, are not finite in torch\.float32"
    with unchanged(model), pytest.raises(MergeError, match=says):
        act(model)


def test_what_was_not_finite_before_the_training_is_no_obstacle():
    model = MLP()
    with torch.no_grad():
        model.classifier.bias[1] = float("-inf")
    minilora.fuse(minilora.inject(model, "up", trainable="classifier"))
    assert model.classifier.bias[1] == float("-inf")


def test_a_parameter_trained_in_full_beyond_the_dtype_is_refused():
    model = minilora.inject(MLP(), "up", trainable="classifier.bias")
    with torch.no_grad():
        model.classifier.bias[1] = 1e6
    says = r"'classifier\.bias': 1 of 3 values .* not finite in torch\.float16.* too large"
    with unchanged(model), pytest.raises(MergeError, match=says):
        minilora.fuse(model, dtype="float16")


def test_values_beyond_the_dtype_are_named_before_anything_is_cast():
    model = minilora.inject(MLP(), ["up", "down"], LoRAConfig(alpha=1e6))
    randomise(model)
    with (
        unchanged(model),
        pytest.raises(MergeError, match=r"2 problems.*\n  - 'up': \d+ of 512 .* not finite in torch.float16"),
    ):
        minilora.fuse(model, dtype=torch.float16)
    minilora.fuse(model, dtype="bfloat16")  # whose range is wide enough
    assert model.up.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("where", ["parameter", "buffer"])
def test_other_tensors_beyond_the_dtype_are_named_too(where):
    model = MLP()
    if where == "parameter":
        model.classifier.bias.data[0] = 1e6
    else:
        model.register_buffer("table", torch.tensor([1.0, -1e6]))
    model.register_buffer("mask", torch.tensor([float("-inf")]))  # which casts well
    model.register_buffer("precise", torch.tensor([1e6]), persistent=False)  # which is not cast
    randomise(minilora.inject(model, "up"))
    name = "classifier.bias" if where == "parameter" else "table"
    says = f"'{name}': values beyond 65504, the largest of torch.float16"
    with unchanged(model), pytest.raises(MergeError, match=says):
        minilora.fuse(model, dtype=torch.float16)


def test_the_weight_that_is_replaced_may_be_beyond_the_dtype():
    """Only W_eff counts."""
    model = nn.Sequential(nn.Linear(16, 16))
    model[0].weight.data[0, 0] = 1e5
    layer = minilora.inject(model, "0", LoRAConfig(r=2, alpha=2))[0]
    with torch.no_grad():
        layer.lora_A.zero_()[0, 0] = 1.0
        layer.lora_B.zero_()[0, 0] = -1e5
    minilora.fuse(model, dtype=torch.float16)
    assert model[0].weight[0, 0] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.float64"])
def test_fuse_takes_a_dtype_by_its_name(dtype):
    model = minilora.fuse(trained(CASES["mlp"]), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype.removeprefix("torch."))}


@pytest.mark.parametrize("dtype", ["int8", "no_such", torch.float8_e4m3fn, 16])
def test_fuse_refuses_what_is_no_dtype_for_weights(dtype):
    model = trained(CASES["mlp"])
    with unchanged(model), pytest.raises(MiniLoRAError, match="fuse casts to floating-point dtypes, not to"):
        minilora.fuse(model, dtype=dtype)


def test_offloaded_weights_are_not_merged():
    """accelerate keeps them on the meta device between calls: there is no W to merge into."""
    accelerate = pytest.importorskip("accelerate")
    model = trained(CASES["mlp"])
    expected = CASES["mlp"].run(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert_equal_to_rounding(CASES["mlp"].run(model), expected)
    for action in (minilora.merge, minilora.fuse):
        with pytest.raises(MergeError, match=r"'up', 'down': its weight is offloaded .* before dispatching"):
            action(model)
    assert_equal_to_rounding(CASES["mlp"].run(model), expected)


class Guarded(nn.Linear):
    """A layer that lets nobody assign to its weight."""

    def __setattr__(self, name, value):
        if name == "weight" and "weight" in self.__dict__.get("_parameters", ()):
            raise KeyboardInterrupt
        super().__setattr__(name, value)


def test_a_layer_that_lets_nobody_assign_is_merged_all_the_same():
    model = nn.Sequential(nn.Linear(16, 16), Guarded(16, 16))
    randomise(minilora.inject(model, ["0", "1"]))
    x = torch.randn(3, 16)
    with unchanged(model):
        before = model(x)
        with torch.no_grad():
            assert_equal_to_rounding(minilora.merge(model)(x), before)
        minilora.unmerge(model)


def test_merge_interrupted_at_any_line_is_whole_or_not_at_all():
    model = trained(CASES["mlp"])
    before, at = picture(model), 0
    expected = state(minilora.unmerge(minilora.merge(model)))
    while interrupted(lambda: minilora.merge(model), at := at + 1):
        assert model.up.merged == model.down.merged
        assert (model.up.base.weight is model.up.replaced_by_merging()["weight"]) is not model.up.merged
        minilora.unmerge(model)
        assert picture(model) == before
    assert at > 50
    assert state(minilora.unmerge(model)) == expected


def test_unmerge_interrupted_at_any_line_can_be_called_again():
    model = trained(CASES["mlp"])
    before, at = picture(model), 0
    came = True
    while came:
        minilora.merge(model)
        came = interrupted(lambda: minilora.unmerge(model), at := at + 1)
        minilora.unmerge(model)
        assert picture(model) == before
    assert at > 10
