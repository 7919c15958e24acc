"""A bias of B: y = x W_eff^T + b + s beta, wherever a layer has a place for a bias."""

import copy
import warnings

import pytest
import torch
from checks import distance, picture, raw, state, unchanged
from kinds import KINDS, Kind
from torch import nn

import minilora
from minilora import LoRAConfig, TargetError
from minilora.functional import effective_weight

BY_NAME = {kind.name: kind for kind in KINDS}
CONV1D = Kind("transformers_conv1d", lambda: pytest.importorskip("transformers").Conv1D(12, 8), (2, 5, 8))
MORE = [
    CONV1D,
    Kind("linear_without", lambda: nn.Linear(8, 12, bias=False), (2, 5, 8)),
    Kind("conv1d_without", lambda: nn.Conv1d(6, 8, 3, bias=False), (2, 6, 12)),
    Kind("transposed_without", lambda: nn.ConvTranspose1d(6, 8, 3, groups=2, bias=False), (2, 6, 4)),
    Kind(
        "bilinear_without", lambda: nn.Bilinear(4, 4, 6, bias=False), (3, 4), arguments=lambda x: (x, x + 1)
    ),
]
REACHED = [
    *MORE,
    *(k for k in KINDS if k.name.startswith(("linear", "scaled", "conv", "transposed", "bilinear"))),
]
on_reached = pytest.mark.parametrize("kind", REACHED, ids=lambda kind: kind.name)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:.*has no rule"),
]
CONFIG = LoRAConfig(r=2, lora_bias=True)


