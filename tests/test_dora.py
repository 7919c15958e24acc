"""DoRA (Liu et al. 2024): W_eff = m / |V| V with V = W + s B A, the norm a constant to the gradient."""

import copy
import warnings

import pytest
import torch
from checks import distance, raw, state
from kinds import KINDS, Kind
from torch import nn

import minilora
from minilora import LoRAConfig, TargetError
from minilora.functional import effective_weight
from minilora.variants.dora_linear import magnitude_linear

BY_NAME = {kind.name: kind for kind in KINDS}
CONV1D = Kind("transformers_conv1d", lambda: pytest.importorskip("transformers").Conv1D(12, 8), (2, 5, 8))
REACHED = [
    CONV1D,
    *(kind for kind in KINDS if kind.name == "linear" or kind.name.startswith(("conv", "embedding"))),
]
on_reached = pytest.mark.parametrize("kind", REACHED, ids=lambda kind: kind.name)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
CONFIG = LoRAConfig(r=2, dora=True)


def injected(kind: Kind, dtype=torch.float64, config=CONFIG):
    model = minilora.inject(kind.build(dtype), kind.target, config, trainable=())
    generator = torch.Generator().manual_seed(0)
    layer = model.layer
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.3)
        layer.lora_magnitude.mul_(0.5 + torch.rand(layer.lora_magnitude.shape, generator=generator))
    return model


def by_definition(kind: Kind, layer):
    """Return the bare model with c V in the weight's place, and the three tensors that it depends on."""
    A, B, m = (
        getattr(layer, f"lora_{name}").detach().clone().requires_grad_() for name in ("A", "B", "magnitude")
    )
    transposed = layer.layout.transposed
    V = effective_weight(layer.bare.weight.detach(), A, B, layer.scaling, transposed=transposed)
    rows = V.T if transposed else V.flatten(1)  # an output in each
    c = m / rows.detach().norm(dim=1)
    weight = (c[:, None] * rows).T if transposed else (c[:, None] * rows).view(V.shape)
    bare = kind.build()
    return lambda x: torch.func.functional_call(bare, {"layer.weight": weight}, (x,)), (A, B, m)


@on_reached
def test_outputs_and_gradients_are_those_of_the_definition(kind):
    model, x = injected(kind), kind.input()
    reference, leaves = by_definition(kind, model.layer)
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for _ in range(2)]
    y, expected = model(inputs[0]), reference(inputs[1])
    assert distance(y.detach(), expected.detach()) < 1e-12
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, leaf in zip(("lora_A", "lora_B", "lora_magnitude"), leaves, strict=True):
        assert distance(getattr(model.layer, name).grad, leaf.grad) < 1e-12, name
    if x.is_floating_point():
        assert distance(inputs[0].grad, inputs[1].grad) < 1e-12


def test_many_tokens_take_the_weight_form_and_give_the_same():
    model = minilora.inject(nn.Sequential(nn.Linear(8, 6)).double(), "0", CONFIG)
    nn.init.normal_(model[0].lora_B)
    x = torch.randn(1000, 8, dtype=torch.float64)
    together, apart = model(x), torch.cat([model(row[None]) for row in x])
    assert distance(together.detach(), apart.detach()) < 1e-12


@on_reached
def test_injection_is_an_identity(kind):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        bare, x = kind.build(dtype).requires_grad_(False), kind.input(dtype)
        model = minilora.inject(kind.build(dtype), kind.target, CONFIG, trainable=())
        assert torch.equal(model(x), bare(x))
        assert state(minilora.eject(model)) == state(bare)


@on_reached
def test_merge_unmerge_disabled_fuse_and_what_outside_code_reads(kind):
    model, x = injected(kind).eval(), kind.input()
    base = kind.build().eval().requires_grad_(False)
    with torch.no_grad():
        expected, weight = model(x), model.layer.base.weight
        assert raw(model.layer.weight) == raw(model.layer.effective_weight())
        assert distance(minilora.merge(model)(x), expected) < 1e-12
        with minilora.disabled(model):
            assert raw(model(x)) == raw(base(x))
        assert minilora.unmerge(model).layer.base.weight is weight
        with minilora.disabled(model):
            assert raw(model(x)) == raw(base(x))
        minilora.fuse(model)
        assert distance(model(x), expected) < 1e-12
    assert list(model.state_dict()) == list(base.state_dict())


