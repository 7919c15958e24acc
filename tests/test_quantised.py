"""Quantised bases: bitsandbytes and torchao where they are installed, and stand-ins everywhere."""

from __future__ import annotations

import copy
import logging
import pickle
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checks import assert_far, distance, randomise
from quantised import (
    LIBRARIES,
    SIZE,
    Library,
    Packed,
    Rounded,
    Unknown,
    plain,
    put_standin_library,
    replaced,
    with_rounded_weight,
)
from torch import Tensor, nn

import minilora
from minilora import AdapterConfig, LoRAConfig, MergeError, MiniLoRAError, TargetError

pytestmark = [
    # The libraries' own, when they are imported or compute.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchao.*", "ignore::UserWarning:bitsandbytes.*"),
]

STANDINS = {
    "standin_torchao": Library(
        "torch", lambda model: replaced(model, with_rounded_weight), pickles=False, loads=False
    ),
    "standin_bitsandbytes": Library(
        "torch", lambda model: replaced(model, Packed), pickles=False, loads=False
    ),
}
ALL = STANDINS | LIBRARIES
each = pytest.mark.parametrize("name", ALL)


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    put_standin_library(monkeypatch)


def injected(name: str, *, bias: bool = True) -> nn.Module:
    """Return a quantised model, injected and trained, in training mode."""
    model = ALL[name].build(bias=bias)
    return randomise(minilora.inject(model, "all-linear", LoRAConfig(r=4, alpha=0.5)))


def x() -> Tensor:
    return torch.randn(5, SIZE, generator=torch.Generator().manual_seed(1))


def computed_weight(layer: nn.Module) -> Tensor:
    """Return what a layer computes with, (out, in), by calling it with the rows of an identity matrix."""
    with torch.no_grad():
        return (layer(torch.eye(SIZE if layer.in_features == SIZE else 2 * SIZE)) - layer.bias).T


def floating(name: str) -> nn.Sequential:
    """Return plain layers that compute with the weights of the quantised ones."""
    model, source = plain(), ALL[name].build().train()
    with torch.no_grad():
        for i in (0, 2):
            model[i].weight.copy_(computed_weight(source[i]))
    return model


@each
@pytest.mark.parametrize("training", [True, False])
def test_injection_changes_nothing_and_training_has_an_effect(name: str, training: bool) -> None:
    with torch.no_grad():
        bare = ALL[name].build().train(training)(x())
        model = minilora.inject(ALL[name].build(), "all-linear").train(training)
        assert torch.equal(model(x()), bare)
        assert_far(randomise(model)(x()), bare)


@each
def test_gradients_are_those_of_plain_layers_with_the_same_weights(name: str) -> None:
    model, reference = (
        injected(name),
        minilora.inject(floating(name), "all-linear", LoRAConfig(r=4, alpha=0.5)),
    )
    randomise(reference)
    if not ALL[name].trains:
        with pytest.raises(MiniLoRAError, match=r"'2\.weight': Linear gives its input no gradient"):
            model(x())
        return
    inputs = []
    for each_model in (model, reference):
        inputs.append(x().requires_grad_())
        each_model(inputs[-1]).square().sum().backward()
    assert distance(inputs[0].grad, inputs[1].grad) < 1e-4
    pairs = zip(minilora.trainable_parameters(model), minilora.trainable_parameters(reference), strict=True)
    for ours, theirs in pairs:
        assert distance(ours.grad, theirs.grad) < 1e-4


@each
def test_a_step_leaves_the_base_alone(name: str) -> None:
    if not ALL[name].trains:
        pytest.skip("it does not train")
    model = injected(name)
    before = [computed_weight(model[i].base) for i in (0, 2)]
    optimizer = torch.optim.SGD(minilora.trainable_parameters(model), lr=0.1)
    model(x()).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(computed_weight(model[i].base), w) for i, w in zip((0, 2), before, strict=True))