def fill(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (layer.lora_B, layer.lora_bias):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        if layer.config.dora:
            layer.lora_magnitude.mul_(1.5)


def injected(kind: Kind, dtype=torch.float64, config=CONFIG, **kwargs):
    model = minilora.inject(kind.build(dtype), kind.target, config, **{"trainable": (), **kwargs})
    fill(model.layer)
    return model


def by_definition(kind: Kind, layer, bias=None):
    """Return the bare model with W_eff and b + s beta in place, and the three tensors that they depend on."""
    A, B, beta = (getattr(layer, f"lora_{n}").detach().clone().requires_grad_() for n in ("A", "B", "bias"))
    bare = kind.build()
    weight = effective_weight(
        bare.layer.weight.detach(), A, B, layer.scaling, transposed=layer.layout.transposed
    )
    moved = beta * layer.scaling + (0 if bare.layer.bias is None else bare.layer.bias.detach())
    bare.layer.bias = None  # which functional_call fills in

    def run(x):
        made = copy.deepcopy(bare)
        del made.layer._parameters["weight"], made.layer._parameters["bias"]
        made.layer.weight, made.layer.bias = weight, moved
        return made(x)

    return run, (A, B, beta)


@on_reached
def test_outputs_and_gradients_are_those_of_the_definition(kind):
    model, x = injected(kind), kind.input()
    reference, leaves = by_definition(kind, model.layer)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = model(inputs[0]), reference(inputs[1])
    assert distance(y.detach(), expected.detach()) < 1e-12
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, leaf in zip(("lora_A", "lora_B", "lora_bias"), leaves, strict=True):
        assert distance(getattr(model.layer, name).grad, leaf.grad) < 1e-12, name
    assert distance(inputs[0].grad, inputs[1].grad) < 1e-12


@on_reached
def test_injection_is_an_identity_and_eject_takes_it_back(kind):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        bare, x = kind.build(dtype).requires_grad_(False), kind.input(dtype)
        model = kind.build(dtype)
        before = picture(model.requires_grad_(False))
        minilora.inject(model, kind.target, CONFIG, trainable=())
        assert model.layer.lora_bias.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(model(x), bare(x))
        assert picture(minilora.eject(model)) == before


@on_reached
def test_merge_unmerge_disabled_fuse_and_what_outside_code_reads(kind):
    model, x = injected(kind).eval(), kind.input()
    base = kind.build().eval().requires_grad_(False)
    with torch.no_grad():
        expected, weight, bias = model(x), model.layer.base.weight, model.layer.base.bias
        before, keys = picture(model), list(model.state_dict())
        assert raw(model.layer.bias) == raw(model.layer.effective_bias())
        assert distance(minilora.merge(model)(x), expected) < 1e-12
        assert raw(model.layer.bias) == raw(model.layer.base.bias) == raw(model.layer.effective_bias())
        assert state(model) == before["state"]
        assert list(model.state_dict()) == keys
        clone = copy.deepcopy(model)
        assert raw(clone(x)) == raw(model(x))
        assert distance(minilora.unmerge(clone)(x), expected) < 1e-12
        with minilora.disabled(model):
            assert raw(model(x)) == raw(base(x))
        assert raw(minilora.merge(model)(x)) == raw(model(x))
        assert minilora.unmerge(model).layer.base.weight is weight
        assert model.layer.base.bias is bias
        assert picture(model) == before
        with minilora.disabled(model):
            assert raw(model(x)) == raw(base(x))
            assert model.layer.bias is bias
        merged = copy.deepcopy(minilora.merge(model))
        bits = raw(model(x))
        for each in (model, minilora.unmerge(merged)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                minilora.fuse(each)
            assert raw(each(x)) == bits
            assert [str(w.message)[:29] for w in caught] == (
                ["'layer': had no bias, and has"] if bias is None else []
            )
            assert set(each.state_dict()) - set(base.state_dict()) <= {"layer.bias"}
    assert not model.layer.bias.requires_grad


@pytest.mark.parametrize("tokens", [2, 400], ids=["delta form", "weight form"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dora", [False, True])
def test_both_forms(tokens, bias, dora):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=bias)).double()
    minilora.inject(model, "0", LoRAConfig(r=2, dora=dora, lora_bias=True))
    fill(model[0])
    x = torch.randn(tokens, 8, dtype=torch.float64)
    y = model(x)
    expected = x @ model[0].weight.T + model[0].bias
    assert distance(y.detach(), expected.detach()) < 1e-12
    parameters = minilora.trainable_parameters(model)
    assert len(parameters) == 3 + dora
    for one, other in zip(
        torch.autograd.grad(y.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        assert distance(one, other) < 1e-12


def test_a_merged_layer_gives_the_bits_of_the_weight_form():
    model = minilora.inject(nn.Sequential(nn.Linear(8, 6)), "0", CONFIG).eval()
    fill(model[0])
    x = torch.randn(4000, 8)
    with torch.no_grad():
        assert raw(model(x)) == raw(minilora.merge(model)(x))


@pytest.mark.parametrize("dora", [False, True])
def test_gradcheck_and_second_derivatives_of_the_weight_form(dora):
    model = nn.Sequential(nn.Linear(3, 2)).double()
    minilora.inject(model, "0", LoRAConfig(r=1, lora_bias=True, dora=dora))
    fill(model[0])
    x, beta = torch.randn(20, 3, dtype=torch.float64), model[0].lora_bias.detach().clone().requires_grad_()

    def run(beta):
        return torch.func.functional_call(model, {"0.lora_bias": beta}, (x,)).square().mean(0)

    assert torch.autograd.gradcheck(run, [beta])
    assert torch.autograd.gradgradcheck(run, [beta])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("tokens", [2, 400])
@pytest.mark.parametrize("dora", [False, True])
def test_forward_mode_differentiates_what_backward_does(tokens, dora):
    model = nn.Sequential(nn.Linear(8, 6)).double()
    minilora.inject(model, "0", LoRAConfig(r=2, lora_bias=True, dora=dora))
    fill(model[0])
    x = torch.randn(tokens, 8, dtype=torch.float64)
    beta = model[0].lora_bias.detach()

    def output(value):
        return torch.func.functional_call(model, {"0.lora_bias": value}, (x,))

    y, forward = torch.func.jvp(output, (beta,), (torch.ones_like(beta),))
    assert distance(forward, torch.full_like(y, model[0].scaling)) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_layer_is_moved_and_cast_with_its_originals(bias):
    model = minilora.inject(nn.Sequential(nn.Linear(8, 6, bias=bias)), "0", CONFIG).eval()
    fill(model[0])
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = model(x)
        minilora.merge(model).double()
        assert distance(model(x.double()), expected.double()) < 1e-6
        with minilora.disabled(model):
            model.float()
        assert distance(minilora.unmerge(model)(x), expected) < 1e-6
    assert (model[0].base.bias is None) is not bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["linear", "conv2d_zeros", "transformers_conv1d"])
def test_16_bit_bases_and_autocast(dtype, name):
    kind = {k.name: k for k in REACHED}[name]
    reference, _ = by_definition(kind, injected(kind).layer)
    expected = reference(kind.input(torch.float32).double()).detach()
    model = injected(kind, dtype)
    assert model.layer.lora_bias.dtype == torch.float32
    assert model.layer.bias.dtype == dtype
    assert model(kind.input(dtype)).dtype == dtype
    assert distance(model(kind.input(dtype)).detach().double(), expected) < 0.03
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        full = injected(kind, torch.float32).eval()
        assert distance(full(kind.input(torch.float32)).double(), expected) < 0.03
        assert distance(minilora.merge(full)(kind.input(torch.float32)).double(), expected) < 0.03
    assert minilora.fuse(model, dtype=torch.float32).layer.bias.dtype == torch.float32


def test_dropout_drops_nothing_of_the_bias():
    for kind in (BY_NAME["linear"], BY_NAME["conv1d"]):
        model = injected(kind, config=LoRAConfig(r=2, dropout=1.0, lora_bias=True)).train()
        base = kind.build().train()
        nn.init.zeros_(model.layer.lora_B)
        assert (
            distance(model(kind.input()).detach(), _shifted(base, model.layer)(kind.input()).detach()) < 1e-12
        )


def _shifted(base, layer):
    with torch.no_grad():
        base.layer.bias.copy_(layer.bias)
    return base


@pytest.mark.parametrize("name", ["linear", "conv2d_zeros", "transformers_conv1d"])
def test_beside_dora_the_bias_is_not_scaled(name):
    kind = {k.name: k for k in REACHED}[name]
    model, x = injected(kind, config=LoRAConfig(r=2, dora=True, lora_bias=True)), kind.input()
    plain = kind.build()
    with torch.no_grad():
        plain.layer.weight.copy_(model.layer.weight)
        plain.layer.bias.add_(model.layer.lora_bias * model.layer.scaling)
        assert distance(model(x), plain(x)) < 1e-12
        assert distance(minilora.merge(model.eval())(x), plain(x)) < 1e-12
        assert distance(minilora.fuse(model)(x), plain(x)) < 1e-12


def test_a_bias_is_trained_in_one_way_only():
    in_full = {"trainable": ["layer.bias"]}
    for kind in (BY_NAME["linear"], BY_NAME["conv2d_zeros"]):
        model = kind.build()
        with unchanged(model), pytest.raises(TargetError, match="its bias is trained in full as well"):
            minilora.inject(model, kind.target, CONFIG, **in_full)
        minilora.inject(model, [], **in_full)
        with unchanged(model), pytest.raises(TargetError, match="its bias is trained in full as well"):
            minilora.inject(model, kind.target, CONFIG, trainable=())
        model = injected(kind)
        with (
            unchanged(model),
            pytest.raises(TargetError, match="carries LoRA r=2 alpha=16 lora_bias already"),
        ):
            minilora.inject(model, [], **in_full)


@on_reached
def test_saved_and_loaded_it_computes_the_same_bits(kind, tmp_path):
    model, x = injected(kind).eval(), kind.input()
    minilora.save(model, tmp_path / "a.safetensors")
    minilora.save(minilora.merge(model), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    fresh = minilora.load(kind.build().eval(), tmp_path / "a.safetensors")
    assert raw(fresh(x)) == raw(minilora.unmerge(model)(x))
    again = minilora.inject(kind.build().eval(), kind.target, CONFIG, trainable=())
    assert raw(minilora.load(again, tmp_path / "a.safetensors")(x)) == raw(model(x))


def test_a_file_says_nothing_of_it_where_there_is_none():
    assert "lora_bias" not in LoRAConfig(r=2).to_dict()
    assert LoRAConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(minilora.MiniLoRAError, match="lora_bias must be True or False, not 1"):
        LoRAConfig(lora_bias=1)


def test_it_is_counted_told_and_not_decayed():
    model = minilora.inject(nn.Sequential(nn.Linear(4, 3)), "0", LoRAConfig(r=2, lora_bias=True))
    row = minilora.summary(model).rows[0]
    assert (row.description, row.parameters) == ("LoRA r=2 alpha=16 lora_bias", 2 * (4 + 3) + 3)
    groups = minilora.parameter_groups(model, lr=1.0, weight_decay=0.5, lora_plus_ratio=4)
    found = {(g["lr"], g["weight_decay"]): [tuple(p.shape) for p in g["params"]] for g in groups}
    assert found == {(1.0, 0.5): [(2, 4)], (4.0, 0.5): [(3, 2)], (4.0, 0.0): [(3,)]}


def test_attention_reads_the_moved_bias_of_its_out_proj():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.0, batch_first=True).double()
    minilora.inject(block, ["out_proj", "linear1", "linear2"], CONFIG, trainable=())
    for layer in (block.self_attn.out_proj, block.linear1, block.linear2):
        fill(layer)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = block.train()(x)
        assert distance(block.eval()(x), expected) < 1e-12  # by the fused path of torch
        assert distance(minilora.merge(block)(x), expected) < 1e-12
        assert distance(minilora.fuse(block)(x), expected) < 1e-12


def test_compiles_in_one_graph():
    for kind in (BY_NAME["linear"], BY_NAME["conv2d_zeros"]):
        model, x = injected(kind), kind.input()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert distance(compiled(x).detach(), model(x).detach()) < 1e-12


class Packed(nn.Module):
    """A base whose weight is integers, as quantisers make it."""

    def __init__(self, bias):
        super().__init__()
        self.in_features, self.out_features = 8, 6
        self.register_buffer("weight", torch.randint(-100, 100, (6, 8), dtype=torch.int8))
        self.register_parameter("bias", nn.Parameter(torch.randn(6)) if bias else None)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 100, self.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_a_quantised_base(bias):
    model = minilora.inject(nn.Sequential(Packed(bias)), "0", CONFIG)
    fill(model[0])
    nn.init.zeros_(model[0].lora_B)
    x, beta = torch.randn(3, 8), model[0].lora_bias.detach()
    assert distance((model(x) - model[0].base(x)).detach(), (beta * model[0].scaling).expand(3, 6)) < 1e-5
    moved = model[0].bias - (model[0].base.bias if bias else 0)
    assert distance(moved.detach(), beta * model[0].scaling) < 1e-5
    with unchanged(model), pytest.raises(minilora.MergeError, match="not a plain"):
        minilora.merge(model)


@pytest.mark.parametrize(
    ("layer", "target"),
    [
        (nn.Embedding(5, 4), "0"),
        (nn.EmbeddingBag(5, 4), "0"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight"),
        (nn.GRUCell(4, 3), "0.weight_ih"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_has_no_place_for_a_bias_is_refused_by_name(layer, target):
    model = nn.Sequential(layer)
    with unchanged(model), pytest.raises(TargetError, match=f"{type(layer).__name__} has no place for one"):
        minilora.inject(model, target, CONFIG)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 6e38])
def test_merging_refuses_a_bias_that_is_not_finite(value):
    model = minilora.inject(nn.Sequential(nn.Linear(4, 3)).double(), "0", CONFIG).eval()
    with torch.no_grad():
        model[0].lora_bias[1] = value
    if value == 6e38:
        minilora.merge(model)  # in float64
    with pytest.raises(minilora.MergeError, match="1 of 3 values of the merged 'bias' are not finite"):
        minilora.fuse(model, dtype="float32")


def test_a_bare_checkpoint_brings_its_own_bias_and_the_update_stays():
    model = injected(BY_NAME["linear"])
    other = BY_NAME["linear"].build()
    nn.init.normal_(other.layer.bias)
    shift = model.layer.bias - model.layer.base.bias
    model.load_state_dict(other.state_dict())
    assert distance((model.layer.bias - other.layer.bias).detach(), shift.detach()) < 1e-12