@on_reached
def test_saved_and_loaded_it_computes_the_same_bits(kind, tmp_path):
    model, x = injected(kind).eval(), kind.input()
    minilora.save(model, tmp_path / "a.safetensors")
    fresh = minilora.load(kind.build().eval(), tmp_path / "a.safetensors")
    assert raw(fresh(x)) == raw(model(x))
    assert raw(copy.deepcopy(fresh)(x)) == raw(model(x))


def test_a_file_says_nothing_of_dora_where_there_is_none():
    assert "dora" not in LoRAConfig(r=2).to_dict()
    assert CONFIG.to_dict()["dora"] is True
    assert LoRAConfig.from_dict(CONFIG.to_dict()) == CONFIG


def test_on_a_16_bit_base_the_magnitude_is_not_rounded():
    """m and n are float32: in bfloat16 they could not change by less than 0.4 %."""
    kind = BY_NAME["linear"]
    model, x = injected(kind, torch.bfloat16), kind.input(torch.bfloat16)
    reference, _ = by_definition(kind, injected(kind).layer)
    assert model.layer.lora_magnitude.dtype == torch.float32
    assert model(x).dtype == torch.bfloat16
    assert distance(model(x).detach().double(), reference(x.double()).detach()) < 0.02
    with torch.no_grad():
        before = model.layer.effective_weight(torch.float32)
        model.layer.lora_magnitude.mul_(1.001)
        assert distance(model.layer.effective_weight(torch.float32), before * 1.001) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        full = injected(kind, torch.float32)
        assert distance(full(kind.input(torch.float32)).detach().double(), reference(x.double())) < 0.02


def test_dropout_acts_on_what_a_reads_alone():
    kind = BY_NAME["linear"]
    model = injected(kind, config=LoRAConfig(r=2, dora=True, dropout=0.5))
    x = kind.input()
    expected = model.eval()(x).detach()
    model.train()
    samples = torch.stack([model(x).detach() for _ in range(3000)])
    assert distance(samples.mean(0), expected) < 0.1
    assert samples.std(0).max() > 0.1


def test_compiles_in_one_graph():
    kind = BY_NAME["linear"]
    model, x = injected(kind), kind.input()
    expected = model(x)
    assert (
        distance(torch.compile(model, fullgraph=True, backend="eager")(x).detach(), expected.detach()) < 1e-12
    )


def weight_form(transposed, bias):
    """Return DoRA's weight form, its definition, and the tensors that both depend on: x, A, B and m."""
    generator = torch.Generator().manual_seed(3)
    shapes = (12, 8), (2, 8), (12, 2), (12,), (12,)
    W, A, B, m, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    x, b = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64), b if bias else None

    def form(x, A, B, m):
        return magnitude_linear(x, W.T if transposed else W, b, A, B, 1.5, m, transposed=transposed)

    def definition(x, A, B, m):
        V = W + 1.5 * B @ A
        y = m / V.norm(dim=1).detach() * (x @ V.T)
        return y if b is None else y + b

    return form, definition, (x, A, B, m)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_weight_form_to_the_second_derivative_forwards_and_by_rows(transposed, bias):
    *both, values = weight_form(transposed, bias)
    firsts, seconds, outputs, tangents, rows = [], [], [], [], []
    for form in both:
        inputs = [value.clone().requires_grad_() for value in values]
        y = form(*inputs)
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        seconds.append(torch.autograd.grad(sum(each.cos().sum() for each in first), inputs))
        firsts.append(torch.autograd.grad(form(*inputs).sin().sum(), inputs))
        outputs.append(y.detach())
        tangents.append(torch.func.jvp(form, values, tuple(value.cos() for value in values))[1])
        x, *rest = values
        rows.append(torch.func.vmap(lambda one, form=form, rest=rest: form(one, *rest))(x))
    assert distance(*outputs) < 1e-12
    assert distance(*tangents) < 1e-12
    assert distance(*rows) < 1e-12
    for one, other in (*zip(*firsts, strict=True), *zip(*seconds, strict=True)):
        assert distance(one, other) < 1e-11


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_differentiates_what_backward_does():
    kind = BY_NAME["linear"]
    model, x = injected(kind), kind.input()
    parameters = {name: p.detach() for name, p in model.named_parameters() if "lora" in name}

    def output(values):
        return torch.func.functional_call(model, values, (x,))

    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    y, forward = torch.func.jvp(output, (parameters,), (tangents,))
    v = torch.randn_like(y)
    (back,) = torch.func.vjp(output, parameters)[1](v)
    assert distance((v * forward).sum(), sum((back[n] * tangents[n]).sum() for n in back)) < 1e-10