@each
@pytest.mark.parametrize("form", ["minilora", "peft"])
def test_saved_and_loaded_it_computes_the_same_bits(name: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / ("peft" if form == "peft" else "adapter.safetensors")
    trained = injected(name)
    minilora.save(trained, path, format=form)
    loaded = minilora.load(ALL[name].build(), path)
    with torch.no_grad():
        assert torch.equal(loaded.train()(x()), trained.train()(x()))
        assert torch.equal(loaded.eval()(x()), trained.eval()(x()))


@each
def test_merging_is_refused_by_name_with_what_to_do_instead(name: str) -> None:
    model = injected(name)
    layers = [model[0].base, model[2].base]
    kind, weight = type(layers[0]).__name__, type(layers[0].weight).__name__
    refusal = rf"x2\): the weight of {kind}, a {weight} of torch\.\w+, is not a plain .* run it unmerged, or "
    for action in (minilora.merge, minilora.fuse):
        with pytest.raises(
            MergeError, match=refusal + r"fuse it .* minilora\.fuse\(model, dequantize=True\)$"
        ):
            action(model)
    assert [model[0].base, model[2].base] == layers
    assert not model[0].merged


@each
def test_disabled_and_ejected_it_is_the_base(name: str) -> None:
    bare = ALL[name].build()
    layers = list(bare)
    with torch.no_grad():
        expected = ALL[name].build()(x())
        model = randomise(minilora.inject(bare, "all-linear"))
        with minilora.disabled(model):
            assert torch.equal(model(x()), expected)
        assert all(a is b for a, b in zip(minilora.eject(model), layers, strict=True))
        assert torch.equal(bare(x()), expected)


@each
def test_it_is_copied_pickled_and_restored_where_its_library_is(name: str) -> None:
    model = injected(name)
    with torch.no_grad():
        expected = model(x())
        assert torch.equal(copy.deepcopy(model)(x()), expected)
        if ALL[name].pickles:
            assert torch.equal(pickle.loads(pickle.dumps(model))(x()), expected)
        if ALL[name].loads:
            other = minilora.inject(ALL[name].build(seed=1), "all-linear", LoRAConfig(r=4, alpha=0.5))
            other.load_state_dict(model.state_dict())
            assert torch.equal(other(x()), expected)


@each
def test_the_summary_counts_weights_and_not_bytes(name: str) -> None:
    model = minilora.inject(ALL[name].build(), "0", LoRAConfig(r=4))
    found = minilora.summary(model)
    assert found.base == 4 * SIZE * SIZE + 3 * SIZE
    assert (found.reached, found.left_out) == (0.5, (("*", 1),))


@each
def test_its_values_are_not_compared_with_another_base(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Quantising changes every value: the base in floating point is the same, its numbers are not."""
    minilora.save(injected(name), tmp_path / "a.safetensors")
    with caplog.at_level(logging.INFO, "minilora"):
        minilora.load(plain(), tmp_path / "a.safetensors")
    assert "2 weights not checked: quantised" in caplog.text


# fuse(dequantize=True)


@each
@pytest.mark.parametrize("training", [True, False])
def test_fused_it_is_a_plain_layer_with_the_weight_given_back(name: str, training: bool) -> None:
    model = injected(name)
    biases = [model[i].bias for i in (0, 2)]
    with torch.no_grad():
        unmerged = copy.deepcopy(model).train(training)(x())
        model.train(training)
        minilora.fuse(model, dequantize=True)
        assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear]
        assert list(model.state_dict()) == list(plain().state_dict())
        assert [type(p) for p in model.parameters()] == [nn.Parameter] * 4
        assert [p.dtype for p in model.parameters()] == [torch.float32] * 4
        assert not any(p.requires_grad for p in model.parameters())
        assert [model[i].bias for i in (0, 2)] == biases
        assert [layer.training for layer in model] == [training] * 3
        rounding = ALL[name].rounding if training else ALL[name].in_evaluation
        assert distance(model(x()), unmerged) < rounding


@each
def test_fused_weights_are_w_given_back_plus_the_update(name: str) -> None:
    model, expected = injected(name), []
    for i in (0, 2):
        W, A, B = computed_weight(model[i].base), model[i].lora_A, model[i].lora_B
        expected.append((W.double() + model[i].scaling * B.double() @ A.double()).detach())
    minilora.fuse(model, dequantize=True)
    for i, W_eff in zip((0, 2), expected, strict=True):
        assert distance(model[i].weight, W_eff) < 1e-2 if not ALL[name].trains else 1e-6


@each
def test_fused_to_a_dtype_it_is_rounded_once(name: str) -> None:
    exact = minilora.fuse(injected(name), dequantize=True)
    rounded = minilora.fuse(injected(name), dequantize=True, dtype="bfloat16")
    for ours, theirs in zip(rounded.parameters(), exact.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())


@each
def test_where_fusing_fails_the_quantised_layers_are_back(name: str) -> None:
    model = injected(name)
    minilora.inject(model, "2", AdapterConfig(bottleneck=2))
    layers = [model[0].base, model[2].base.base]
    with torch.no_grad():
        before = model(x())
        with pytest.raises(MergeError, match=r"1 problem.*\n.*'2': a bottleneck adapter is not linear"):
            minilora.fuse(model, dequantize=True)
        assert [model[0].base, model[2].base.base] == layers
        assert torch.equal(model(x()), before)
        minilora.fuse(model, dequantize=True, skip_adapters=True)
        assert [type(model[0]), type(model[2].base)] == [nn.Linear, nn.Linear]
        assert distance(model(x()), before) < ALL[name].rounding


@each
def test_a_layer_without_lora_stays_quantised(name: str) -> None:
    model = minilora.inject(ALL[name].build(), "0")
    other = model[2]
    minilora.fuse(model, dequantize=True)
    assert model[2] is other
    assert type(model[0]) is nn.Linear
    model = minilora.inject(minilora.inject(ALL[name].build(), "0"), "2", AdapterConfig(bottleneck=2))
    other = model[2].base
    minilora.fuse(model, dequantize=True, skip_adapters=True)
    assert model[2].base is other


@each
def test_fusing_to_a_dtype_casts_no_quantised_weight(name: str) -> None:
    model = nn.ModuleDict({"quantised": ALL[name].build(), "plain": nn.Linear(8, 8)})
    weight = model["quantised"][0].weight
    minilora.fuse(minilora.inject(model, "plain"), dtype="bfloat16")
    assert model["quantised"][0].weight is weight
    assert weight.dtype != torch.bfloat16
    assert model["quantised"][0].bias.dtype == model["plain"].weight.dtype == torch.bfloat16


def test_a_layer_is_fused_whose_bias_is_trained_or_that_of_b() -> None:
    for name in STANDINS:
        model = minilora.inject(
            ALL[name].build(), ["0", "2"], {"0": LoRAConfig(r=4, lora_bias=True), "2": LoRAConfig(r=4)}
        )
        minilora.inject(model, [], trainable=["2.bias"])
        randomise(model)
        with torch.no_grad():
            unmerged = model(x())
            assert distance(minilora.fuse(model, dequantize=True)(x()), unmerged) < 2e-6


def test_shared_under_two_names_it_stays_one() -> None:
    model = ALL["standin_torchao"].build()
    model.again = model[0]
    minilora.fuse(minilora.inject(model, "0"), dequantize=True)
    assert type(model[0]) is nn.Linear
    assert model.again is model[0]


def test_a_layer_with_hooks_is_refused() -> None:
    model = injected("standin_bitsandbytes")
    model[0].base.register_forward_hook(lambda module, args, output: None)
    layer = model[2].base
    with pytest.raises(
        MergeError, match=r"1 problem.*\n.*'0': .*dequantize=True\), once its hooks are removed"
    ):
        minilora.fuse(model, dequantize=True)
    assert model[2].base is layer


def test_a_weight_packed_for_the_processor_is_refused() -> None:
    """Where bitsandbytes packs a weight in evaluation, its way back gives other scales."""
    model = injected("standin_bitsandbytes")
    model[0].base.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(
        MergeError, match=r"1 problem.*\n.*'0': .*, on a model loaded anew: when this one was"
    ):
        minilora.fuse(model, dequantize=True)


@pytest.mark.parametrize("name", [name for name in LIBRARIES if name.endswith(("nf4", "fp4", "nested"))])
def test_bitsandbytes_packs_a_weight_in_evaluation_on_some_processors(name: str) -> None:
    model = injected(name)
    with torch.no_grad():
        unmerged = model.eval()(x())
    if not getattr(model[0].base.weight.quant_state, "packing_format_for_cpu", False):
        minilora.fuse(model, dequantize=True)
        assert distance(model(x()), unmerged) < ALL[name].in_evaluation
        return
    with pytest.raises(MergeError, match=r"'\*' \(x2\): .*, on a model loaded anew"):
        minilora.fuse(model, dequantize=True)


def test_one_that_nobody_knows_is_refused_whatever_is_asked() -> None:
    model = minilora.inject(replaced(plain(), Unknown), "all-linear")
    for dequantize in (False, True):
        with pytest.raises(MergeError, match=r"unmerged, or load the base in floating point$"):
            minilora.fuse(model, dequantize=dequantize)


def test_a_config_that_says_quantised_is_told_of() -> None:
    model = injected("standin_torchao")
    model.config = types.SimpleNamespace(quantization_config={"quant_method": "standin"})
    with pytest.warns(UserWarning, match="before saving call model.hf_quantizer") as told:
        minilora.fuse(model, dequantize=True)
    assert told[0].filename == __file__


def test_plain_layers_are_fused_as_ever() -> None:
    models = [randomise(minilora.inject(plain(), "all-linear")) for _ in range(2)]
    minilora.fuse(models[0])
    minilora.fuse(models[1], dequantize=True)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


# What cannot be


@each
def test_it_cannot_be_trained_in_full(name: str) -> None:
    model = ALL[name].build()
    with pytest.raises(TargetError, match="'2': it is quantised, so only biases could be trained"):
        minilora.inject(model, "0", trainable=["2"])
    assert not minilora.summary(model).rows


class WithoutGradient(nn.Module):
    """A layer that rounds its input as it comes, by a kernel without a backward."""

    in_features, out_features = SIZE, SIZE

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-9, 9, (SIZE, SIZE), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.detach().round(), self.weight.to(x.dtype))


def test_a_layer_that_cuts_the_gradient_says_so_in_training() -> None:
    model = minilora.inject(nn.Sequential(nn.Linear(SIZE, SIZE), WithoutGradient()), "all-linear")
    with pytest.raises(MiniLoRAError, match=r"'1\.weight': WithoutGradient gives its input no gradient"):
        model(x())
    assert model.eval()(x()).requires_grad
    with torch.no_grad():
        model.train()(x())
    minilora.eject(model)
    minilora.inject(model, "1")  # before which nothing is trained
    model(x()).sum().backward()
    assert not minilora.check_gradients(model)


def test_bitsandbytes_cuts_the_gradient_of_a_weight_packed_for_the_processor() -> None:
    model = minilora.inject(ALL["bitsandbytes_nf4"].build(bias=False), "all-linear")
    with torch.no_grad():
        model.eval()(x())
    if getattr(model[2].base.weight.quant_state, "packing_format_for_cpu", False):
        with pytest.raises(MiniLoRAError, match=r"'2\.weight': Linear4bit gives its input no gradient"):
            model.train()(x())
    else:
        model.train()(x()).sum().backward()


def test_the_standins_are_what_they_stand_for() -> None:
    rounded, packed = (ALL[name].build() for name in STANDINS)
    assert type(rounded[0].weight) is Rounded
    assert rounded[0].weight.is_floating_point()
    assert packed[0].weight.dtype == torch.uint8
    assert packed[0].weight.numel() == SIZE * SIZE
    for model in (rounded, packed):
        assert 1e-4 < distance(model(x()), plain()(x())) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_with_transformers(bits: int, tmp_path: Path) -> None:
    """Load quantised, inject, train, save, load anew, fuse, load without minilora."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pytest.importorskip("bitsandbytes")
    shape = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(shape).save_pretrained(tmp_path / "base")

    def base() -> nn.Module:
        four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        config = transformers.BitsAndBytesConfig(
            **{f"load_in_{bits}bit": True},
            **(four if bits == 4 else {}),
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, dtype=torch.bfloat16
        )

    model = minilora.inject(base(), "all-linear", LoRAConfig(r=4)).train()
    assert minilora.summary(model).base == sum(
        p.numel() for p in transformers.LlamaForCausalLM(shape).parameters()
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(minilora.trainable_parameters(model), lr=1e-2)
    ids, losses = torch.arange(32).view(2, 16), []
    for _ in range(10):
        losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    model.gradient_checkpointing_disable()
    minilora.save(model, tmp_path / "adapter.safetensors")

    again = minilora.load(base(), tmp_path / "adapter.safetensors").train()
    with torch.no_grad():
        unmerged = model(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, unmerged)
        with pytest.warns(UserWarning, match="quantization_config"):
            minilora.fuse(again, dequantize=True, dtype="bfloat16")
        fused = again(input_ids=ids).logits
        assert distance(fused, unmerged) < 3e-2
        again.hf_quantizer.remove_quantization_config(again)
        again.save_pretrained(tmp_path / "fused")
        served = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.bfloat16)
        assert torch.equal(served.train()(input_ids=ids).logits, fused)


@each
def test_a_bank_gives_each_row_its_adapter(name: str, tmp_path: Path) -> None:
    trained = injected(name)
    minilora.save(trained, tmp_path / "a.safetensors")
    bank = minilora.Bank(ALL[name].build(), {"a": tmp_path / "a.safetensors"})
    with torch.no_grad():
        with bank.rows(["a", None, "a", None, None]):
            rows = bank.model.train()(x())
        adapted, bare = trained.train()(x()), ALL[name].build().train()(x())
    for i in range(5):
        assert distance(rows[i], (adapted if i in (0, 2) else bare)[i]) < 1e-5