def test_a_bare_checkpoint_brings_the_magnitude_of_its_weights_until_something_is_trained():
    model, other = (
        minilora.inject(nn.Sequential(nn.Linear(4, 3)), "0", CONFIG),
        nn.Sequential(nn.Linear(4, 3)),
    )
    x = torch.randn(2, 4)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other.requires_grad_(False)(x))
    nn.init.ones_(model[0].lora_B)
    before = model[0].lora_magnitude.detach().clone()
    model.load_state_dict(nn.Sequential(nn.Linear(4, 3)).state_dict())
    assert torch.equal(model[0].lora_magnitude, before)


@pytest.mark.parametrize("kind", [CONV1D, BY_NAME["linear"], BY_NAME["conv2d_zeros"]], ids=lambda k: k.name)
def test_a_bias_that_is_trained_beside_it_is_not_scaled(kind):
    model, x = injected(kind), kind.input()
    minilora.inject(model, [], trainable=["layer.bias"])
    reference, _ = by_definition(kind, model.layer)
    with torch.no_grad():
        model.layer.base.trained.add_(1.0)
        expected = reference(x) + 1.0
        assert distance(model(x), expected) < 1e-12
        assert distance(minilora.fuse(model.eval())(x), expected) < 1e-12


def test_an_output_of_zeros_stays_zero():
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    model = minilora.inject(nn.Sequential(layer), "0", CONFIG)
    y = model(torch.randn(2, 4))
    y.sum().backward()
    assert torch.equal(y, layer.bias.expand(2, 3))
    assert all(torch.isfinite(p.grad).all() for p in minilora.trainable_parameters(model))


@pytest.mark.parametrize(
    ("layer", "target"),
    [
        (nn.Bilinear(2, 3, 4), "0"),
        (nn.ConvTranspose1d(2, 3, 4), "0"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight"),
        (nn.Embedding(5, 4, max_norm=1.0), "0"),
        (nn.EmbeddingBag(5, 4), "0"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_has_no_outputs_to_scale_is_refused_by_name(layer, target):
    model = nn.Sequential(layer)
    with pytest.raises(TargetError, match=f"DoRA scales the outputs .* {type(layer).__name__} is none"):
        minilora.inject(model, target, CONFIG)
    assert type(model[0]) is type(layer)


def test_merging_refuses_magnitudes_that_are_not_finite():
    model = minilora.inject(nn.Sequential(nn.Linear(4, 3)), "0", CONFIG)
    with torch.no_grad():
        model[0].lora_magnitude[1] = float("inf")
    with pytest.raises(minilora.MergeError, match="4 of 12 values"):
        minilora.merge(model)


def test_equal_to_peft(tmp_path):
    """The same values in PEFT's DoRA give the same outputs and the same gradients."""
    peft = pytest.importorskip("peft")
    for kind in (BY_NAME["linear"], BY_NAME["conv2d_zeros"], BY_NAME["embedding"]):
        model, x = injected(kind, torch.float32), kind.input(torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(
                kind.build(torch.float32),
                peft.LoraConfig(r=2, lora_alpha=16, target_modules=["layer"], use_dora=True),
            )
        layer = theirs.base_model.model.layer
        pair = (
            (layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])
            if kind.ids
            else (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        )
        magnitude = layer.lora_magnitude_vector["default"].weight
        with torch.no_grad():
            for target, source in zip(
                (*pair, magnitude),
                (model.layer.lora_A, model.layer.lora_B, model.layer.lora_magnitude),
                strict=True,
            ):
                target.copy_(source.view(target.shape))
        y, expected = model(x), theirs(x)
        assert distance(y.detach(), expected.detach()) < 1e-5
        y.square().sum().backward()
        expected.square().sum().backward()
        assert distance(model.layer.lora_magnitude.grad, magnitude.grad.flatten()) < 1e-4
        assert distance(model.layer.lora_B.grad, pair[1].grad.view(model.layer.lora_B.shape)) < 1e-4
